"""Torch-Pruning, by the recipe of its README: classifiers and other layers that make outputs are ignored, heads are
handed over, and the sizes that attention modules store are corrected after pruning, as its examples do.

Where a network has heads, both documented ways (narrower heads, fewer heads) are tried, and the better one counts.

What it removed is read off the weights: they hold their own positions while it prunes. The reference is the original
network with every removed entry of every parameter set to zero. Norms over channels have no exact restriction to fewer
channels; here, in its favour, the reference normalises what is left, too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bench.shrinkers import Shrunk, Stages
from prunekern.graph.inputs import Call
from prunekern.graph.labels import label
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.prune.prove import difference

PROJECTIONS = ("qkv", "qkv_proj", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q", "k", "v", "to_qkv")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")


def torch_pruning(model: nn.Module, call: Call, stages: Stages) -> Shrunk:
    """The best result of its documented settings."""
    outputs = output_layers(model, call)
    ways = (False, True) if any(True for _ in attention(model)) else (False,)
    found: list[Shrunk] = []
    failures: list[Exception] = []
    for whole_heads in ways:
        try:
            found.append(shrunk(model, call, outputs, whole_heads, stages))
        except Exception as error:
            failures.append(error)
    if not found:
        raise failures[0]
    return min(found, key=lambda each: each.error)


def shrunk(model: nn.Module, call: Call, outputs: list[str], whole_heads: bool, stages: Stages) -> Shrunk:
    pruned = copy.deepcopy(model).double()
    double = call.map(lambda t: t.double() if t.is_floating_point() else t)
    heads = {layer: count for _, layers, count in attention(pruned) for layer in layers}
    with stages("trace"):
        pruner = tp.pruner.BasePruner(
            pruned, double.args or dict(double.kwargs), importance=tp.importance.RandomImportance(), pruning_ratio=0.5,
            ignored_layers=[pruned.get_submodule(path) for path in outputs], num_heads=heads,
            prune_num_heads=whole_heads, prune_head_dims=not whole_heads, head_pruning_ratio=0.5 * whole_heads,
            forward_fn=None if double.args else (lambda net, kwargs: net(**kwargs)))
    for tensor in state(pruned).values():
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    with stages("slice"):
        pruner.step()
        correct_heads(model, pruned, pruner.num_heads)
    with stages("run"):
        error = distance(model, pruned, double)
    return Shrunk(pruned.float(), error, frozen=None, facts={"whole_heads": whole_heads, "ignored": outputs})


def output_layers(model: nn.Module, call: Call) -> list[str]:
    """Layers whose channels are seen in the network's outputs: walking back from these, the first contractions with
    weights. The last layer with weights where this library cannot trace the network."""
    try:
        labels = label(trace(model, call), REGISTRY)
    except Exception:
        return [path for path, module in model.named_modules() if getattr(module, "weight", None) is not None][-1:]
    graph, weights = labels.graph, {name for name, _ in labels.produced}
    waiting, seen, found = list(graph.output.all_input_nodes), set[fx.Node](), set[str]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        own = {name for arg in node.all_input_nodes if (name := graph.fqn(arg)) in weights}
        own |= {alias for alias, name in graph.tied.items() if name in own}
        found |= {name.rpartition(".")[0] for name in own if name}
        waiting += [] if own else node.all_input_nodes
    return sorted(found)


def attention(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Linear], int]]:
    """(module, the projections of its heads, how many heads they have), for modules that say so themselves."""
    for module in model.modules():
        count = next((value for name in COUNTS if isinstance(value := getattr(module, name, None), int)), None)
        layers = [layer for name in PROJECTIONS if isinstance(layer := getattr(module, name, None), nn.Linear)]
        if count is not None and layers:
            yield module, layers, count


def correct_heads(original: nn.Module, pruned: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    """Set what attention modules store about their sizes."""
    for (before, old_layers, old_count), (after, layers, _) in zip(attention(original), attention(pruned), strict=True):
        count = heads.get(layers[0], old_count)
        parts = 3 if len(layers) == 1 else 1
        old, new = old_layers[0].out_features // parts, layers[0].out_features // parts
        sizes = {old_count: count, old // old_count: new // count, old: new}
        for name, value in vars(before).items():
            if isinstance(value, int) and not isinstance(value, bool) and value in sizes and name != "embed_dim":
                by_name = count if name in COUNTS else new if "all" in name or "attn_dim" in name else sizes[value]
                setattr(after, name, by_name)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating buffers that hold more than one number."""
    return {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if tensor.is_floating_point()}


def distance(model: nn.Module, pruned: nn.Module, call: Call) -> float:
    """max|difference| / max|masked original| on random weights; ``pruned`` holds positions, then those weights."""
    masked = copy.deepcopy(model).double()
    whole, left = state(masked), state(pruned)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in whole.items():
        drawn = random_like(name, tensor, generator).reshape(-1)
        where = left[name].detach().round().long()
        kept = torch.zeros(tensor.numel(), dtype=torch.bool)
        kept[where.reshape(-1)] = True
        left[name].data = drawn[where]
        variance = name.endswith("running_var")
        tensor.data = (drawn if variance else torch.where(kept, drawn, 0)).view(tensor.shape)
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and not bool(kept.all()):
            restrict(masked.get_submodule(owner), kept)
    inputs = call.map(lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64)
                      if t.is_floating_point() else t)
    with torch.no_grad():
        outputs = [pytree.tree_leaves(net(*pytree.tree_map_only(Tensor, Tensor.clone, inputs.args),
                                          **pytree.tree_map_only(Tensor, Tensor.clone, dict(inputs.kwargs))))
                   for net in (pruned, masked)]
    return difference(outputs[0], outputs[1])


def random_like(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights at a scale that keeps activations sane; scales and variances positive."""
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if tensor.dim() >= 2:
        return drawn * math.sqrt(1.5 * tensor.shape[0] / max(1, tensor.numel()))
    return 0.3 * drawn if name.endswith(("bias", "running_mean")) else drawn.abs().clamp(0.3, 1.7)


def restrict(norm: nn.Module, kept: Tensor) -> None:
    """Let a norm over channels see those that are kept alone."""
    if not isinstance(norm, (nn.LayerNorm, nn.GroupNorm)) and "RMSNorm" not in type(norm).__name__:
        return
    positions = kept.nonzero()[:, 0]
    grouped = isinstance(norm, nn.GroupNorm)

    def restricted(x: Tensor) -> Tensor:
        axis = 1 if grouped or x.shape[-1] != len(kept) else -1
        slim = copy.copy(norm)
        slim._parameters = {key: None if p is None else nn.Parameter(p[positions])
                            for key, p in norm._parameters.items()}
        if isinstance(slim, nn.LayerNorm):
            slim.normalized_shape = (len(positions),)
        if isinstance(slim, nn.GroupNorm):
            slim.num_channels = len(positions)
        y: Tensor = type(norm).forward(slim, x.index_select(axis, positions))
        return torch.zeros_like(x).index_copy(axis, positions, y)
    norm.forward = restricted
