"""Torch-Pruning, by the recipe of its README: classifiers and other layers that make outputs are ignored, heads are
handed over, and the sizes that attention modules store are corrected after pruning, as its examples do.

Where a network has heads, both documented ways (narrower heads, fewer heads) are tried, and the better one counts.

What it removed is read off the weights: they hold their own positions while it prunes. The reference is the original
network with every removed entry of every parameter set to zero. Its norms over channels run on what is left, which is
not what zeros would give; here, in its favour, the reference normalises what is left, too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bench.shrinkers import Shrunk, Stages
from prunekern.graph.inputs import Call
from prunekern.graph.labels import label
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.prune.reference import difference

EXACT = 1e-6
PROJECTIONS = ("qkv", "qkv_proj", "query_key_value", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin",
               "k_lin", "v_lin", "q", "k", "v", "to_qkv", "to_q", "to_k", "to_v", "Wqkv")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads", "num_key_value_heads")


def torch_pruning(model: nn.Module, call: Call, stages: Stages) -> Shrunk:
    """The best result of its documented settings: exact before inexact, then the smaller one."""
    outputs = output_layers(model, call)
    ways = (False, True) if any(True for _ in attention(model)) else (False,)
    found: list[Shrunk] = []
    failures: list[Exception] = []
    for whole_heads in ways:
        try:
            found.append(shrunk(model, call, outputs, whole_heads, stages))
        except Exception as error:
            failures.append(error)
    stages.seconds = {stage: seconds / len(ways) for stage, seconds in stages.seconds.items()}
    if not found:
        raise failures[0]
    return min(found, key=lambda each: (not each.error < EXACT, sum(p.numel() for p in each.model.parameters())))


def shrunk(model: nn.Module, call: Call, outputs: list[str], whole_heads: bool, stages: Stages) -> Shrunk:
    pruned = copy.deepcopy(model)
    heads = {layer: count for _, layers in attention(pruned) for layer, count in layers.items()}
    with stages("trace"):
        pruner = tp.pruner.BasePruner(
            pruned, call.args or dict(call.kwargs), importance=tp.importance.RandomImportance(), pruning_ratio=0.5,
            ignored_layers=[pruned.get_submodule(path) for path in outputs], num_heads=heads,
            prune_num_heads=whole_heads, prune_head_dims=not whole_heads, head_pruning_ratio=0.5 * whole_heads,
            forward_fn=None if call.args else (lambda net, kwargs: net(**kwargs)), output_transform=tensors)
    for tensor in state(pruned.double()).values():
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    with stages("slice"):
        pruner.step()
        correct_heads(model, pruned, pruner.num_heads)
    with stages("run"):
        error, dtype = distance(model, pruned, call)
    return Shrunk(pruned.float(), error, frozen=None,
                  facts={"whole_heads": whole_heads, "ignored": outputs, "dtype": str(dtype).removeprefix("torch.")})


def tensors(outputs: Any) -> list[Tensor]:
    """What a network gives, flat, without what is no tensor."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


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


def attention(model: nn.Module) -> Iterator[tuple[nn.Module, dict[nn.Module, int]]]:
    """(module, its projections and how many heads each has), for modules that say it themselves or by a ``config``."""
    for module in model.modules():
        known = {name: value for source in (getattr(module, "config", None), module) for name in COUNTS
                 if isinstance(value := getattr(source, name, None), int)}
        layers = [layer for name in PROJECTIONS if isinstance(layer := getattr(module, name, None), nn.Linear)]
        count = next(iter(known.values()), None)
        if count is not None and layers:
            shared = known.get("num_key_value_heads", count)
            yield module, {layer: count if layer.out_features >= layers[0].out_features else shared for layer in layers}


def correct_heads(original: nn.Module, pruned: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    """Set what attention modules store about their sizes."""
    for (before, old_layers), (after, new_layers) in zip(attention(original), attention(pruned), strict=True):
        (layer, old_count), new_layer = next(iter(old_layers.items())), next(iter(new_layers))
        parts = 3 if len(old_layers) == 1 else 1
        count = heads.get(new_layer, old_count)
        old, new = (int(each.out_features) // parts for each in (layer, new_layer))      # type: ignore[arg-type]
        sizes = {old_count: count, old // old_count: new // count, old: new}
        for name, value in vars(before).items():
            if isinstance(value, int) and not isinstance(value, bool) and value in sizes and name != "embed_dim":
                by_name = count if name in COUNTS else new if "all" in name or "attn_dim" in name else sizes[value]
                setattr(after, name, by_name)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating buffers under all of their names."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in every if tensor.is_floating_point()}


def distance(model: nn.Module, pruned: nn.Module, call: Call) -> tuple[float, torch.dtype]:
    """max|difference| / max|masked original| on random weights; ``pruned`` holds positions, then those weights. In
    fp64, or in fp32 where the forward insists on it. What is tied may be pruned differently in each of its places."""
    masked = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    left, drawn, positions = state(pruned), dict[int, Tensor](), dict[int, Tensor]()
    for name, tensor in state(masked).items():
        values = drawn.setdefault(id(tensor), random_like(name, tensor, generator).reshape(-1))
        where = positions.setdefault(id(left[name]), left[name].detach().round().long())
        left[name].data = values[where]
        kept = torch.zeros(tensor.numel(), dtype=torch.bool).index_fill(0, where.reshape(-1), True)
        left_over = values if name.endswith("running_var") else torch.where(kept, values, 0)
        owner, _, attribute = name.rpartition(".")
        module = masked.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            module._parameters[attribute] = nn.Parameter(left_over.view(tensor.shape))
        else:
            module._buffers[attribute] = left_over.view(tensor.shape)
        if attribute == "weight" and not bool(kept.all()):
            restrict(module, kept)
    inputs = call.map(lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64)
                      if t.is_floating_point() else t)
    try:
        results(masked, inputs)
        dtype = torch.float64
    except RuntimeError:
        dtype = torch.float32
        inputs = inputs.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    return difference(results(pruned.to(dtype), inputs), results(masked.to(dtype), inputs)), dtype


@torch.no_grad()
def results(model: nn.Module, call: Call) -> list[Any]:
    given = call.map(Tensor.clone)
    return pytree.tree_leaves(model(*given.args, **given.kwargs))


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
