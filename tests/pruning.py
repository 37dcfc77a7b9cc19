"""The steps from a model to a proven smaller one, for tests that look between them; and an oracle of their own.

The oracle knows nothing of labels or graphs: it takes what a plan says about the weights of torch.nn layers
and silences, in a copy of the dense model, the inputs that the plan takes away.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunekern.core.plan import Plan
from prunekern.core.policy import DEFAULT, Policy
from prunekern.graph.bake import labelled
from prunekern.graph.groups import Groups, find_groups
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.prune.attributes import slice_class
from prunekern.prune.prove import Proof, prove
from prunekern.prune.rewrite import rewrite
from prunekern.prune.slice import plan_of
from prunekern.prune.target import Meter
from prunekern.prune.units import make_units

Conv = nn.modules.conv._ConvNd
Transposed = nn.modules.conv._ConvTransposeNd


@dataclass(frozen=True)
class Cut:
    """One choice carried out. model: what was proven; sliced: the user's class, whether it runs or not."""

    groups: Groups
    keep: Tensor
    plan: Plan
    sliced: nn.Module
    graph_form: fx.GraphModule
    model: nn.Module
    proof: Proof


def groups_of(model: nn.Module, inputs: Any, policy: Policy = DEFAULT) -> Groups:
    return find_groups(labelled(trace(model, inputs), REGISTRY, policy=policy))


def random_choice(groups: Groups, seed: int, most: float = 1.0) -> Tensor:
    """Boolean [groups]: from every family a random number of random units leaves, but never all."""
    rng = random.Random(seed)
    scores = torch.rand(groups.labels.groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    units = make_units(groups, scores)
    gone = torch.zeros(len(units), dtype=torch.bool)
    for family in groups:
        mine, _ = units.within(family)
        gone[mine[: rng.randint(0, int(most * len(mine)))]] = True
    return ~units.removed(gone)


def first_units(groups: Groups, seed: int = 0) -> Tensor:
    """One unit of every family leaves."""
    scores = torch.rand(groups.labels.groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    units = make_units(groups, scores)
    gone = torch.zeros(len(units), dtype=torch.bool)
    for family in groups:
        gone[units.within(family)[0][:1]] = True
    return ~units.removed(gone)


def cut(model: nn.Module, groups: Groups, keep: Tensor) -> Cut:
    """Slice, rewrite and prove; raises what these raise."""
    sliced = slice_class(model, groups, keep, REGISTRY)
    graph_form = rewrite(groups.labels, keep, sliced, REGISTRY)
    module, proof = prove(groups, keep, graph_form, sliced)
    meter = Meter(groups)
    after = meter.of(keep)
    plan = plan_of(groups, keep, costs={name: (meter.whole[name], after[name]) for name in after})
    return Cut(groups, keep, plan, sliced, graph_form, module, proof)


def double(value: Any) -> Any:
    """A nest of tensors (or a copy of a module) in fp64; integers stay."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


@torch.no_grad()
def silenced(model: nn.Module, plan: Plan) -> nn.Module:
    """A dense fp64 copy whose convolutions, linear and recurrent layers do not hear inputs that the plan takes away."""
    dense = double(model)
    for path, module in dense.named_modules():
        kept = plan.kept.get(f"{path}.weight" if path else "weight", {})
        if isinstance(module, Transposed) and 0 in kept:
            module.weight[_others(kept[0], module.weight.shape[0])] = 0
        elif isinstance(module, (nn.Linear, Conv)) and not isinstance(module, Transposed) and 1 in kept:
            for rows, inputs in _blocks(module, kept):
                module.weight[rows, _others(inputs, module.weight.shape[1])] = 0
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            for name, weight in module.named_parameters():
                columns = plan.kept.get(f"{path}.{name}", {}).get(1)
                if columns is not None:                     # of a layer's inputs, and of its own last outputs
                    weight[:, _others(columns, weight.shape[1])] = 0
    return dense


def is_baked(groups: Groups) -> bool:
    """Whether weights that the forward computes were computed once and for all."""
    return any(note.startswith("baked") for note in groups.graph.notes)


def mixes_in_layers(model: nn.Module, groups: Groups) -> bool:
    """Whether ``silenced`` can say what comes out: channels are mixed in layers with weights of their own only."""
    if is_baked(groups):                                # layers whose weights are computed have others than these
        return False
    layers = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv))}
    names = [{groups.graph.fqn(arg) for arg in node.all_input_nodes} for node in groups.labels.masked]
    tied = set(groups.graph.tied.values()) | set(groups.graph.tied)
    return all(len(found & layers) == 1 and not found & tied for found in names)


def _others(indices: list[int], size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[torch.tensor(indices, dtype=torch.long)] = False
    return gone


def _blocks(module: Any, kept: Any) -> Iterator[tuple[slice, list[int]]]:
    """(rows of axis 0, kept indices of axis 1), by surviving group where a convolution has groups."""
    tables = kept[1] if isinstance(kept[1][0], list) else [kept[1]]
    size = len(module.weight) // len(tables)
    for group, indices in enumerate(tables):
        if indices:
            yield slice(group * size, (group + 1) * size), indices


def taken(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The state that a plan leaves of a model's, index by index."""
    state = {}
    for name, tensor in model.state_dict().items():
        path = name.rpartition(".")[0]
        kept, module = dict(plan.kept.get(name, {})), model.get_submodule(path)
        if 1 in kept and isinstance(kept[1][0], list):
            rows = torch.tensor(kept.get(0, range(len(tensor))))
            size = len(tensor) // len(kept[1])
            blocks = [tensor[rows[rows // size == row.start // size]][:, indices]
                      for row, indices in _blocks(module, kept)]
            tensor, kept = torch.cat(blocks), {}
        for axis, indices in kept.items():
            tensor = tensor.index_select(axis, torch.tensor(indices))
        state[name] = tensor
    return state
