"""Planar convolution and pooling of the C++ engine: every geometry, epilogue, arrangement and instruction set, against
fp64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunekern import kernels
from prunekern.backends.base import Signature
from prunekern.backends.cpu import COMPILERS, CpuPlacement
from prunekern.backends.cpu.layout import Settings
from prunekern.backends.cpu.native import Isa, extension, isa
from prunekern.backends.cpu.place import Form
from prunekern.backends.cpu.planar import blocks, pack, widest
from prunekern.core.activations import apply
from prunekern.core.graph import Dim
from prunekern.core.program import Activation, Epilogue, Program, Slot, Step
from prunekern.lower.tolerance import error, limit

needs_cpp = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))
ISAS: list[str] = extension().instruction_sets() if kernels.unavailable() is None else ["none"]
PIXELS, IMAGES = "planar", "planar by images"
FORMS = {PIXELS: Form.PLANAR, IMAGES: Form.IMAGES}
ACTIVATIONS = (None, Activation("relu"), Activation("clamp", (-0.4, 0.7)), Activation("silu"))
Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A convolution; ``pads`` are those of the rows and of the columns, before and after."""

    batch: int
    channels: int
    outputs: int
    size: Pair
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pads: tuple[Pair, Pair] = ((1, 1), (1, 1))
    groups: int = 1
    activation: Activation | None = None
    bias: bool = True
    residual: str = ""             # "", first or last
    threads: int = 1

    @property
    def out(self) -> Pair:
        rows, columns = ((n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, pad, d, k, s in
                         zip(self.size, self.pads, self.dilation, self.kernel, self.stride, strict=True))
        return rows, columns


CASES = [
    Case(1, 1, 1, (1, 1)),
    Case(1, 1, 1, (1, 1), (1, 1), pads=((0, 0), (0, 0))),
    Case(2, 1, 16, (28, 28), (5, 5), pads=((2, 2), (2, 2)), activation=Activation("relu")),
    Case(8, 9, 7, (14, 14), residual="first", activation=Activation("relu")),
    Case(1, 29, 37, (16, 16), threads=2),
    Case(3, 45, 45, (8, 8), residual="last", activation=Activation("silu"), threads=2),
    Case(1, 5, 19, (17, 30), stride=(2, 2), threads=2),
    Case(2, 13, 21, (9, 9), (1, 1), stride=(2, 2), pads=((0, 0), (0, 0))),
    Case(1, 3, 6, (30, 29), (7, 7), stride=(3, 2), pads=((3, 2), (0, 3))),
    Case(1, 4, 3, (5, 4), (1, 1), pads=((3, 3), (3, 3))),                   # more zeros than the window reaches
    Case(9, 6, 10, (7, 5), dilation=(2, 3), pads=((2, 2), (3, 3)), groups=2,
         activation=Activation("clamp", (0.0, 6.0))),
    Case(17, 8, 8, (6, 6), groups=8),
    Case(33, 2, 40, (4, 9), (2, 4), pads=((0, 1), (2, 1)), residual="first"),
]


def drawn(seed: int) -> Case:
    """A case at random; the window fits."""
    draw = random.Random(seed)

    def pair(low: int, high: int) -> Pair:
        return draw.randint(low, high), draw.randint(low, high)
    groups = draw.choice((1, 1, 1, 2, 3))
    case = Case(batch=draw.choice((1, 1, 2, 5, 8, 17)), channels=groups * draw.randint(1, 40 // groups),
                outputs=groups * draw.randint(1, 40 // groups), size=pair(1, 30),
                kernel=draw.choice(((3, 3), pair(1, 7))), stride=draw.choice(((1, 1), pair(1, 3))),
                dilation=draw.choice(((1, 1), pair(1, 3))), pads=(pair(0, 3), pair(0, 3)), groups=groups,
                activation=draw.choice(ACTIVATIONS), bias=draw.random() < 0.7,
                residual=draw.choice(("", "", "first", "last")), threads=draw.choice((1, 2)))
    return case if min(case.out) > 0 else drawn(seed + 1_000_003)


def one_step(case: Case, weight: Tensor, bias: Tensor | None) -> Program:
    n = Dim(1, 0)
    x = Slot("x", (n, *(Dim(0, size) for size in (case.channels, *case.size))), torch.float32)
    y, r = (Slot(name, (n, *(Dim(0, size) for size in (case.outputs, *case.out))), torch.float32) for name in "yr")
    epilogue = Epilogue("bias" if bias is not None else None, case.activation, r if case.residual else None,
                        case.residual == "last")
    attributes = {"kernel": list(case.kernel), "stride": list(case.stride), "dilation": list(case.dilation),
                  "padding": [list(pad) for pad in case.pads], "groups": case.groups}
    weights = {"weight": weight, **({"bias": bias} if bias is not None else {})}
    program = Program((Step("conv", "conv", (x,), (y,), attributes, {"weight": "weight"}, epilogue),), weights,
                      (x, r) if case.residual else (x,), (y,), None, None)
    program.check()
    return program


def place(program: Program, inputs: list[Tensor], settings: Settings) -> CpuPlacement:
    shapes = tuple(tuple(x.shape) for x in inputs)
    return CpuPlacement(program, Signature(shapes, inputs[0].shape[0], inputs[0].device), settings, COMPILERS, {})


def check(case: Case, algorithm: str, settings: Settings) -> None:
    torch.manual_seed(case.size[0] * 100 + case.size[1])
    each = case.channels // case.groups
    weight = torch.randn(case.outputs, each, *case.kernel) * (each * case.kernel[0] * case.kernel[1]) ** -0.5
    bias = torch.randn(case.outputs) if case.bias else None
    program = one_step(case, weight, bias)
    inputs = [torch.randn(slot.at(case.batch)) for slot in program.input_slots]
    placement = place(program, inputs, replace(settings, threads=case.threads, choices={"conv": algorithm}))
    assert placement.algorithms == {"conv": algorithm}
    placement.run(inputs)
    (got,) = placement.run(inputs)                      # again: what it wrote has left the halos as they were
    exact, own = (definition(case, [x.to(dtype) for x in inputs], weight.to(dtype),
                             None if bias is None else bias.to(dtype)) for dtype in (torch.float64, torch.float32))
    assert error(got, exact) <= limit(error(own, exact), torch.float32), case


def definition(case: Case, inputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    (top, bottom), (left, right) = case.pads
    y = F.conv2d(F.pad(inputs[0], (left, right, top, bottom)), weight, bias, case.stride, 0, case.dilation, case.groups)
    if case.residual == "first":
        y = y + inputs[1]
    if case.activation is not None:
        y = apply(case.activation.kind, case.activation.constants, y)
    return y + inputs[1] if case.residual == "last" else y


@pytest.fixture(params=ISAS)
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PRUNEKERN_ISA", request.param)
    return Settings(isa(), 1)


@needs_cpp
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: Case, settings: Settings) -> None:
    check(case, PIXELS, settings)
    if case.batch >= 8:
        check(case, IMAGES, settings)


@needs_cpp
@pytest.mark.parametrize("start", range(0, 120, 20))
def test_equals_the_definition_anywhere(start: int, settings: Settings) -> None:
    for seed in range(start, start + 20):
        case = drawn(seed)
        check(case, PIXELS, settings)
        if case.batch >= 8:
            check(case, IMAGES, settings)


@needs_cpp
def test_every_width(settings: Settings) -> None:
    """All ways in which registers end in rows and images."""
    for width in range(1, 35):
        check(Case(1 + width % 3, 3, 5, (1 + width % 5, width)), PIXELS, settings)
        check(Case(width + 7, 3, 5, (3, 2)), IMAGES, settings)


@needs_cpp
@pytest.mark.parametrize("algorithm", FORMS)
def test_every_number_of_channels(algorithm: str, settings: Settings) -> None:
    for outputs in range(1, 41):
        check(Case(8, 2, outputs, (4, 5), threads=1 + outputs % 2), algorithm, settings)


@needs_cpp
@pytest.mark.parametrize("algorithm", FORMS)
def test_halos_between_layers_stay_zero(algorithm: str, settings: Settings) -> None:
    """A layer whose result the next one pads more, and further on one side, than it was padded itself."""
    first, second = torch.randn(6, 3, 3, 3), torch.randn(4, 6, 5, 5)
    n, size = Dim(1, 0), (Dim(0, 7), Dim(0, 9))
    x, h, y = (Slot(name, (n, Dim(0, c), *size), torch.float32) for name, c in (("x", 3), ("h", 6), ("y", 4)))

    def conv(name: str, source: Slot, target: Slot, kernel: int, pad: list[int]) -> Step:
        return Step("conv", name, (source,), (target,), {
            "kernel": [kernel] * 2, "stride": [1, 1], "dilation": [1, 1], "padding": [pad, pad], "groups": 1},
            {"weight": name}, Epilogue())
    program = Program((conv("first", x, h, 3, [1, 1]), conv("second", h, y, 5, [1, 3])),
                      {"first": first, "second": second}, (x,), (y,), None, None)
    value = torch.randn(9, 3, 7, 9)
    placement = place(program, [value], replace(settings, choices=dict.fromkeys(("first", "second"), algorithm)))
    exact = F.conv2d(F.pad(F.conv2d(value.double(), first.double(), padding=1), (1, 3, 1, 3)), second.double())
    for _ in range(2):
        (got,) = placement.run([value])
        assert error(got, exact) < 5e-6


@needs_cpp
@pytest.mark.parametrize("algorithm", FORMS)
def test_not_a_number_stays_where_torch_has_it(algorithm: str, settings: Settings) -> None:
    case = Case(8, 4, 10, (12, 12), activation=Activation("relu"))
    x, weight = torch.randn(8, 4, 12, 12), torch.randn(10, 4, 3, 3)
    x[1, 2, 5, 11] = torch.nan
    x[3, 0, 0, 0] = torch.inf
    program = one_step(case, weight, torch.zeros(10))
    (got,) = place(program, [x], replace(settings, choices={"conv": algorithm})).run([x])
    expected = F.conv2d(x, weight, torch.zeros(10), padding=1).relu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())


# ---- pooling -----------------------------------------------------------------------------------------------------


def conv_and_pool(x: Tensor, weight: Tensor, bias: Tensor, average: bool, activation: Activation | None) -> Program:
    n, (outputs, channels), (height, width) = Dim(1, 0), weight.shape[:2], x.shape[2:]
    slots = [Slot(name, (n, *(Dim(0, size) for size in sizes)), torch.float32) for name, sizes in
             (("x", (channels, height, width)), ("h", (outputs, height, width)),
              ("y", (outputs, height // 2, width // 2)))]
    attributes = {"kernel": [3, 3], "stride": [1, 1], "dilation": [1, 1], "padding": [[1, 1], [1, 1]], "groups": 1}
    pool = {"kind": "avg" if average else "max", "kernel": [2, 2], "stride": [2, 2], "padding": [[0, 0], [0, 0]],
            "dilation": [1, 1], "ceil": False, "count_include_pad": True, "divisor": None}
    steps = (Step("conv", "conv", (slots[0],), (slots[1],), attributes, {"weight": "weight"},
                  Epilogue("bias", activation)), Step("pool", "pool", (slots[1],), (slots[2],), pool))
    return Program(steps, {"weight": weight, "bias": bias}, (slots[0],), (slots[2],), None, None)


def check_pool(batch: int, channels: int, size: Pair, average: bool, activation: Activation | None, algorithm: str,
               settings: Settings) -> str:
    """How the pooling ran."""
    torch.manual_seed(size[1])
    x, weight, bias = torch.randn(batch, channels, *size), torch.randn(7, channels, 3, 3) * 0.3, torch.randn(7)
    placement = place(conv_and_pool(x, weight, bias, average, activation), [x],
                      replace(settings, choices={"conv": algorithm}))

    def definition(dtype: torch.dtype) -> Tensor:
        y = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=1)
        if activation is not None:
            y = apply(activation.kind, activation.constants, y)
        return F.avg_pool2d(y, 2) if average else F.max_pool2d(y, 2)
    exact = definition(torch.float64)
    for _ in range(2):
        (got,) = placement.run([x])
        assert error(got, exact) <= limit(error(definition(torch.float32), exact), torch.float32), size
    seen: dict[str, int] = {}
    placement.run([x], lambda step, outputs, _: seen.update({step.name: len(outputs)}))
    how = placement.algorithms["pool"]
    assert seen == {"conv": 0 if how == "within conv" else 1, "pool": 1}
    return how


@needs_cpp
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("algorithm", FORMS)
def test_pooling_after_a_convolution(algorithm: str, average: bool, settings: Settings) -> None:
    ways = {check_pool(3 if algorithm == PIXELS else 7 + width, 1 + 3 * (width % 2), (2 + width % 7, width), average,
                       ACTIVATIONS[width % 3], algorithm, settings) for width in range(2, 37)}
    narrow = algorithm == PIXELS and settings.isa.lanes > 4          # registers that pairs of rows would leave empty
    assert ways == ({"within conv", "2x2"} if narrow else {"within conv"})


@needs_cpp
@pytest.mark.parametrize("average", [False, True])
def test_pooling_that_cannot_be_within(average: bool, settings: Settings) -> None:
    silu = Activation("silu")
    assert check_pool(2, 1, (28, 28), average, silu, PIXELS, settings) == "2x2"
    assert check_pool(16, 1, (8, 8), average, silu, IMAGES, settings) == "windows"


@needs_cpp
@pytest.mark.parametrize("algorithm", FORMS)
@pytest.mark.parametrize("channels", [1, 40])
def test_pooling_keeps_not_a_number(channels: int, algorithm: str, settings: Settings) -> None:
    x, weight = torch.randn(9, channels, 28, 28), torch.randn(7, channels, 3, 3)
    x[0, 0, 3, 5] = x[8, 0, 27, 27] = torch.nan
    program = conv_and_pool(x, weight, torch.zeros(7), False, Activation("relu"))
    (got,) = place(program, [x], replace(settings, choices={"conv": algorithm})).run([x])
    expected = F.max_pool2d(F.conv2d(x, weight, padding=1).relu(), 2)
    assert torch.equal(got.isnan(), expected.isnan())


# ---- packing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", range(1, 70))
def test_blocks_are_few_and_even(outputs: int) -> None:
    for most, groups in ((9, 1), (6, 1), (9, 3)):
        found = blocks(outputs * groups, groups, most)
        part = found[:len(found) // groups]
        assert found == part * groups
        assert sum(part) == outputs
        assert len(part) == -(-outputs // most)
        assert max(part) - min(part) <= 1


def test_packed_weights() -> None:
    weight = torch.arange(5 * 2 * 3.0).view(5, 2, 1, 3)
    first, second = pack(weight, [2, 3])[:30].split([12, 18])
    assert torch.equal(first.view(2, 1, 3, 2), weight[:2].permute(1, 2, 3, 0))
    assert torch.equal(second.view(2, 1, 3, 3), weight[2:].permute(1, 2, 3, 0))
    assert widest(Isa("avx512", 16, 4)) == 9
    assert widest(Isa("avx2", 8, 2)) == 6
