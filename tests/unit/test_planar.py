"""Planar convolution and pooling of the C++ engine: every geometry, epilogue, arrangement and instruction set, against
fp64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunekern import kernels
from prunekern.backends.base import Signature
from prunekern.backends.cpu import COMPILERS, CpuPlacement
from prunekern.backends.cpu.builder import Settings
from prunekern.backends.cpu.native import Field, Isa, NativeOp, Network, Recipe, extension, isa
from prunekern.backends.cpu.place import Form, Place, allocate
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


def given(value: Tensor, form: Form, halo: tuple[Pair, Pair]) -> tuple[Place, Tensor]:
    """A value in a buffer of its own."""
    spot = allocate(tuple(value.shape), form, halo)
    memory = torch.zeros(spot.buffer.floats + 16)
    memory.as_strided(value.shape, spot.view.stride(), int(spot.view.storage_offset())).copy_(value)
    return spot, memory


def run(op: str, x: Tensor, y: Tensor, form: Form, isa: Isa, keep: tuple[Tensor, ...] = (), **fields: Field) -> Tensor:
    """One op by itself on x, with y's shape; what is around y must stay zero."""
    source, memory = given(x, form, ((1, 1), (1, 1)))
    target, result = given(torch.zeros_like(y), form, ((0, 2), (1, 0)))
    source.buffer.base, target.buffer.base = 1, 2
    axes = (0, 1, None, 2, 3)
    pitch = {"pitch": list(source.view.stride()[2:])} if op == "planar_conv" else {}
    native = NativeOp(op, op, {"x": source.fields(axes), "y": target.fields(axes), "images": int(form is Form.IMAGES),
                               **pitch, **fields})
    network = Network(Recipe(isa.name, 1, 64, (native,), 1, (0, 0)), keep)
    network.run(network.handle, 0, 1, 0, memory.data_ptr(), result.data_ptr())
    inside = result.as_strided(y.shape, target.view.stride(), int(target.view.storage_offset()))
    got = inside.clone()
    inside.zero_()
    assert not result.any()
    return got


@needs_cpp
@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize("average", [False, True])
def test_convolution_pooled_in_registers(average: bool, form: Form, settings: Settings) -> None:
    for width in range(2, 37):
        torch.manual_seed(width)
        x = torch.randn(3 if form is Form.PLANAR else 5 + width, 2, 2 + width % 7, width)
        weight, bias = torch.randn(7, 2, 3, 3) * 0.3, torch.randn(7)
        sizes = blocks(7, 1, 6 if settings.isa.lanes == 16 else 2)
        packed = pack(weight, sizes)

        def definition(dtype: torch.dtype, x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            y = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=1).relu()
            return F.avg_pool2d(y, 2) if average else F.max_pool2d(y, 2)
        exact = definition(torch.float64)
        got = run("planar_conv", x, exact, form, settings.isa, (packed, bias), weight=packed.data_ptr(),
                  bias=bias.data_ptr(), act=1, blocks=sizes, groups=1, kernel=[3, 3], stride=[1, 1], dilation=[1, 1],
                  pad=[1, 1], pool=2 if average else 1)
        assert error(got, exact) <= limit(error(definition(torch.float32), exact), torch.float32), width


POOLS: list[dict[str, Any]] = [
    {"kernel": (2, 2), "stride": (2, 2)},
    {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    {"kernel": (3, 2), "stride": (1, 3), "padding": (1, 1)},
    {"kernel": (5, 5), "stride": (1, 1), "padding": (2, 2)},
    {"kernel": (2, 3), "stride": (2, 1), "dilation": (2, 2)},
    {"kernel": (2, 2), "stride": (2, 2), "ceil_mode": True},
    {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 0), "count_include_pad": False},
    {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "ceil_mode": True},
    {"kernel": (2, 2), "stride": (2, 2), "divisor_override": 3},
]


def pooled(x: Tensor, average: bool, pool: dict[str, Any]) -> Tensor | None:
    """None where torch has no such pooling."""
    at = dict(pool)
    kernel = at.pop("kernel")
    only = {"dilation"} if average else {"count_include_pad", "divisor_override"}
    if only & set(at):
        return None
    return F.avg_pool2d(x, kernel, **at) if average else F.max_pool2d(x, kernel, **at)


@needs_cpp
@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_pooling(pool: dict[str, Any], average: bool, form: Form, settings: Settings) -> None:
    for width in (5, 6, 8, 13, 16, 28, 33, 70):
        x = torch.randn(2 if form is Form.PLANAR else 19, 3, 6 + width % 2, width)
        x[0, 1, 2, width // 2] = torch.nan
        exact = pooled(x.double(), average, pool)
        if exact is None:
            return
        got = run("planar_pool", x, exact, form, settings.isa, kind=2 if average else 1, kernel=list(pool["kernel"]),
                  stride=list(pool["stride"]), pad=list(pool.get("padding", (0, 0))),
                  dilation=list(pool.get("dilation", (1, 1))), divisor=pool.get("divisor_override", 0),
                  count_include_pad=int(pool.get("count_include_pad", True)))
        assert error(got, exact) <= 1e-6, width


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
