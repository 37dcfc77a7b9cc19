"""Teeth: what a twin feels is what really changes its outputs, however the forward writes its tensors."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.prune.reference import masked_outputs
from prunekern.prune.teeth import Teeth, _influence
from tests.pruning import first_units, groups_of

teeth_file: Any = import_module("prunekern.prune.teeth")
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
aten = torch.ops.aten


def written(x: Tensor) -> Tensor:
    """What is read is a tensor of zeros, filled slice by slice (as iSQRT-COV does)."""
    out = torch.zeros(x.shape[0], 2, *x.shape[1:], dtype=x.dtype)
    out[:, 0] = F.gelu(x)
    out[:, 1] = out[:, 0] * 2
    return out[:, 1]


def overwritten(x: Tensor) -> Tensor:
    """What was multiplied is written over, through a view of it."""
    y = F.gelu(x)
    z = y * y.sigmoid()
    y.view(-1).mul_(3)
    return z + y


def halves(x: Tensor) -> Tensor:
    """Autograd refuses to write into one of several views."""
    a, b = x.chunk(2, 1)
    return torch.cat([a.sigmoid_(), b], 1)


def detached(x: Tensor) -> Tensor:
    return F.gelu(x).detach() * 2


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 3, 1)
        self.double().between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.between(self.two(self.between(self.one(x))))).flatten(1)


class Emptied(torch.autograd.Function):
    """Computes where no gradients are recorded, and ends the lives of its tensors itself (as RevNet does)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net: Net) -> Tensor:
        with torch.no_grad():
            half = x * 0.5
            out = net.three(net.two(F.gelu(net.one(half))))
            half.set_()
        return out


class Emptying(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        out = Emptied.apply(x, self)
        x.data.set_()
        return out.flatten(1)


NETS = {"emptied": Emptying(F.gelu).eval(),
        **{f.__name__: Net(f).eval() for f in (written, overwritten, halves, detached)}}


def state(groups: Groups) -> tuple[dict[str, Tensor], Call]:
    return {name: t.detach() for name, t in groups.graph.tensors.items()}, Call((X,), {})


@pytest.mark.parametrize("name", NETS)
def test_gradients_feel_what_zeroing_changes(name: str) -> None:
    """First order is judged by really taking away 1e-6 of a channel: the two agree."""
    groups = groups_of(NETS[name], X)
    keep = first_units(groups)
    tensors, call = state(groups)
    felt = _influence(groups, keep, tensors, call)
    base = masked_outputs(groups.labels, keep, tensors, call)
    direction = torch.randn(base[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction /= direction.numel() ** 0.5
    for channel, group in enumerate(groups.labels.axes["two.weight", 1].tolist()):
        weaker = {**tensors, "two.weight": tensors["two.weight"].clone()}
        weaker["two.weight"][:, channel] *= 1 - 1e-6
        change = masked_outputs(groups.labels, keep, weaker, call)[0] - base[0]
        expected = float((change * direction).sum().abs() / base[0].abs().max()) * 1e6
        assert (expected > 0) == bool(keep[group])
        if bool(keep[group]):
            assert float(felt[group]) == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_the_graphs_are_what_they_are_meant_to_be() -> None:
    """A region without gradients, an emptied tensor and so on are nodes of the graph; else the test above says less."""
    targets = {name: {node.target for node in groups_of(net, X).graph.nodes} for name, net in NETS.items()}
    assert {torch._C._set_grad_enabled, aten.set_.default} <= targets["emptied"]
    assert aten.sigmoid_.default in targets["halves"]
    assert aten.copy_.default in targets["written"]
    assert aten.mul_.Tensor in targets["overwritten"]
    assert aten.detach.default in targets["detached"]


def test_a_family_behind_a_kink(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two families is felt through a sign only, which no gradient passes."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 7), Sign(), nn.Linear(7, 3)).eval()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    groups = groups_of(net, x)
    keep = first_units(groups)
    tensors = {name: t.detach().double() for name, t in groups.graph.tensors.items()}
    call = Call((x.double(),), {})
    reference = masked_outputs(groups.labels, keep, tensors, call)
    monkeypatch.setattr(teeth_file, "TRIES", 0)
    teeth = Teeth(groups, keep)
    teeth.feel(tensors, reference, call)
    assert [family.name for family in teeth.blunt] == ["0"]
    monkeypatch.setattr(teeth_file, "TRIES", 1)
    share = teeth.share
    teeth.feel(tensors, reference, call)
    assert teeth.blunt == []
    assert teeth.share == pytest.approx(share + 1 / int(keep[torch.cat([f.groups for f in groups])].sum()))


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sign()


def test_faint_is_not_felt() -> None:
    """A channel whose loss would pass as equal has not been felt, however many outputs there are."""
    net = Net(F.gelu).eval()
    groups = groups_of(net, X)
    keep = first_units(groups)
    tensors, call = state(groups)
    ids = [g for g in groups.labels.axes["two.weight", 1].tolist() if bool(keep[g])]
    for factor, felt in ((1e-6, True), (1e-11, False)):
        channel = groups.labels.axes["two.weight", 1].tolist().index(ids[0])
        faint = {**tensors, "two.weight": tensors["two.weight"].clone()}
        faint["two.weight"][:, channel] *= factor
        teeth = Teeth(groups, keep)
        teeth.feel(faint, masked_outputs(groups.labels, keep, faint, call), call)
        assert bool(teeth.seen[ids[0]]) == felt
        assert bool(teeth.seen[ids[1:]].all())
