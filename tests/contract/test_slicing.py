"""Every registered operator between a layer that issues channels and one that consumes them.

Groups are cut at random; the smaller network must equal the dense one whose consumers do not hear the removed
channels (`tests.pruning.silenced`), and, where the operator keeps channels apart, the dense one with zeros
written into the consumer's input by a hook.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.core.rule import OpRule, Sample
from prunekern.graph.groups import Groups
from prunekern.graph.labels import frozen_report
from prunekern.ops import REGISTRY
from tests.pruning import Cut, cut, double, groups_of, random_choice, silenced, taken
from tests.tolerances import assert_equal_fp64

SAMPLES = REGISTRY.samples()
IDS = [f"{type(rule).__name__}: {sample}" for rule, sample in SAMPLES]
APART = {"Activation", "PReLU", "Arithmetic", "BatchNorm", "InstanceNorm", "Pool", "PoolWithIndices", "Resize"}
"""Rules of operators after which channel i is still channel i, and nothing is summed over channels."""

FEATURES = 3


class Sandwich(nn.Module):
    """A pointwise layer in front of every floating-point input, the operator, flatten, a linear layer."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.fronts = nn.ModuleList(pointwise(shape) for shape in _shapes(sample))
        self.middle = sample.build()
        with torch.no_grad():
            out = self.middle.eval()(*sample.inputs(2))
        # A linear layer over tokens issues channels of its own: flattened, the two kinds could not be told apart.
        tokens = out.dim() == 3 and any(isinstance(m, nn.Linear) for m in self.middle.modules())
        self.merge = nn.Conv1d(out.shape[1], 2, 1) if tokens else nn.Identity()
        self.last = nn.Linear(2 * out.shape[2] if tokens else out[0].numel(), 4)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.middle(*[front(x) for front, x in zip(self.fronts, inputs, strict=True)])
        return self.last(self.merge(x).flatten(1))


def _shapes(sample: Sample) -> list[tuple[int, ...]]:
    return [shape if x.is_floating_point() else () for shape, x in zip(sample.shapes, sample.inputs(), strict=True)]


def pointwise(shape: tuple[int, ...]) -> nn.Module:
    if not shape:
        return nn.Identity()
    layer = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2]
    return layer(FEATURES, shape[1]) if layer is nn.Linear else layer(FEATURES, shape[1], 1)


def raw_inputs(sample: Sample, batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, FEATURES, *x.shape[2:]) if x.is_floating_point() else x
                 for x in sample.inputs(batch))


@cache
def prepared(index: int) -> tuple[nn.Module, Groups]:
    sample = SAMPLES[index][1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        model = Sandwich(sample).eval()
        for parameter in model.parameters():        # torch starts norms at exactly one and zero
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model, groups_of(model, raw_inputs(sample, 2))


@cache
def carried_out(index: int, seed: int) -> Cut:
    model, groups = prepared(index)
    return cut(model, groups, extreme(groups) if seed < 0 else random_choice(groups, seed))


def extreme(groups: Groups) -> Tensor:
    """All that can go goes: one unit of each family is left."""
    from prunekern.prune.units import make_units

    units = make_units(groups, torch.rand(groups.labels.groups, dtype=torch.float64))
    return ~units.removed(~units.last)


def outputs(model: nn.Module, sample: Sample, batch: int) -> Tensor:
    torch.manual_seed(batch)
    with torch.no_grad():
        return double(model)(*double(raw_inputs(sample, batch)))


def front_matters(sample: Sample) -> bool:
    return sample.inputs()[0].is_floating_point() and sample.shapes[0][1] > 1


@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=IDS)
@pytest.mark.parametrize("seed", [0, 1, 2, -1], ids=lambda s: "everything" if s < 0 else f"seed{s}")
def test_sliced_equals_silenced(index: int, seed: int) -> None:
    sample = SAMPLES[index][1]
    model, groups = prepared(index)
    if not len(groups):
        assert not sample.prunable
        return
    result = carried_out(index, seed)
    reference = silenced(model, result.plan)
    if any(word in str(sample) for word in ("sum", "matrix", "norm over")) or groups.labels.counted:
        silence_outputs(reference.fronts, result.plan)
    for batch in (1, 2, 5):
        assert_equal_fp64(outputs(result.model, sample, batch), outputs(reference, sample, batch))


def silence_outputs(fronts: nn.ModuleList, plan: Any) -> None:
    """Without a layer whose weights could be silenced, what is gone counts as zero where it is summed."""
    for i, front in enumerate(fronts):
        kept = plan.kept.get(f"fronts.{i}.weight", {}).get(0)
        if kept is not None:
            gone = torch.tensor([c not in kept for c in range(front.weight.shape[0])])
            front.weight.data[gone], front.bias.data[gone] = 0, 0


@pytest.mark.parametrize("index", [i for i, (rule, _) in enumerate(SAMPLES) if type(rule).__name__ in APART],
                         ids=lambda i: IDS[i])
def test_sliced_equals_zeros_at_the_consumer(index: int) -> None:
    """The oracle by hook: nothing of the plan is read but which channels the front layer keeps."""
    sample = SAMPLES[index][1]
    model, _ = prepared(index)
    result = carried_out(index, 1)
    kept = result.plan.kept.get("fronts.0.weight", {}).get(0)
    if kept is None:
        result = carried_out(index, -1)
        kept = result.plan.kept["fronts.0.weight"][0]
    reference, channels = double(model), sample.shapes[0][1]

    def zero(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].unflatten(1, (channels, -1)).clone()
        x[:, [c for c in range(channels) if c not in kept]] = 0
        return (x.flatten(1),)

    reference.last.register_forward_pre_hook(zero)
    assert_equal_fp64(outputs(result.model, sample, 3), outputs(reference, sample, 3))


@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=IDS)
def test_weights_are_those_of_the_plan(index: int) -> None:
    model, groups = prepared(index)
    if not len(groups):
        assert not SAMPLES[index][1].prunable
        return
    result = carried_out(index, 1)
    wanted = taken(model, result.plan)
    for form in (result.sliced, result.graph_form):
        state = form.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=IDS)
def test_prunable_or_named(index: int) -> None:
    """What may go goes, down to the last unit; what may not is held back, and the operator is named."""
    sample = SAMPLES[index][1]
    _, groups = prepared(index)
    if not front_matters(sample):
        assert not sample.prunable
        return
    channels = groups.labels.axes["fronts.0.weight", 0]
    if sample.prunable:
        left = len(carried_out(index, -1).sliced.fronts[0].weight)
        assert 1 <= left < sample.shapes[0][1]
        assert not bool((channels == 0).all())
    else:
        assert bool((channels == 0).all())
        assert any("middle" in line or "test_slicing" in line or "prunekern" in line
                   for line in frozen_report(groups.labels))


def test_every_rule_has_samples() -> None:
    """Rules that no sample reaches would not be held by any contract."""
    bare = {type(rule).__name__ for rule in REGISTRY if not rule.samples}
    # Grouped products have no kernel for fp64, and packed sequences go in with their lengths; they are held by
    # e2e/test_zoo_sample.py and unit/test_recurrent_labels.py.
    assert bare <= {"GetItem", "GroupedProduct", "Packing"}


def test_rule_of_a_sample_is_reached() -> None:
    """A sample that no longer produces its operator would test something else."""
    for index, (rule, sample) in enumerate(SAMPLES):
        _, groups = prepared(index)
        assert isinstance(rule, OpRule)
        assert any(node.target in rule.matches for node in groups.graph.nodes) or "Identity" in str(sample), IDS[index]
