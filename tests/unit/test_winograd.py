"""Winograd's convolution of the C++ engine: every geometry, epilogue and instruction set, against fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunekern import kernels
from prunekern.backends.base import Signature
from prunekern.backends.cpu import COMPILERS, CpuPlacement
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.layout import Settings
from prunekern.backends.cpu.native import Isa, extension, isa
from prunekern.backends.cpu.winograd import POINTS, takes, transform, weight_matrix
from prunekern.core.activations import apply
from prunekern.core.graph import Dim
from prunekern.core.program import Activation, Epilogue, Program, Slot, Step
from prunekern.lower.tolerance import error, limit

needs_cpp = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))
ISAS: list[str] = extension().instruction_sets() if kernels.unavailable() is None else ["none"]
RELU, CLAMP = Activation("relu"), Activation("clamp", (-0.4, 0.7))


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    outputs: int
    height: int
    width: int
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    activation: Activation | None = None
    bias: bool = False
    residual: str = ""             # "", first or last
    threads: int = 1


CASES = [
    Case(1, 1, 1, 3, 3, ((0, 0), (0, 0))),
    Case(1, 1, 1, 1, 1),
    Case(2, 3, 13, 17, 5, bias=True, activation=RELU),
    Case(3, 13, 37, 9, 20, ((2, 0), (1, 2)), bias=True, residual="first", activation=RELU),
    Case(1, 37, 1, 6, 7, residual="last", activation=CLAMP),
    Case(5, 16, 16, 4, 4, bias=True, activation=Activation("gelu")),
    Case(2, 17, 31, 12, 12, ((0, 0), (0, 0)), residual="last", activation=Activation("silu"), bias=True),
    Case(2, 8, 77, 5, 11, residual="first", activation=Activation("leaky_relu", (0.1,))),
    Case(1, 45, 130, 8, 8, ((2, 2), (2, 2)), residual="first", bias=True),
    Case(1, 64, 200, 7, 7, threads=2, residual="last", activation=RELU),
    Case(4, 32, 48, 32, 32, threads=2, bias=True, activation=RELU),      # several blocks of tiles
    Case(1, 128, 256, 6, 6, threads=4),                                  # few tiles: strips of outputs
]


def one_step(case: Case, weight: Tensor, bias: Tensor | None) -> Program:
    """A Program of one `conv`, with the case's epilogue."""
    (top, bottom), (left, right) = case.padding
    out = (case.height + top + bottom - 2, case.width + left + right - 2)
    n = Dim(1, 0)
    x = Slot("x", (n, *(Dim(0, size) for size in (case.channels, case.height, case.width))), torch.float32)
    y, r = (Slot(name, (n, *(Dim(0, size) for size in (case.outputs, *out))), torch.float32) for name in "yr")
    epilogue = Epilogue("bias" if bias is not None else None, case.activation, r if case.residual else None,
                        case.residual == "last")
    step = Step("conv", "conv", (x,), (y,), {"kernel": [3, 3], "stride": [1, 1], "dilation": [1, 1], "groups": 1,
                                             "padding": [list(side) for side in case.padding]},
                {"weight": "weight"}, epilogue)
    weights = {"weight": weight, **({"bias": bias} if bias is not None else {})}
    program = Program((step,), weights, (x, r) if case.residual else (x,), (y,), None, None)
    program.check()
    return program


def check(case: Case, algorithm: str, settings: Settings) -> None:
    generator = torch.Generator().manual_seed(case.height * 100 + case.width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)
    weight = draw(case.outputs, case.channels, 3, 3) * (9 * case.channels) ** -0.5
    bias = draw(case.outputs) if case.bias else None
    program = one_step(case, weight, bias)
    inputs = [draw(*slot.at(case.batch)) for slot in program.input_slots]
    settings = replace(settings, threads=case.threads, choices={"conv": algorithm})
    placement = CpuPlacement(program, Signature(tuple(tuple(x.shape) for x in inputs), case.batch, inputs[0].device),
                             settings, COMPILERS, {})
    assert placement.algorithms == {"conv": algorithm}
    (got,) = placement.run(inputs)
    exact, own = (definition(case, [x.to(dtype) for x in inputs], weight.to(dtype),
                             None if bias is None else bias.to(dtype)) for dtype in (torch.float64, torch.float32))
    assert error(got, exact) <= limit(error(own, exact), torch.float32, algorithm), case


def definition(case: Case, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    (top, bottom), (left, right) = case.padding
    y = F.conv2d(F.pad(inputs[0], (left, right, top, bottom)), weight, bias)
    if case.residual == "first":
        y = y + inputs[1]
    if case.activation is not None:
        y = apply(case.activation.kind, case.activation.constants, y)
    return y + inputs[1] if case.residual == "last" else y


@pytest.fixture(params=ISAS)
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PRUNEKERN_ISA", request.param)
    found: Isa = isa()
    return Settings(found, 1)


@needs_cpp
@pytest.mark.parametrize("m", POINTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: Case, m: int, settings: Settings) -> None:
    check(case, f"winograd {m}x{m}", settings)


@needs_cpp
@pytest.mark.parametrize("m", POINTS)
def test_every_size_and_padding(m: int, settings: Settings) -> None:
    """All ways in which the last tile of a row or a column can stick out."""
    for size, low, high in product(range(1, 14), range(3), range(3)):
        if size + low + high >= 3:
            other = 14 - size
            padding = ((low, high), (1, 1))
            check(Case(1 + size % 2, 5, 6, size, other, padding), f"winograd {m}x{m}", settings)
            check(Case(1, 3, 2, other, size, padding[::-1]), f"winograd {m}x{m}", settings)


@needs_cpp
@pytest.mark.parametrize("m", POINTS)
def test_not_a_number_stays_one(m: int) -> None:
    """Wherever torch has one; it may reach the other outputs of those tiles too, and nothing further."""
    case = Case(1, 4, 4, 16, 16, activation=RELU)
    program = one_step(case, torch.randn(4, 4, 3, 3), None)
    x = torch.randn(1, 4, 16, 16)
    x[0, 2, 9, 9] = torch.nan
    settings = Settings(isa(), 1, {"conv": f"winograd {m}x{m}"})
    (y,) = CpuPlacement(program, Signature((tuple(x.shape),), 1, x.device), settings, COMPILERS, {}).run([x])
    assert y[:, :, 8:11, 8:11].isnan().all()
    assert not y[:, :, :4].isnan().any()
    assert not y[:, :, 12:].isnan().any()


@pytest.mark.parametrize("m", POINTS)
def test_weights_are_transformed_by_lagrange(m: int) -> None:
    """sum_t A^T[i, t] B^T[t, j] G[t, k] is 1 where j = i + k, else 0, with A^T the powers of the points."""
    g = weight_matrix(m)
    points = torch.tensor(POINTS[m], dtype=torch.float64)
    a = torch.cat([points.pow(torch.arange(m).unsqueeze(1)), F.one_hot(torch.tensor([m - 1]), m).T], 1)
    # A polynomial of degree m + 1 (the product of one with m and one with 3 coefficients) is its values at the points
    # and its leading coefficient: B^T is what takes these back to coefficients, up to the scales in G.
    inverse = torch.cat([points.pow(torch.arange(m + 2).unsqueeze(1)).T,
                         F.one_hot(torch.tensor([m + 1]), m + 2)]).inverse().T
    scales = torch.stack([torch.stack([p - q for q in points if q != p]).prod() for p in points] + [torch.tensor(1.0)])
    sign = torch.tensor([-1.0 if m == 2 and t == 0 else 1.0 for t in range(m + 2)])
    b = inverse * (scales * sign).unsqueeze(1)
    identity = torch.einsum("it,tj,tk->ijk", a, b, g)
    expected = torch.stack([torch.eye(m + 2, 3).roll(i, 0) for i in range(m)]).double()
    torch.testing.assert_close(identity, expected, atol=1e-12, rtol=0)
    weight = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(transform(weight, m).view(m + 2, m + 2, 2, 5)[-1, -1], weight[:, :, 2, 2])


@pytest.mark.parametrize("change", [{"kernel": (5, 5)}, {"stride": (2, 1)}, {"dilation": (1, 2)}, {"groups": 2},
                                    {"padding": ((-1, 0), (0, 0))}], ids=str)
def test_takes_nothing_else(change: dict[str, Any]) -> None:
    plain = Geometry(1, 4, 4, (8, 8), (8, 8), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1)
    assert takes(plain) is None
    assert takes(replace(plain, **change))
