"""Norms across channels count those that left as zeros: the operators, the modules in their place, and the proof."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import prunekern as pk
from prunekern.core import counted
from prunekern.core.policy import Policy
from tests.pruning import double, groups_of
from tests.tolerances import PROOF, assert_equal_fp64

SINGLE = 1e-6          # of what casts to fp32 itself
X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


class Handwritten(nn.Module):
    """An RMS norm as language models write it: in fp32, back to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


class Last(nn.LayerNorm):
    """Channels first outside, last inside, with an activation of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x.transpose(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return self.act(x.transpose(1, -1))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def stream(norm: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), Block(12, norm()), Block(12, norm()), norm(), nn.Linear(12, 4))
    for vector in model.parameters():
        if vector.dim() == 1:
            nn.init.uniform_(vector, 0.3, 1.3)
    return model.eval()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(12), "plain": lambda: nn.LayerNorm(12, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(12), "rms_eps": lambda: nn.RMSNorm(12, eps=0.1),
    "handwritten": lambda: Handwritten(12)}


@pytest.mark.parametrize(("call", "plain"), [
    (lambda x, w, b: counted.LAYER_NORM(x, [4, 3], w, b, 1e-2, 30),
     lambda x, w, b: functional.layer_norm(x, [10, 3], w, b, 1e-2)),
    (lambda x, w, b: counted.RMS_NORM(x, [4, 3], w, 1e-2, 30),
     lambda x, w, b: functional.rms_norm(x, [10, 3], w, 1e-2)),
    (lambda x, w, b: counted.RMS_NORM(x, [4, 3], None, None, 30), lambda x, w, b: functional.rms_norm(x, [10, 3])),
    (lambda x, w, b: counted.GROUP_NORM(x, 1, w[:, 0], b[:, 0], 1e-2, 10),
     lambda x, w, b: functional.group_norm(x, 1, w[:, 0], b[:, 0], 1e-2)),
    (lambda x, w, b: counted.MEAN(x, [1, 2], True, 30), lambda x, w, b: x.mean((1, 2), keepdim=True))],
    ids=["layer", "rms", "rms_alone", "group", "mean"])
def test_operators_are_torchs_own_of_zeros(call: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
    """What torch gives for all channels, six of which are zero, at those that remain; and the same gradients."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape, 4, 3, dtype=torch.double, requires_grad=True) for shape in ((2,), (), ()))
    whole = [functional.pad(tensor, (0, 0, 0, 6)) for tensor in (x, w, b)]
    found, wanted = call(x, w, b), plain(*whole)
    wanted = wanted[:, :4] if wanted.shape[1] == 10 else wanted
    assert_equal_fp64(found, wanted)
    toward = torch.randn_like(wanted)
    for mine, own in zip(torch.autograd.grad(found, (x, w, b), toward, allow_unused=True),
                         torch.autograd.grad(wanted, (x, w, b), toward, allow_unused=True), strict=True):
        if own is not None and mine is not None:
            assert_equal_fp64(mine, own)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    x = 300 * torch.randn(4, 64).to(dtype)          # its squares do not fit a half
    found = counted.LAYER_NORM(x, [64], None, None, 1e-5, 64)
    assert found.dtype == dtype
    torch.testing.assert_close(found, functional.layer_norm(x, [64]))


def zeroed(model: nn.Sequential, kept: list[int]) -> nn.Module:
    """The network with the other channels of its stream zeroed in front of every norm and of the last layer."""
    mask = torch.zeros(12, dtype=torch.double).index_fill(0, torch.tensor(kept), 1)
    masked = copy.deepcopy(model).double()
    for part in masked.modules():
        if "Norm" in type(part).__name__ or isinstance(part, Handwritten) or part is masked[-1] \
                or (isinstance(part, nn.Linear) and part.in_features == 12):
            part.register_forward_pre_hook(lambda _, args: (args[0] * mask,))
    return masked


@pytest.mark.parametrize("name", NORMS)
def test_a_stream_leaves_exactly_and_the_class_stays(name: str) -> None:
    model = stream(NORMS[name])
    result = pk.prune(model, X, pk.Target(layers={"0": 0.5}), ranking="layer")
    kept = result.plan.kept["0.weight"][0]
    assert len(kept) == 6
    assert result.proof.form == "class"
    assert type(result.model) is nn.Sequential
    assert isinstance(result.model[1], Block)
    assert set(result.model.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        assert_equal_fp64(double(result.model)(X.double()), zeroed(model, kept)(X.double()),
                         SINGLE if name == "handwritten" else PROOF)
    assert any("count the channels that left" in note for note in result.notes)
    lowered = pk.lower(result.model, X)
    with torch.no_grad():
        torch.testing.assert_close(lowered(X), result.model(X))


def test_torchs_own_classes_stay_in_the_family() -> None:
    layer, rms = (pk.prune(stream(NORMS[name]), X, pk.Target(layers={"0": 0.5})).model[3] for name in ("layer", "rms"))
    assert isinstance(layer, nn.LayerNorm)
    assert "of=12" in repr(layer)
    assert isinstance(rms, nn.RMSNorm)
    assert "of=12" in repr(rms)


@pytest.mark.parametrize("name", NORMS)
def test_what_was_pruned_is_pruned_again(name: str) -> None:
    once = pk.prune(stream(NORMS[name]), X, pk.Target(layers={"0": 0.75}), ranking="layer")
    twice = pk.prune(once.model, X, pk.Target(layers={"0": 0.5}), ranking="layer")
    assert twice.proof.form == "class"
    assert twice.model[0].out_features < once.model[0].out_features


class Functional(nn.Module):
    """A norm in the forward of a module that does more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.layer_norm(self.first(x), (10,)))  # type: ignore[no-any-return]


def test_policies() -> None:
    """'auto' takes what keeps the class; 'counted' takes all; 'fixed' takes nothing."""
    assert not len(groups_of(Functional().eval(), (X,)))
    result = pk.prune(Functional().eval(), X, pk.Target(macs=0.6), policy={"norms": "counted"})
    assert result.proof.form == "graph"
    assert result.model.first.out_features < 10
    again = pk.prune(result.model, X, pk.Target(macs=0.6))       # no class to keep any more
    assert again.model.first.out_features < result.model.first.out_features
    model = stream(NORMS["layer"])
    assert {family.name for family in groups_of(model, (X,), Policy(norms="fixed"))} == {"1.up", "2.up"}


def test_images() -> None:
    """Channels first: a norm that turns them, one group of channels, a p-norm."""
    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.normalize(x, dim=1)

    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 10, 3), Last(10), nn.Conv2d(10, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 6, 1),
                          Unit(), nn.Conv2d(6, 5, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    result = pk.prune(model, x, pk.Target(layers={"*": 0.5}), ranking="layer")
    assert result.proof.form == "class"
    assert [part.out_channels for part in result.model if isinstance(part, nn.Conv2d)] == [5, 4, 3, 5]
    assert type(result.model[1]).__name__ == "GraphModule" or result.model[1]._get_name() == "CountedLast"
    other = torch.randn(3, 3, 14, 11)
    with torch.no_grad():
        assert result.model(other).shape == model(other).shape        # sizes other than the traced one
        torch.testing.assert_close(pk.lower(result.model, x)(x), result.model(x))
    again = pk.prune(result.model, x, pk.Target(layers={"0": 0.5}), ranking="layer")
    assert again.proof.form == "class"
    assert again.model[0].out_channels < 5


def test_training_goes_on() -> None:
    model: Any = pk.prune(stream(NORMS["layer"]), X, pk.Target(layers={"0": 0.5})).model.train()
    model(X).square().mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model[3].parameters())
    assert torch.compile(model, backend="aot_eager", fullgraph=True)(X).shape == (3, 5, 4)
