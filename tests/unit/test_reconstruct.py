"""Weights refitted to the dense network: planted redundancy, drift, biases and statistics, and every kind of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekern as pk
from prunekern.errors import InputError
from prunekern.graph.groups import Groups
from prunekern.ops import REGISTRY
from prunekern.prune import landing, leastsquares
from prunekern.prune import reconstruct as module
from prunekern.prune.attributes import slice_class
from prunekern.prune.lockstep import Walker
from prunekern.prune.oneshot import prune
from prunekern.prune.reconstruct import Reconstruction, reconstruct
from prunekern.prune.target import Target
from tests.pruning import cut, groups_of, random_choice
from tests.weights import calibrate_, randomise_

SIDE = 6


def images(rows: int = 64, channels: int = 3, side: int = SIDE) -> Tensor:
    return torch.randn(rows, channels, side, side, generator=torch.Generator().manual_seed(9)).double()


def lively(model: nn.Module, *inputs: Tensor) -> Any:
    torch.manual_seed(0)
    randomise_(model.double()).eval()
    if inputs:
        calibrate_(model, *inputs)
    return model


def without(groups: Groups, gone: dict[str, Sequence[int]]) -> Tensor:
    """Everything is kept but these outputs of layers."""
    keep = groups.everything()
    for layer, outputs in gone.items():
        keep[groups.labels.axes[f"{layer}.weight", 0][list(outputs)]] = False
    return keep


def far(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Distance of the outputs, relative to the variance of the second one's."""
    with torch.no_grad():
        y, z = model(x), other(x)
    return float((y - z).norm() / (z - z.mean(0)).norm())


def planted(model: nn.Module, x: Tensor, gone: dict[str, Sequence[int]], **options: Any) -> tuple[float, float, Any]:
    """(distance from the dense network as sliced, after reconstruction, the refitted network)."""
    groups = groups_of(model, x[:2])
    keep = without(groups, gone)
    sliced = slice_class(model, groups, keep, REGISTRY)
    before = far(sliced, model, x)
    reconstruct(sliced, groups, keep, x, **{"ridge": 1e-10, "passes": 0, **options})
    return before, far(sliced, model, x), sliced


# ---- planted cases -----------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, bias: bool = True, kernel: int = 3,
                 relu: bool = True) -> None:
        super().__init__()
        self.a, self.n1 = nn.Conv2d(3, 8, kernel, padding=kernel // 2), nn.BatchNorm2d(8)
        self.b, self.n2 = nn.Conv2d(8, 6, kernel, padding=kernel // 2, bias=bias), norm(6)
        self.head, self.relu = nn.Linear(6, 4), relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(self.a(x))
        x = self.n2(self.b(F.relu(x) if self.relu else x))
        return self.head(F.relu(x).mean((2, 3)))


def test_a_channel_that_exists_twice_is_not_missed() -> None:
    model = lively(Chain(), images())
    with torch.no_grad():
        for tensor in (*model.a.parameters(), *model.n1.parameters(), model.n1.running_mean, model.n1.running_var):
            tensor[[1, 5]] = tensor[[0, 4]]
    before, after, _ = planted(model, images(), {"a": [1, 4]})
    assert before > 0.05
    assert after < 1e-6


def test_a_channel_that_depends_on_others_is_not_missed() -> None:
    """Without an activation in between; 3 of 8 are sums of the others, and of a constant."""
    model = lively(Chain(kernel=1, relu=False), images())
    with torch.no_grad():
        mix = torch.randn(3, 5).double()
        for tensor in (*model.a.parameters(), model.n1.running_mean, model.n1.bias):
            tensor[5:] = torch.einsum("ij,j...->i...", mix, tensor[:5])
        for tensor in (model.n1.running_var, model.n1.weight):
            tensor[:] = 1
        model.n1.bias[5:] += 0.7
    before, after, _ = planted(model, images(), {"a": [2, 5, 6]})
    assert before > 0.05
    assert after < 1e-6


class Residual(nn.Module):
    """Two linear blocks on a stream: what the first one loses, the second one can make good."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.b1 = nn.Linear(5, 6), nn.Linear(6, 5)
        self.a2, self.b2 = nn.Linear(5, 9), nn.Linear(9, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.b1(self.a1(x)))
        x = self.drop(self.b2(self.a2(x))) + x
        return x.cumsum(1)


def test_drift_of_the_stream_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(Residual())
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(1)).double()
    gone = {"a1": [0, 1, 2, 3]}
    before, after, _ = planted(model, x, gone)
    assert before > 0.1
    assert after < 1e-6
    monkeypatch.setattr(module, "way_of", lambda form, layer, shapes: landing.Way(layer, ()))
    assert planted(model, x, gone)[1] > 0.1             # fitted to its own output, a block cannot know of it


class Block(nn.Module):
    """As in torchvision: the shortcut's convolution comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.a, self.b, self.n = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.short, self.m = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.n(self.b(self.a(x)))
        y += self.m(self.short(x))
        return self.head(F.relu(y).mean((2, 3)))


def test_the_shortcut_goes_first_and_the_branch_takes_its_error_back() -> None:
    """All linear; the shortcut loses inputs, and the branch has room to give what it lost."""
    model = lively(Block(), images())
    seen: list[str] = []
    before, after, _ = planted(model, images(), {"stem": [0], "a": [0]}, tell=seen.append)
    names = [line.rpartition(" ")[2] for line in seen]
    assert names == ["stem.weight", "a.weight", "short.weight", "b.weight", "head.weight"]
    assert before > 0.2
    assert after < 0.5 * before


NORMS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "norm, bias": (nn.BatchNorm2d, True), "norm": (nn.BatchNorm2d, False), "bias": (lambda n: nn.Identity(), True),
    "norm without weights": (lambda n: nn.BatchNorm2d(n, affine=False), False),
    "norm without weights, bias": (lambda n: nn.BatchNorm2d(n, affine=False), True),
    "group norm": (lambda n: nn.GroupNorm(2, n), True),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_constant_channel_goes_into_the_bias(name: str) -> None:
    norm, bias = NORMS[name]
    model = lively(Chain(norm, bias, kernel=1), images())
    with torch.no_grad():
        model.n1.weight[[2, 6]], model.n1.bias[[2, 6]] = 0.0, torch.tensor([2.0, 3.0]).double()
    before, after, _ = planted(model, images(), {"a": [2, 6]})
    assert before > 0.1
    assert after < 1e-6


def test_without_bias_and_norm_what_is_left_is_least() -> None:
    """Nothing can take a constant: the other channels do what they can, and nothing is invented."""
    model = lively(Chain(lambda n: nn.Identity(), False, kernel=1), images())
    with torch.no_grad():
        model.n1.weight[2], model.n1.bias[2] = 0.0, 2.0
    before, after, sliced = planted(model, images(), {"a": [2]})
    assert sliced.b.bias is None
    assert 1e-3 < after < 0.7 * before


@pytest.mark.parametrize("single", [False, True])
def test_statistics_become_those_of_what_norms_read(single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train mode on the calibration data gives what eval mode does; eval mode gives what it gave without."""
    model, x = lively(Block(), images()), images()
    if single:
        model, x = model.float(), x.float()
    groups = groups_of(model, x[:2])
    keep = without(groups, {"stem": [0], "a": [0, 1]})
    refitted, plain = (slice_class(model, groups, keep, REGISTRY) for _ in range(2))
    reconstruct(refitted, groups, keep, x)
    monkeypatch.setattr(landing.Norm, "restate", lambda self, values: None)
    reconstruct(plain, groups, keep, x)
    assert far(refitted, plain, x) < (1e-5 if single else 1e-12)
    measured = copy.deepcopy(refitted).train()
    for norm in (measured.n, measured.m):
        norm.momentum = 1.0
    measured(x)
    for name in ("n", "m"):
        for statistic in ("running_mean", "running_var"):
            mine, want, old = (getattr(getattr(net, name), statistic) for net in (refitted, measured, plain))
            assert torch.allclose(mine, want, rtol=1e-4, atol=1e-5), (name, statistic)
            assert not torch.allclose(old, want, rtol=1e-2), (name, statistic)
    assert refitted.n.bias.requires_grad


def test_statistics_of_little_data_are_left() -> None:
    model, x = lively(Block(), images()), images(2)
    groups = groups_of(model, x)
    keep = without(groups, {"a": [0]})
    refitted = slice_class(model, groups, keep, REGISTRY)
    reconstruct(refitted, groups, keep, x)
    assert torch.equal(refitted.m.running_var, model.m.running_var)


def test_few_images_are_not_fitted_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 images for 64 inputs of a linear layer: fitted to the letter, others come out worse than need be."""
    model = lively(nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(),
                                 nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 8)))
    groups = groups_of(model, images(2))
    keep = without(groups, {"0": [0, 3], "4": range(8), "6": range(5)})
    others = images(300)[100:]

    def error() -> float:
        sliced = slice_class(model, groups, keep, REGISTRY)
        reconstruct(sliced, groups, keep, images(12), passes=0)
        return far(sliced, model, others)
    before, careful = far(slice_class(model, groups, keep, REGISTRY), model, others), error()
    monkeypatch.setattr(module, "HELD", 10**6)
    assert careful < 0.95 * error() < before


# ---- every kind of network -------------------------------------------------------------------------------


class Shared(nn.Module):
    """A module called twice, a weight used by two layers, and plain ones between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.a(x))))))
        x = F.relu(F.linear(F.relu(self.b(x)), self.b.weight))
        return self.c(x)


class Groups3(nn.Module):
    """Grouped, depthwise and strided convolutions; a residual one with a batch norm in front of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 24, 3, 1, 1, groups=3, bias=False)
        self.n, self.d = nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False)
        self.m, self.e = nn.BatchNorm2d(24), nn.Conv2d(24, 24, 1)
        self.c = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.n(self.b(F.relu(self.a(x)))))
        x = F.relu6(self.m(self.d(x)))
        x = x + self.e(x)
        return self.c(x.mean((2, 3)))


class Frozen(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.n1.requires_grad_(False)
        self.b.requires_grad_(False)


class Vit(nn.Module):
    """Patches, positions, two encoder layers (packed weights of attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.place = nn.Parameter(torch.zeros(1, 9, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=first)
                                    for first in (True, False))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Gpt(nn.Module):
    """Tokens, causal attention with packed q, k, v, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        q, k, v = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b, self.c = nn.Linear(6, 9), nn.LSTM(9, 8, batch_first=True), nn.Linear(8, 7), \
            nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, (h, _) = self.lstm(F.relu(self.a(x)))
        return self.c(F.relu(self.b(x[:, -1] + h[0])))


class Two(nn.Module):
    """Two inputs, two outputs, one of them from in between; an addition that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.mid, self.gate = nn.Linear(6, 10), nn.Linear(4, 10), nn.Linear(10, 9), \
            nn.Linear(4, 9)
        self.out, self.other = nn.Linear(9, 3), nn.Linear(10, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.left(left) + self.right(right))
        y = F.relu(self.gate(right[:, None]) + self.mid(x[:, None] * torch.tensor([[1.0], [2], [3]]).to(x)))
        return {"out": self.out(y), "other": self.other(x)}


class Written(nn.Module):
    """Sizes in the forward: a rewritten graph module is returned, whose convolution has 3 axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 8, 3, padding="same"), nn.Conv1d(8, 8, 4, padding="same"), \
            nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.b(F.relu_(self.a(x))))
        return self.c(x.view(-1, 96))


def tokens() -> Tensor:
    return torch.randint(0, 11, (40, 7), generator=torch.Generator().manual_seed(0))


def rows(*shape: int) -> Tensor:
    return torch.randn(60, *shape, generator=torch.Generator().manual_seed(2)).double()


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "shared": (Shared, lambda: rows(6)), "groups": (Groups3, images), "frozen": (Frozen, images),
    "vit": (Vit, images), "gpt": (Gpt, tokens), "lstm": (Recurrent, lambda: rows(5, 6)),
    "two": (Two, lambda: (rows(6), rows(4))), "dict": (Two, lambda: {"left": rows(6), "right": rows(4)}),
    "written": (Written, lambda: rows(3, 12)), "stream": (Block, images),
    "volume": (lambda: nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 6, 2), nn.Flatten(),
                                     nn.Linear(48, 4)), lambda: rows(2, 3, 3, 3)),
}


def outputs(model: nn.Module, data: Any) -> Tensor:
    with torch.no_grad():
        found = model(**data) if isinstance(data, dict) else model(*data) if isinstance(data, tuple) else model(data)
    return torch.cat([leaf.flatten(1) for leaf in torch.utils._pytree.tree_leaves(found)], 1)


def few(data: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t[:2], data)


def cast(data: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, data)


def refit(model: nn.Module, data: Any, seed: int = 3) -> tuple[Any, Any, Reconstruction]:
    """(as sliced, refitted, what was said)."""
    groups = groups_of(model, few(data))
    keep = random_choice(groups, seed, 0.5)
    assert not bool(keep.all())
    made = cut(model, groups, keep).model
    before = copy.deepcopy(made)
    return before, made, reconstruct(made, groups, keep, [data])


@pytest.mark.parametrize("kind", KINDS)
def test_every_layers_error_falls_and_the_outputs_come_closer(kind: str) -> None:
    build, data = KINDS[kind][0], KINDS[kind][1]()
    model = lively(build())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sliced, refitted, said = refit(model, data)
    assert said.notes == ()
    assert said.images == len(torch.utils._pytree.tree_leaves(data)[0])
    assert all(one.after <= one.before for one in said.layers)
    assert any(one.after < 0.9 * one.before for one in said.layers)
    dense = outputs(model, data)
    distance = [float((outputs(net, data) - dense).norm()) for net in (sliced, refitted)]
    assert distance[1] < 0.9 * distance[0]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert type(refitted).__mro__[1:] == type(sliced).__mro__[1:]
    assert not refitted.training
    for (name, old), (other, new) in zip(sliced.named_parameters(), refitted.named_parameters(), strict=True):
        assert (name, old.shape, old.dtype, old.requires_grad) == (other, new.shape, new.dtype, new.requires_grad)
        assert bool(new.isfinite().all())
        assert new.grad is None
    again = refit(model, data)[1]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), refitted.state_dict().values(),
                                                strict=True))


def test_layers_with_weights_of_their_own_are_refitted_and_no_others() -> None:
    assert {kind: tuple(one.layer for one in refit(lively(KINDS[kind][0]()), KINDS[kind][1]())[2].layers)
            for kind in ("shared", "gpt", "lstm", "groups")} == {
        "shared": ("a.weight", "c.weight"),
        "gpt": ("qkv.weight", "out.weight", "up.weight", "down.weight"),
        "lstm": ("a.weight", "b.weight", "c.weight"),
        "groups": ("a.weight", "b.weight", "d.weight", "e.weight", "c.weight")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_that_and_errors_fall(dtype: torch.dtype) -> None:
    """Errors are those of the weights as they are stored; sums are not taken in half precision."""
    model = lively(Chain(), images()).to(dtype)
    data = images(300).to(dtype) * 3
    groups = groups_of(model, data[:2])
    keep = without(groups, {"a": [0, 1, 2]})
    sliced = slice_class(model, groups, keep, REGISTRY)
    before = far(sliced, model, data)
    said = reconstruct(sliced, groups, keep, data)
    assert all(one.after <= one.before for one in said.layers)
    assert {p.dtype for p in sliced.parameters()} == {dtype}
    assert far(sliced, model, data) < 0.7 * before


def test_errors_are_those_of_weights_as_they_are_stored() -> None:
    """A channel that exists twice: what is left is rounding, to 8 bits."""
    model = lively(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)))
    with torch.no_grad():
        for tensor in model[0].parameters():
            tensor[1] = tensor[0]
    model, x = model.bfloat16(), rows(6).bfloat16()
    groups = groups_of(model, x[:2])
    keep = without(groups, {"0": [1]})
    sliced = slice_class(model, groups, keep, REGISTRY)
    said = reconstruct(sliced, groups, keep, x, ridge=1e-6)
    with torch.no_grad():
        read, target = sliced[1](sliced[0](x)).double(), model(x).double()
        given = read @ sliced[2].weight.double().T + sliced[2].bias.double()
    want = (given - target).square().mean(0).sum() / target.var(0, correction=0).sum()
    assert said.layers[-1].after == pytest.approx(float(want), rel=0.1)      # sums are of single precision
    assert said.layers[-1].after < 1e-4 < said.layers[-1].before


@pytest.mark.parametrize("held", [4, 10**6])
def test_wide_layers_are_solved_by_their_rows(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as with all products of inputs, without ever holding these."""
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)))
    x = images(100)
    monkeypatch.setattr(module, "HELD", held)
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 1)
    groups = groups_of(model, x[:2])
    keep = without(groups, {"0": [1, 2]})
    made = [slice_class(model, groups, keep, REGISTRY) for _ in range(2)]
    monkeypatch.setattr(leastsquares, "COLUMNS", 50)
    reconstruct(made[0], groups, keep, x)
    monkeypatch.setattr(module, "Rows", leastsquares.Moments)
    reconstruct(made[1], groups, keep, x)
    assert torch.allclose(made[0][3].weight, made[1][3].weight, atol=1e-7)
    assert torch.allclose(made[0][3].bias, made[1][3].bias, atol=1e-7)
    assert far(made[0], model, x) < 0.6 * far(slice_class(model, groups, keep, REGISTRY), model, x)


def test_wide_layers_look_at_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDEST", 20)
    monkeypatch.setattr(module, "FEW", 16)
    seen: list[int] = []
    add = leastsquares.Rows.add
    monkeypatch.setattr(leastsquares.Rows, "add", lambda self, x, t: (seen.append(len(x)), add(self, x, t))[1])
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)))
    groups = groups_of(model, images(2))
    keep = without(groups, {"0": [1, 2]})
    reconstruct(slice_class(model, groups, keep, REGISTRY), groups, keep, images(12))
    assert sum(seen) == 24 + 12             # two pixels of each image; all there are of a linear layer


# ---- data, memory, what cannot be followed -----------------------------------------------------------------


def test_memory_is_respected_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = lively(Block(), images()), images(200)
    groups = groups_of(model, x[:2])
    keep = without(groups, {"stem": [0]})
    walkers: list[Walker] = []
    peak = [0]

    class Watched(Walker):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            walkers.append(self)

        def run(self, node: Any) -> None:
            super().run(node)
            held = {value.data_ptr(): value.numel() * value.element_size() for walker in walkers
                    for node, values in walker._values.items() if node.op == "call_function" for value in values
                    if isinstance(value, Tensor)}
            peak[0] = max(peak[0], sum(held.values()))
    monkeypatch.setattr(module, "Walker", Watched)
    said = reconstruct(slice_class(model, groups, keep, REGISTRY), groups, keep, x.split(16), memory=5e5, passes=0)
    assert 20 < said.images < 200
    assert said.notes == (f"reconstruction used {said.images} images: the activations of more do not fit into "
                          "0.0005 GB",)
    assert 1e5 < peak[0] <= 5e5
    said = reconstruct(slice_class(model, groups, keep, REGISTRY), groups, keep, x.split(16), images=40)
    assert (said.images, said.notes) == (40, ())
    assert "5 layers refitted on 40 images" in str(said)


def test_labels_are_ignored_and_generators_do() -> None:
    model, x = lively(Block(), images()), images()
    groups = groups_of(model, x[:2])
    keep = without(groups, {"stem": [0]})

    def batches() -> Iterator[Any]:
        for part in x.split(16):
            yield part, torch.zeros(len(part), dtype=torch.long)
    made = [slice_class(model, groups, keep, REGISTRY) for _ in range(3)]
    reconstruct(made[0], groups, keep, batches())
    reconstruct(made[1], groups, keep, list(x.split(16)))
    reconstruct(made[2], groups, keep, list(x.split(16)), rows=100, seed=1)
    assert torch.equal(made[0].b.weight, made[1].b.weight)
    assert not torch.equal(made[0].b.weight, made[2].b.weight)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(3, 9) + torch.zeros(3, 1))


def test_a_network_of_fixed_batch_size_gets_whole_batches() -> None:
    model = lively(Fixed())
    groups = groups_of(model, rows(6)[:3])
    keep = without(groups, {"a": [0, 1]})
    said = reconstruct(slice_class(model, groups, keep, REGISTRY), groups, keep, list(rows(6).split(3)), images=10)
    assert said.images == 12
    assert said.layers[1].after < said.layers[1].before


class Writes(nn.Module):
    """A forward that writes through a view of what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, :2].mul_(3).relu_()
        return self.b(x)


def test_writes_through_views_are_noticed() -> None:
    model = lively(Writes())
    groups = groups_of(model, rows(6)[:2])
    keep = without(groups, {"a": [5]})
    sliced = slice_class(model, groups, keep, REGISTRY)
    before = copy.deepcopy(sliced.state_dict())
    said = reconstruct(sliced, groups, keep, rows(6))
    assert said.layers == ()
    assert any("writes into parts of tensors" in note for note in said.notes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sliced.state_dict().items())


def test_activations_that_are_no_numbers_leave_the_weights_alone() -> None:
    model, x = lively(Chain(), images()), images()
    x[0, 0, 0, 0] = torch.inf
    groups = groups_of(model, x[1:3])
    keep = without(groups, {"a": [0]})
    sliced = slice_class(model, groups, keep, REGISTRY)
    before = copy.deepcopy(sliced.state_dict())
    reconstruct(sliced, groups, keep, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sliced.state_dict().items())


@pytest.mark.parametrize("options", [{"images": 0}, {"rows": -1}, {"ridge": -0.1}, {"ridge": float("nan")},
                                     {"memory": 0}, {"passes": -1}, {"work": float("nan")}])
def test_options_that_make_no_sense_are_told(options: dict[str, Any]) -> None:
    model = lively(Fixed())
    groups = groups_of(model, rows(6)[:3])
    with pytest.raises(InputError, match=f"reconstruct: {next(iter(options))} is"):
        reconstruct(model, groups, groups.everything(), rows(6), **options)
    with pytest.raises(InputError, match="calibration batch 0"):
        reconstruct(model, groups, groups.everything(), rows(5))


def test_through_prune() -> None:
    model, x = lively(Block(), images()), images()
    plain = prune(model, x[:2], Target(macs=0.6))
    refitted = prune(model, x[:2], Target(macs=0.6), calibrate=x, reconstruct=True)
    assert far(refitted.model, model, x) < 0.8 * far(plain.model, model, x)


def test_everything_works_in_inference_mode() -> None:
    """Planes and data made there are inference tensors, which autograd does not save."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    with torch.inference_mode():
        result = pk.compress(model, torch.randn(2, 3, 8, 8), calibrate=torch.randn(48, 3, 8, 8), lower=False)
    assert any("weights refitted" in note for note in result.notes)
    result.model.train()(torch.randn(4, 3, 8, 8)).sum().backward()
