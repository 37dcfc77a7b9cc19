"""What users may ask the CPU engine to round: weights to fp16, operands to bf16. Held tightly to fp64 arithmetic on
operands rounded by torch, so nothing but that rounding happens; and loosely to the network itself, by ``lower``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.backends import lower
from prunekern.backends.cpu import bands, bf16
from prunekern.backends.cpu.native import instruction_sets, isa
from prunekern.errors import BackendUnavailable, InputError, UnknownName
from prunekern.lower.tolerance import error
from tests.weights import randomise_

if not instruction_sets():
    pytest.skip("the extension is not built", allow_module_level=True)

MISSING = bf16.unavailable()
needs_bf16 = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
TIGHT = 3e-6                       # fp32 sums
ROUND: dict[str, Callable[[Tensor], Tensor]] = {"fp16": lambda t: t.half().to(t), "bf16": lambda t: t.bfloat16().to(t)}
OPTIONS: dict[str, dict[str, str]] = {"fp16": {"weights": "fp16"}, "bf16": {"dtype": "bf16"}}
KINDS = ["fp16", pytest.param("bf16", marks=needs_bf16)]

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(64, 48), (4, 64)),
    "linear, odd": (nn.Linear(63, 47), (5, 63)),
    "linear of one": (nn.Linear(1, 3, bias=False), (2, 1)),
    "linear, deep": (nn.Linear(2301, 5), (3, 2301)),
    "linear of sequences": (nn.Linear(20, 33), (2, 3, 5, 20)),
    "3x3": (nn.Conv2d(16, 32, 3, padding=1), (2, 16, 9, 11)),
    "3x3, odd": (nn.Conv2d(13, 37, 3, 2, (2, 1)), (3, 13, 8, 7)),
    "3x3 of one channel": (nn.Conv2d(1, 5, 3, padding=1), (2, 1, 6, 6)),
    "1x1": (nn.Conv2d(48, 80, 1, bias=False), (1, 48, 7, 7)),
    "1x1, strided": (nn.Conv2d(8, 3, 1, 2), (2, 8, 7, 9)),
    "dilated": (nn.Conv2d(6, 16, (3, 2), dilation=2, padding=2), (1, 6, 9, 9)),
    "grouped": (nn.Conv2d(8, 24, 3, padding=1, groups=4), (2, 8, 6, 6)),
    "1d": (nn.Conv1d(7, 16, 5, padding=2), (2, 7, 19)),
    "3d": (nn.Conv3d(4, 9, 3, 2, 1), (2, 4, 5, 6, 7)),
    "many rows": (nn.Conv2d(32, 16, 3, padding=1), (2, 32, 40, 40)),
}


def lowered(model: nn.Module, x: Tensor, kind: str, **more: Any) -> Any:
    return lower(model, x, backend="cpu", **{"tune": "off", "num_threads": 1, **OPTIONS[kind], **more})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_rounds_its_operands_once_and_nothing_else(name: str, kind: str, threads: int) -> None:
    layer, shape = LAYERS[name]
    model = randomise_(nn.Sequential(copy.deepcopy(layer), nn.ReLU())).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = lowered(model, x, kind, algorithms=_gemm(model) if kind == "fp16" else {}, num_threads=threads)
    exact = copy.deepcopy(model).double()
    exact[0].weight.data = ROUND[kind](model[0].weight.data).double()
    given = ROUND[kind](x) if kind == "bf16" else x
    with torch.no_grad():
        assert error(ours(x), exact(given.double())) < TIGHT
        assert error(ours(x), copy.deepcopy(model).double()(x.double())) > 2 * TIGHT       # it did round


def _gemm(model: nn.Module) -> dict[str, str]:
    """The algorithm whose weights fp16 concerns, for the first convolution."""
    first = next(model.children())
    return {f"conv{first.weight.dim() - 2}d": "implicit GEMM"} if first.weight.dim() > 2 else {}


def network() -> nn.Module:
    """Halos of several widths at one value, a residual, layers that stay fp32, odd channels, an image made flat."""
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(13, 18, 5, padding=2), nn.Conv2d(13, 18, 1)
            self.depthwise, self.back = nn.Conv2d(18, 18, 3, padding=1, groups=18), nn.Conv2d(18, 13, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.depthwise(torch.relu(self.wide(x) + self.narrow(x)))
            return torch.relu(self.back(y) + x)
    return nn.Sequential(nn.Conv2d(3, 13, 3, padding=1), nn.BatchNorm2d(13), nn.SiLU(), Block(), nn.MaxPool2d(2),
                         nn.ConvTranspose2d(13, 11, 2, 2), nn.Flatten(), nn.Linear(11 * 64, 31), nn.Tanh(),
                         nn.Linear(31, 10))


@pytest.mark.parametrize("more", [{}, {"tune": "quick", "num_threads": 2}], ids=["guessed", "tuned"])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_verified_within_the_row_of_their_precision(kind: str, batch: int, more: dict[str, Any],
                                                                 tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, x = randomise_(network()).eval(), torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    ours = lowered(model, x, kind, **more)
    with torch.no_grad():
        assert 1e-5 < error(ours(x), copy.deepcopy(model).double()(x.double())) < {"fp16": 2e-3, "bf16": 2e-2}[kind]


@needs_bf16
def test_the_tuner_has_bf16_to_choose_only_where_it_is_asked_for(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(64, 256, 1), nn.ReLU(), nn.Conv2d(256, 256, 1)).eval()
    x = torch.randn(1, 64, 28, 28)
    for options, expected in (({"dtype": "bf16"}, True), ({}, False)):
        ours = lower(model, x, backend="cpu", tune="quick", num_threads=1, **options)
        assert ("bf16 GEMM" in str(ours.explain())) is expected


@needs_bf16
@pytest.mark.parametrize("broken", [False, True])
def test_what_is_tuned_is_held_to_plain_products_in_its_own_precision(broken: bool, tmp_path: Any, monkeypatch: Any,
                                                                      caplog: Any) -> None:
    """A network that amplifies rounding: a large constant between its layers, which the second one takes away."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, x = nn.Sequential(nn.Conv2d(24, 24, 3), nn.Conv2d(24, 24, 1)).eval(), torch.randn(1, 24, 6, 6)
    first, second = model
    torch.nn.init.constant_(first.bias, 30.0)
    second.weight.data -= second.weight.data.mean(1, keepdim=True)
    with torch.no_grad():
        narrow = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert error(narrow, copy.deepcopy(model).double()(x.double())) > 2e-2
    if broken:
        pairs = bf16.pairs
        monkeypatch.setattr(bf16, "pairs", lambda values: pairs(values.roll(1, -1)))
    algorithms = {"conv2d": "bf16 GEMM", "conv2d_1": "bf16 GEMM"}
    lowered(model, x, "bf16", tune="quick", verify=False, algorithms=algorithms)(x)
    assert ("guesses" in caplog.text) is broken


class Inverted(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(13, 45, 1), nn.Conv2d(45, 13, 1)
        self.middle, self.stride = nn.Conv2d(45, 45, 3, stride, 1, groups=45), stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(torch.relu(self.middle(torch.relu(self.expand(x)))))
        return x + y if self.stride == 1 else torch.relu(y)


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_bands_round_what_whole_layers_round(stride: int, threads: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(bands, "BYTES", 16 << 10)       # several bands
    model = randomise_(nn.Sequential(nn.Conv2d(3, 13, 1), Inverted(stride))).eval()
    x = torch.randn(3, 3, 19, 17, generator=torch.Generator().manual_seed(3))
    whole, banded = (lowered(model, x, "bf16", num_threads=threads, algorithms={"conv2d_1": name})
                     for name in ("bf16 GEMM", "bf16 in bands"))
    assert str(banded.explain()).count("within conv2d_1") == 2
    with torch.no_grad():
        assert error(banded(x), whole(x)) < TIGHT


@needs_bf16
def test_what_is_not_a_number_stays_so() -> None:
    model = nn.Sequential(nn.Conv2d(5, 16, 3, padding=1)).eval()
    x = torch.randn(1, 5, 8, 8)
    ours = lowered(model, x, "bf16")
    x[0, 2, 3, 4] = float("nan")
    with torch.no_grad():
        assert torch.equal(ours(x).isnan(), model(x).isnan())
        x[0, 2, 3, 4] = float("inf")
        assert torch.equal(ours(x).isinf(), model(x).isinf())


@pytest.mark.parametrize(("scale", "told"), [(1e7, True), (1e-6, True), (0.0, False), (1.0, False), (1e-3, False)])
def test_weights_beyond_fp16_stay_fp32_and_it_is_said(scale: float, told: bool) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 4)).eval()
    for layer in (model[0], model[2]):
        layer.weight.data *= scale
    x = torch.randn(2, 8, 6, 6)
    ours = lowered(model, x, "fp16", algorithms=_gemm(model))
    assert str(ours.explain()).count("fp32 weights (beyond the range of fp16)") == 2 * told


@needs_bf16
def test_pairs_of_channels_do_not_reach_across_groups() -> None:
    model = nn.Conv2d(6, 8, 3, groups=2).eval()
    ours = lowered(model, torch.randn(1, 6, 7, 7), "bf16")
    assert "bf16" not in str(ours.explain())


def test_bf16_is_refused_where_the_instruction_set_has_none(monkeypatch: Any) -> None:
    monkeypatch.setenv("PRUNEKERN_ISA", "portable")
    assert isa().name == "portable"
    with pytest.raises(BackendUnavailable, match="portable, has no bf16"):
        lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), backend="cpu", dtype="bf16")


def test_wrong_precisions_are_refused() -> None:
    model, x = nn.Linear(2, 2).eval(), torch.randn(1, 2)
    with pytest.raises(InputError, match="leave weights"):
        lower(model, x, backend="cpu", dtype="bf16", weights="fp16")
    with pytest.raises(UnknownName, match="bf16"):
        lower(model, x, backend="cpu", dtype="fp8")
    with pytest.raises(UnknownName, match="dtype"):
        lower(model, x, backend="reference", dtype="bf16")
