"""Weights computed from parameters: baked where that frees channels, left alone where they prune as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import prunekern as pk
from prunekern import Target, prune
from prunekern.prune.oneshot import Pruned
from tests.weights import randomise_

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HALF = Target(layers={"*": 0.5})


class Standardised(nn.Conv2d):
    """timm's StdConv2d: a batch norm over a weight's own inputs, at every call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Mixed(nn.Conv2d):
    """Two kernels mixed by a softmax over all their weights."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.other = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.other.flatten().softmax(0).view_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class Centred(nn.Conv2d):
    """The mean over the inputs is taken off by a sum, which would let channels go and then be another sum."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.sum((1, 2, 3), keepdim=True) / self.weight[0].numel(), self.bias)


def layers(norm: Callable[[nn.Module], nn.Module], conv: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            norm(conv(3, 8, 3)), nn.ReLU(), norm(conv(8, 12, 3)), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(),
            norm(nn.Linear(12 * 16, 10)), nn.ReLU(), nn.Linear(10, 3))
        randomise_(model)
        model.train()(torch.randn(8, 3, 8, 8))           # power iterations, statistics
    return model.eval()


def bare(module: nn.Module) -> nn.Module:
    return module


KINDS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: layers(parametrizations.weight_norm),
    "spectral norm": lambda: layers(parametrizations.spectral_norm),
    "orthogonal": lambda: layers(parametrizations.orthogonal),
    "batch norm of weights": lambda: layers(bare, Standardised),
    "softmax of weights": lambda: layers(bare, Mixed),
    "sum of weights": lambda: layers(bare, Centred),
    "old weight norm": lambda: layers(nn.utils.weight_norm),
    "old spectral norm": lambda: layers(nn.utils.spectral_norm),
}
DEPRECATED = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def silenced(model: nn.Module, result: Pruned) -> Tensor:
    """What the dense network gives when its layers do not hear the channels that are gone: by hooks, in fp64."""
    def mute(layer: str) -> Callable[..., Any]:
        kept = result.plan.kept.get(f"{layer}.weight", {}).get(1)

        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            mask = torch.zeros(args[0].shape[1], dtype=torch.float64)
            mask[kept if kept is not None else slice(None)] = 1
            return (args[0] * mask.view([1, -1] + [1] * (args[0].dim() - 2)),)
        return hook
    # Old-style weight norm keeps a tensor that deepcopy refuses, so the network itself is made again.
    handles = [module.register_forward_pre_hook(mute(name)) for name, module in model.named_modules()
               if isinstance(module, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        out = model.double()(X.double())
    for handle in handles:
        handle.remove()
    return out


@DEPRECATED
@pytest.mark.parametrize("kind", KINDS)
def test_computed_weights_are_baked_and_pruned(kind: str) -> None:
    model = KINDS[kind]()
    before, wanted = {n: t.clone() for n, t in model.state_dict().items()}, model(X)
    result = prune(model, X, HALF)
    assert [(layer, f.channels) for f in result.groups for layer in f.layers] == [("0", 8), ("2", 12), ("6", 10)]
    assert [tuple(result.model.state_dict()[f"{i}.weight"].shape) for i in (0, 2, 6, 8)] == [
        (4, 3, 3, 3), (6, 4, 3, 3), (5, 96), (3, 5)]
    assert result.proof.form == "graph"
    assert sum(note.startswith("baked: '0.weight', '2.weight'") for note in result.notes) == 1
    assert torch.equal(model(X), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        found = copy.deepcopy(result.model).double()(X.double())
    dense = silenced(model, result)
    assert float((found - dense).abs().max() / dense.abs().max()) < 1e-5         # baked in the dtype of the network


@DEPRECATED
@pytest.mark.parametrize("kind", ["weight norm", "batch norm of weights", "old weight norm"])
def test_baked_networks_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    result = pk.compress(KINDS[kind](), X, Target(macs=0.5), steps=2)
    assert result.form == "graph"
    result.save(tmp_path)
    alone, with_model = pk.load(tmp_path), pk.load(tmp_path, model=KINDS[kind]())
    assert alone.lowered is not None
    wanted = result.model(X)
    assert torch.equal(alone.model(X), wanted)
    assert torch.equal(with_model.model(X), wanted)
    assert torch.allclose(alone.lowered(X), wanted, atol=1e-5)
    assert result.model.state_dict().keys() == with_model.model.state_dict().keys() == alone.model.state_dict().keys()


def test_baked_weights_are_parameters_of_the_layer() -> None:
    model = layers(parametrizations.weight_norm)
    model[2].requires_grad_(False)
    module = prune(model, X, HALF).model
    assert {name: p.requires_grad for name, p in module.named_parameters()} == {
        "0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False, "3.weight": True, "3.bias": True,
        "6.weight": True, "6.bias": True, "8.weight": True, "8.bias": True}
    module.train()(X).sum().backward()
    assert module.get_parameter("0.weight").grad is not None
    assert isinstance(module.get_submodule("3"), nn.BatchNorm2d)
    assert parametrize.is_parametrized(model[0], "weight")


class Scaled(nn.Module):
    """A parametrisation by channel alone."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((8, 1, 1, 1), 0.1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.log.exp()


def test_what_prunes_as_it_is_stays_as_it_is() -> None:
    model = layers(bare)
    parametrize.register_parametrization(model[0], "weight", Scaled())
    result = prune(model, X, HALF)
    assert result.proof.form == "class"
    assert result.model[0].parametrizations.weight[0].log.shape == (4, 1, 1, 1)
    assert not any("baked" in note for note in result.notes)


class Twice(nn.Module):
    """A raw weight that is read beside its standardised form, and a table of positions that baking would not free."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.table = nn.Parameter(torch.randn(4, 3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.conv.weight
        weight = raw / torch.linalg.vector_norm(raw, dim=(1, 2, 3), keepdim=True)
        places = F.interpolate(self.table[None], size=(6, 6), mode="bicubic").softmax(-1)
        return self.out(F.relu(F.conv2d(x, weight, self.conv.bias))) + places, raw.amax((0, 1))


def test_raw_weights_that_are_read_elsewhere_stay() -> None:
    result = prune(Twice().eval(), X, HALF)
    shapes = {name: tuple(t.shape) for name, t in result.model.state_dict().items()}
    assert shapes == {"conv.weight": (8, 3, 3, 3), "conv.bias": (4,), "conv.baked_weight": (4, 3, 3, 3),
                      "out.weight": (4, 4, 1, 1), "out.bias": (4,), "table": (4, 3, 3)}


class Shared(nn.Module):
    """A normalised layer under two names that is called twice, and whose weight is read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = (parametrizations.spectral_norm(nn.Conv2d(a, 8, 3, padding=1)) for a in (3, 8))
        self.alias, self.out = self.again, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.first(x))))
        return self.out(F.conv2d(self.alias(x), self.again.weight))


def test_a_weight_computed_twice_is_baked_once(tmp_path: Path) -> None:
    result = pk.compress(Shared().eval(), X, HALF)
    assert {name: tuple(p.shape) for name, p in result.model.named_parameters()} == {
        "first.weight": (4, 3, 3, 3), "first.bias": (4,), "again.weight": (4, 4, 3, 3), "again.bias": (4,),
        "out.weight": (4, 4, 1, 1), "out.bias": (4,)}
    assert any(note.startswith("baked: 'first.weight', 'again.weight'. The") for note in result.notes)
    result.save(tmp_path)
    assert torch.equal(pk.load(tmp_path).model(X), result.model(X))


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.out.weight * torch.rand_like(self.out.weight)).softmax(1)
        return F.conv2d(F.relu(self.conv(x)), weight, self.out.bias)


def test_what_is_drawn_at_random_is_not_baked() -> None:
    assert not any(note.startswith("baked") for note in pk.groups_of(Random().eval(), X).graph.notes)


def test_positions_of_a_channel_normalised_together_stay() -> None:
    """A batch norm by its own statistics mixes the positions of a channel; the channels of a row pass."""
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:                   # [batch, 8, 8]: channels lie on the last axis
            return self.fc2(F.batch_norm(self.fc1(x), None, None, training=True))

    with pytest.raises(pk.errors.InputError, match="normalised"):
        prune(Rows().eval(), X[:, 0], HALF)
