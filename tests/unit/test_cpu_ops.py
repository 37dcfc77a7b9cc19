"""Every op of the CPU engine that is not a GEMM, over shapes, strides and halos, on every instruction set, against
torch in fp64; and the Steps that become these ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prunekern.backends.cpu.depthwise import pack
from prunekern.backends.cpu.native import ACTIVATIONS, Field, NativeOp, Network, Recipe, instruction_sets
from prunekern.backends.cpu.simple import BINARY, REDUCE, adaptive_window, pool_window, resize_table
from prunekern.core.activations import FUNCTIONS
from prunekern.core.program import Activation
from prunekern.errors import LoweringError
from prunekern.lower.tolerance import error, limit

ISAS = instruction_sets()
if not ISAS:
    pytest.skip("the extension is not built", allow_module_level=True)
LANES = {"avx512": 16, "avx2": 8, "portable": 4}
CONSTANTS: dict[str, tuple[float, ...]] = {
    "leaky_relu": (0.01,), "elu": (1.67, 1.05, 0.7), "softplus": (2.0, 20.0), "clamp": (-1.0, 2.0),
    "clamp_min": (-0.5,), "clamp_max": (0.7,), "threshold": (0.125, 20.0), "hardshrink": (0.5,), "softshrink": (0.5,),
    "pow": (2.5,)}
SOME = [None, Activation("relu"), Activation("clamp", (0.0, 6.0)), Activation("silu"),
        Activation("elu", (1.0, 1.0, 1.0))]

LAST, PLANAR, CHANNEL_FIRST, IMAGES = (0, 2, 3, 4, 1), (0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (1, 2, 3, 4, 0)
ORDERS = [LAST, PLANAR, CHANNEL_FIRST, IMAGES, (3, 1, 0, 2, 4)]
GARBAGE = 7.0

pytestmark = pytest.mark.parametrize("isa", ISAS)


def pick(draw: np.random.Generator, choices: Any) -> Any:
    return choices[int(draw.integers(len(choices)))]


def cases(count: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Numbered, each with numbers of its own."""
    for case in range(count):
        torch.manual_seed(case)
        yield case, np.random.default_rng(case)


def place(shape: tuple[int, ...], order: tuple[int, ...] = PLANAR, halo: tuple[int, int, int] = (0, 0, 0),
          extra: int = 0, fill: float = GARBAGE) -> tuple[Tensor, Tensor]:
    """A buffer with its axes in this order of memory, and [N, C, D, H, W] inside it, with a halo and more channels
    than it needs."""
    n, c, *sizes = shape
    full = [n, c + extra, *(size + 2 * low for size, low in zip(sizes, halo, strict=True))]
    whole = torch.full([full[axis] for axis in order], fill).permute([order.index(axis) for axis in range(5)])
    inside = whole[:, :c]
    for axis, (size, low) in enumerate(zip(sizes, halo, strict=True), 2):
        inside = inside.narrow(axis, low, size)
    return whole, inside


def drawn(draw: np.random.Generator, shape: tuple[int, ...], orders: Any = ORDERS, fill: float = GARBAGE) -> Tensor:
    """Random values somewhere in a buffer."""
    _, view = place(shape, pick(draw, orders), pick(draw, [(0, 0, 0), (0, 1, 2)]), pick(draw, [0, 0, 3]), fill)
    return view.copy_(torch.randn(shape))


def run(isa: str, op: str, threads: int = 1, weights: dict[str, Tensor | None] | None = None, **fields: Any) -> None:
    """One op on tensors of five axes (its Views) and weights (its addresses)."""
    bases: list[Tensor] = []
    given: dict[str, Field] = {}
    for name, value in fields.items():
        if isinstance(value, Tensor):
            bases.append(value)
            given[name] = [len(bases), 0, *value.shape, *value.stride()]
        elif isinstance(value, Activation):
            given["act"] = ACTIVATIONS[value.kind]
            given.update({f"act{i}": constant for i, constant in enumerate(value.constants)})
        elif value is not None:
            given[name] = value
    kept = {name: weight.contiguous() for name, weight in (weights or {}).items() if weight is not None}
    given.update({name: weight.data_ptr() for name, weight in kept.items()})
    network = Network(Recipe(isa, threads, 64, (NativeOp(op, op, given),), slice_bytes=(0,) * len(bases)), [kept])
    network.run(network.handle, 0, 1, 0, *(base.data_ptr() for base in bases))


def hold(y: Tensor, function: Callable[[torch.dtype], Tensor], case: Any = "") -> None:
    """y against the function in fp64, within the limits of ``tolerance.py``."""
    exact, theirs = function(torch.float64), function(torch.float32)
    assert error(y, exact) <= limit(error(theirs, exact), torch.float32), case


def applied(activation: Activation | None, x: Tensor) -> Tensor:
    return x if activation is None else FUNCTIONS[activation.kind](x, *activation.constants)


# ---- elementary functions --------------------------------------------------------------------------------------

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 3.4e38, -3.4e38, 1e-40, -1e-40, 1.2e-38, 88.7, 88.8,
           -87.0, -88.5, -103.0, -104.0, 20.0, 20.001, 0.5, -0.5, 1.0, -1.0, 2.5, -2.5, 1.5, 0.1, -3.0, 3.0]


@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_functions(kind: str, isa: str) -> None:
    """Within 5 ulp of fp64, but where the formula itself cancels; NaN, infinities and the sign of zero as torch."""
    huge = torch.logspace(-44, 38, 4001, dtype=torch.float64).float()
    x = torch.cat([torch.tensor(SPECIAL), torch.linspace(-20, 20, 20011), torch.linspace(-1, 1, 9001), huge, -huge])
    constants = CONSTANTS.get(kind, ())
    y = torch.full_like(x, GARBAGE)
    run(isa, "activation", x=x.view(1, 1, 1, 1, -1), y=y.view(1, 1, 1, 1, -1), activation=Activation(kind, constants))
    exact = FUNCTIONS[kind](x.double(), *constants)
    # What overflows in torch's fp32 may here; its gelu has NaN at infinity, which is not its limit.
    single = exact.float() if kind == "gelu" else FUNCTIONS[kind](x, *constants)
    finite = single.isfinite()
    assert torch.equal(y.isnan(), single.isnan())
    assert torch.equal(y[~finite].nan_to_num(), single[~finite].nan_to_num())
    cancels = x[finite].double().abs() if kind in ("gelu", "gelu_tanh") else 0.0
    allowed = 2.0 ** -23 * (2.5 * exact[finite].abs() + cancels) + 3e-36       # where 1 / (1 + e^-x) underflows
    assert bool(((y[finite].double() - exact[finite]).abs() <= allowed).all())
    if kind in ("tanh", "erf", "neg", "ceil", "round"):
        zero = finite & (exact == 0)
        assert torch.equal(y[zero].signbit(), single[zero].signbit())


# ---- elementwise -----------------------------------------------------------------------------------------------


def test_binary(isa: str) -> None:
    functions = [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum]
    assert list(BINARY) == [function.__name__ for function in functions]
    for case, draw in cases(150):
        shape = pick(draw, [(2, 5, 1, 7, 9), (1, 33, 1, 4, 3), (3, 16, 2, 2, 20), (1, 1, 1, 1, 1), (1, 3, 1, 70, 130),
                            (0, 3, 1, 2, 2)])
        small = pick(draw, [shape, (1, shape[1], 1, 1, 1), (*shape[:2], 1, 1, 1), (1,) * 5, (1, 1, 1, 1, shape[4])])
        a, b = drawn(draw, shape), drawn(draw, small)
        if a.numel():
            a[0, 0, 0, 0, 0] = math.nan
        operands = [a, b.expand(shape)][::pick(draw, [1, -1])]
        _, y = place(shape, pick(draw, ORDERS), (0, 1, 1), 2)
        function, activation = functions[case % 6], SOME[case % 5]
        run(isa, "binary", 1 + case % 3, y=y, a=operands[0], b=operands[1], kind=case % 6, activation=activation)
        hold(y, lambda dtype: applied(activation, function(*(t.to(dtype) for t in operands))), case)  # noqa: B023


def test_in_place(isa: str) -> None:
    _, x = place((2, 37, 1, 5, 6), LAST)
    start = torch.randn(x.shape)
    x.copy_(start)
    run(isa, "binary", y=x, a=x, b=x, kind=BINARY["mul"])
    hold(x, lambda dtype: start.to(dtype).square())


def test_scale_and_prelu(isa: str) -> None:
    for case, draw in cases(60):
        shape = pick(draw, [(2, 5, 1, 7, 9), (1, 33, 1, 4, 3), (3, 16, 2, 2, 20)])
        axis = pick(draw, [0, 1, 4])
        count = pick(draw, [1, shape[axis]])
        x, activation, (gain, shift) = drawn(draw, shape), SOME[case % 5], torch.randn(2, count)
        _, y = place(shape, pick(draw, ORDERS), extra=1)
        along = [1] * 5
        along[axis] = count
        run(isa, "scale", x=x, y=y, axis=axis, count=count, activation=activation,
            weights={"scale": gain, "shift": shift})
        hold(y, lambda dtype: applied(activation, torch.addcmul(  # noqa: B023
            shift.view(along).to(dtype), x.to(dtype), gain.view(along).to(dtype))), case)  # noqa: B023
        run(isa, "prelu", x=x, y=y, axis=axis, count=count, weights={"slope": gain})
        hold(y, lambda dtype: torch.where(x > 0, x, x * gain.view(along)).to(dtype), case)  # noqa: B023


# ---- movement --------------------------------------------------------------------------------------------------


def test_copy_and_fill(isa: str) -> None:
    for case, draw in cases(90):
        shape = pick(draw, [(2, 5, 1, 7, 9), (1, 3, 1, 30, 21), (2, 4, 1, 5, 33), (1, 2, 1, 4, 40), (3, 40, 2, 5, 19),
                            (1, 17, 1, 33, 16), (0, 3, 1, 2, 2), (1, 64, 1, 40, 110), (2, 16, 3, 16, 16)])
        x = drawn(draw, shape)
        if case % 5 == 0:
            x = drawn(draw, (1, shape[1], 1, 1, shape[4])).expand(shape)
        whole, y = place(shape, pick(draw, ORDERS), (0, 1, 2), pick(draw, [0, 3]))
        untouched = whole.clone()
        run(isa, "copy", 1 + case % 3, x=x, y=y)
        assert torch.equal(x, y), case
        run(isa, "fill", 1 + case % 3, y=y, value=GARBAGE)
        assert torch.equal(whole, untouched), case


def test_halo(isa: str) -> None:
    """The frame is zeroed as far as it is asked for, and nothing else is touched."""
    for case, draw in cases(60):
        shape = (2, pick(draw, [1, 3, 16]), pick(draw, [1, 2]), 4, 5)
        whole, y = place(shape, pick(draw, ORDERS), (1, 2, 3), pick(draw, [0, 2]))
        low, high = ([int(draw.integers(most + 1)) for most in (1, 2, 3)] for _ in range(2))
        expected = whole.clone()
        frame = expected[:, :shape[1]]
        for axis, (reach, most) in enumerate(zip(zip(low, high, strict=True), (1, 2, 3), strict=True), 2):
            frame = frame.narrow(axis, most - reach[0], shape[axis] + sum(reach))
        frame.zero_()
        expected[:, :shape[1], 1:-1, 2:-2, 3:-3] = GARBAGE
        run(isa, "halo", y=y, low=low, high=high)
        assert torch.equal(whole, expected), case


# ---- windows ---------------------------------------------------------------------------------------------------


def run_pool(isa: str, x: Tensor, y: Tensor, kind: int, windows: Any, dilation: Any, divisor: float = 0.0) -> None:
    fields = {f"{name}_{axis}": getattr(window, name) for axis, window in zip("dhw", windows, strict=True)
              for name in ("start", "count", "divide")}
    run(isa, "pool", 2, x=x, y=y, kind=kind, dilation=list(dilation), divisor=divisor,
        stride=[window.stride for window in windows], **fields)


def test_pool(isa: str) -> None:
    for case, draw in cases(120):
        kernel = [pick(draw, [1, 1, 2]), pick(draw, [1, 2, 3]), pick(draw, [1, 2, 3, 5])]
        stride = [pick(draw, [1, 2]), pick(draw, [1, 2]), pick(draw, [1, 2, 2, 3])]
        pads = [int(draw.integers(k // 2 + 1)) for k in kernel]
        shape = (pick(draw, [1, 2, 19]), pick(draw, [1, 3, 17, 70]), kernel[0] + 1, 7, pick(draw, [11, 24, 45]))
        x = drawn(draw, shape, fill=99.0)
        average, ceil, include, divisor = case % 2, case // 2 % 2 == 0, case // 4 % 2 == 0, pick(draw, [None, None, 3])
        dilation = [1, 1, 1] if average else [1, pick(draw, [1, 2]), pick(draw, [1, 2])]
        if average:
            def function(dtype: torch.dtype) -> Tensor:
                return functional.avg_pool3d(x.to(dtype), kernel, stride, pads, ceil, include, divisor)  # noqa: B023
        else:
            x[0, 0, 0, 1, 2] = math.nan

            def function(dtype: torch.dtype) -> Tensor:
                return functional.max_pool3d(x.to(dtype), kernel, stride, pads, dilation, ceil)  # noqa: B023
        out = function(torch.float32).shape
        _, y = place(tuple(out), pick(draw, ORDERS), (0, 1, 1), pick(draw, [0, 2]))
        windows = [pool_window(size, o, k, s, (p, p), d, include) for size, o, k, s, p, d in
                   zip(shape[2:], out[2:], kernel, stride, pads, dilation, strict=True)]
        run_pool(isa, x, y, average, windows, dilation, float(divisor or 0) if average else 0.0)
        hold(y, function, case)


def test_adaptive_pool(isa: str) -> None:
    for case, draw in cases(30):
        x, size = drawn(draw, (2, pick(draw, [3, 20]), 3, 9, 13)), [pick(draw, [1, 2, 3]), pick(draw, [3, 4, 9]), 5]
        _, y = place((*x.shape[:2], *size), pick(draw, ORDERS))
        windows = [adaptive_window(have, out) for have, out in zip(x.shape[2:], size, strict=True)]
        run_pool(isa, x, y, case % 2, windows, [1, 1, 1])
        pools = [functional.adaptive_max_pool3d, functional.adaptive_avg_pool3d]
        hold(y, lambda dtype: pools[case % 2](x.to(dtype), size), case)  # noqa: B023


def test_depthwise(isa: str) -> None:
    for case, draw in cases(100):
        kernel = [pick(draw, [1, 1, 2, 3]), pick(draw, [1, 2, 3, 5]), pick(draw, [1, 2, 3, 3, 5, 7])]
        stride = [1, pick(draw, [1, 2]), pick(draw, [1, 2, 3])]
        dilation = [1, pick(draw, [1, 2]), pick(draw, [1, 1, 2])]
        pads, channels, multiplier = [k // 2 for k in kernel], pick(draw, [1, 3, 17, 33, 140]), pick(draw, [1, 1, 2])
        shape = (pick(draw, [0, 1, 2, 2]), channels, kernel[0], pick(draw, [9, 17]), pick(draw, [14, 21]))
        _, x = place(shape, pick(draw, [LAST, LAST, PLANAR]), (2, 6, 8), pick(draw, [0, 3]), 0.0)
        x.copy_(torch.randn(shape))
        outputs = channels * multiplier
        weight, bias = torch.randn(outputs, 1, *kernel), torch.randn(outputs) if case % 3 else None
        activation, last = SOME[case % 5], case // 2 % 2 == 1

        def plain(dtype: torch.dtype) -> Tensor:
            return functional.conv3d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype),  # noqa: B023
                                     stride, pads, dilation, channels)  # noqa: B023
        out = tuple(plain(torch.float32).shape)
        _, y = place(out, pick(draw, [LAST, LAST, PLANAR]), (0, 1, 1), pick(draw, [0, 5]))
        residual = drawn(draw, out, [LAST, LAST, PLANAR]) if case % 2 else None
        if residual is not None and case % 4 == 1:      # added to in place
            residual = y.copy_(residual)
        kept = torch.zeros(out) if residual is None else residual.clone()
        lanes = LANES[isa]
        padded = None if bias is None else functional.pad(bias, (0, -outputs % lanes))
        run(isa, "depthwise", 1 + case % 2, x=x, y=y, channels=-(-outputs // lanes) * lanes, multiplier=multiplier,
            kernel=kernel, stride=stride, padding=pads, dilation=dilation, residual=residual, residual_last=int(last),
            activation=activation, weights={"weight": pack(weight, lanes), "bias": padded})
        hold(y, lambda dtype: applied(activation, plain(dtype)) + kept.to(dtype) if last else  # noqa: B023
             applied(activation, plain(dtype) + kept.to(dtype)), case)  # noqa: B023


@pytest.mark.parametrize("mode", ["nearest", "nearest_exact", "linear"])
def test_resize(mode: str, isa: str) -> None:
    for case, draw in cases(30):
        shape = (2, pick(draw, [3, 16, 21]), pick(draw, [1, 3]), 5, 7)
        size = [shape[2] * pick(draw, [1, 2]), pick(draw, [3, 10, 13]), pick(draw, [5, 14, 23])]
        x, corners = drawn(draw, shape), case % 2 == 0 and mode == "linear"
        _, y = place((*shape[:2], *size), pick(draw, ORDERS))
        tables = [resize_table(mode, have, out, None, corners) for have, out in zip(shape[2:], size, strict=True)]
        run(isa, "resize", 2, x=x, y=y, **{f"index_{axis}": index.flatten().tolist()
                                           for axis, (index, _) in zip("dhw", tables, strict=True)},
            weights={f"part_{axis}": part for axis, (_, part) in zip("dhw", tables, strict=True)})
        name = {"nearest": "nearest", "nearest_exact": "nearest-exact", "linear": "trilinear"}[mode]
        hold(y, lambda dtype: functional.interpolate(x.to(dtype), size, mode=name,  # noqa: B023
                                                     align_corners=corners if mode == "linear" else None), case)  # noqa: B023


# ---- reductions, softmax, norms --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(REDUCE))
def test_reduce(kind: str, isa: str) -> None:
    for case, draw in cases(60):
        shape = (pick(draw, [1, 3]), pick(draw, [1, 5, 16, 130]), pick(draw, [1, 3]), pick(draw, [1, 7, 33]),
                 pick(draw, [1, 9, 40]))
        x, over = drawn(draw, shape), pick(draw, [[3, 4], [2, 3, 4], [1], [4], [0, 1, 2, 3, 4], [1, 3], [0]])
        if case % 4 == 0:
            x[0, 0, 0, 0, 0] = pick(draw, [math.nan, math.inf, -math.inf])
        reduced = {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin}[kind]
        _, y = place(tuple(1 if axis in over else size for axis, size in enumerate(shape)), pick(draw, ORDERS), extra=1)
        run(isa, "reduce", 1 + case % 2, x=x, y=y, kind=REDUCE[kind], axes=over)
        hold(y, lambda dtype: reduced(x.to(dtype), over, keepdim=True), case)  # noqa: B023


def test_long_sums(isa: str) -> None:
    """Errors do not grow with the length: a million ones with a part that plain summing loses."""
    x = torch.full((1, 1, 1, 1000, 1001), 1.0 + 2.0 ** -20)
    y = torch.zeros(1, 1, 1, 1, 1)
    run(isa, "reduce", x=x, y=y, kind=REDUCE["sum"], axes=[3, 4])
    assert y.item() == pytest.approx(1001000 * (1 + 2.0 ** -20), rel=1e-7)


@pytest.mark.parametrize("log", [False, True])
def test_softmax(log: bool, isa: str) -> None:
    function = functional.log_softmax if log else functional.softmax
    for case, draw in cases(60):
        shape = (pick(draw, [1, 3]), pick(draw, [1, 5, 70]), pick(draw, [1, 3]), pick(draw, [1, 7]),
                 pick(draw, [1, 9, 100]))
        x, axis = drawn(draw, shape).mul_(3), pick(draw, [0, 1, 3, 4])
        if case % 7 == 0:
            x[0, 0, 0, 0, 0] = pick(draw, [math.nan, math.inf, -math.inf])
        if case % 11 == 0:
            x[0] = -math.inf
        _, y = place(shape, pick(draw, ORDERS), extra=1)
        run(isa, "softmax", 1 + case % 2, x=x, y=y, axes=[axis], log=int(log))
        hold(y, lambda dtype: function(x.to(dtype), axis), case)  # noqa: B023


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_row_norms(op: str, isa: str) -> None:
    for case, draw in cases(60):
        shape = (pick(draw, [1, 3]), pick(draw, [1, 5, 70]), pick(draw, [1, 3]), pick(draw, [2, 7]),
                 pick(draw, [4, 9, 100]))
        x, over = drawn(draw, shape).add_(pick(draw, [0, 30])), pick(draw, [[4], [3, 4], [2, 3, 4], [1, 2, 3, 4], [1]])
        sizes = [shape[axis] for axis in over]
        weight, bias = (torch.randn(sizes) if case % k else None for k in (3, 4))
        kept = [axis for axis in range(5) if axis not in over]
        order = [*kept, *over]
        _, y = place(shape, pick(draw, ORDERS), extra=1)

        def function(dtype: torch.dtype) -> Tensor:
            w, b = (None if t is None else t.to(dtype) for t in (weight, bias))  # noqa: B023
            rows = x.to(dtype).permute(order)  # noqa: B023
            found = functional.rms_norm(rows, sizes, w, 1e-5) if op == "rms_norm" else \
                functional.layer_norm(rows, sizes, w, b, 1e-5)  # noqa: B023
            return found.permute([order.index(axis) for axis in range(5)])  # noqa: B023
        run(isa, op, 2, x=x, y=y, axes=over, eps=1e-5, weights={"weight": weight,
                                                               "bias": None if op == "rms_norm" else bias})
        hold(y, function, case)


def test_group_norm(isa: str) -> None:
    for case, draw in cases(60):
        groups, each = pick(draw, [(1, 3), (2, 16), (4, 5), (7, 1), (3, 40)])
        shape = (2, groups * each, pick(draw, [1, 2]), pick(draw, [2, 7]), pick(draw, [3, 9, 40]))
        x = drawn(draw, shape).add_(pick(draw, [0, 30]))
        weight, bias = (torch.randn(shape[1]) if case % k else None for k in (3, 4))
        _, y = place(shape, pick(draw, ORDERS), extra=1)
        run(isa, "group_norm", 2, x=x, y=y, groups=groups, eps=1e-5, weights={"weight": weight, "bias": bias})
        hold(y, lambda dtype: functional.group_norm(
            x.to(dtype), groups, *(None if t is None else t.to(dtype) for t in (weight, bias)), 1e-5), case)  # noqa: B023


# ---- products --------------------------------------------------------------------------------------------------


def five(x: Tensor) -> Tensor:
    return x.reshape(1, *x.shape) if x.dim() == 4 else x[(None,) * (5 - x.dim())]


def turned(draw: np.random.Generator, *shape: int) -> Tensor:
    """Rows or columns next to each other."""
    return torch.randn(shape) if draw.random() < 0.5 else torch.randn(*shape[:-2], shape[-1], shape[-2]).mT


def test_matmul(isa: str) -> None:
    for case, draw in cases(60):
        batch, activation = pick(draw, [(1, 1), (2, 3)]), SOME[case % 5]
        rows, depth, columns = pick(draw, [1, 5, 17, 70]), pick(draw, [1, 16, 33, 1100]), pick(draw, [1, 7, 65, 130])
        a = turned(draw, *pick(draw, [batch, (1, 1)]), rows, depth)
        b = turned(draw, *pick(draw, [batch, (1, 1)]), depth, columns)
        y = torch.full((*batch, rows, columns), GARBAGE)
        spread = [five(t.expand(*batch, *t.shape[2:])) for t in (a, b)]
        run(isa, "matmul", 1 + case % 2, a=spread[0], b=spread[1], y=five(y), activation=activation)
        hold(y, lambda dtype: applied(activation, a.to(dtype) @ b.to(dtype)).expand(y.shape), case)  # noqa: B023


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, factor: float) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
    scores = q @ k.mT * factor
    scores = scores if mask is None else scores + mask.to(scores)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def test_attention(isa: str) -> None:
    """Grouped heads, masks, causal; a query that sees no key gets zeros."""
    for case, draw in cases(60):
        heads, shared = pick(draw, [(1, 1), (4, 2), (3, 3)])
        rows, keys = pick(draw, [1, 5, 150]), pick(draw, [1, 7, 40, 600])
        width, out = pick(draw, [4, 16, 33]), pick(draw, [4, 16, 33])
        q = torch.randn(2, rows, heads, width).transpose(1, 2)
        k, v = torch.randn(2, keys, shared, width).transpose(1, 2), torch.randn(2, shared, keys, out)
        mask = None
        if case % 3:
            mask = torch.randn(pick(draw, [(2, heads, rows, keys), (1, 1, rows, keys), (2, 1, 1, keys),
                                           (1, 1, rows, 1)]))
            mask[torch.rand(mask.shape) < 0.3] = -math.inf
        y = torch.full((2, rows, heads, out), GARBAGE).transpose(1, 2)
        spread = None if mask is None else five(mask.expand(2, heads, rows, keys))
        run(isa, "attention", 1 + case % 2, q=five(q), k=five(k), v=five(v), y=five(y), mask=spread,
            causal=int(case % 4 == 0), scale=width ** -0.5)
        hold(y, lambda dtype: attended(q.to(dtype), k.to(dtype), v.to(dtype), mask, case % 4 == 0, width ** -0.5), case)  # noqa: B023


def test_attention_keeps_nan(isa: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 1, 6, 8).unbind()
    q[..., 2, 0] = math.nan
    y = torch.zeros_like(q)
    run(isa, "attention", q=q, k=k, v=v, y=y, scale=1.0)
    assert y.isnan().any(-1).flatten().tolist() == [False, False, True, False, False, False]


def test_wrong_fields_are_named(isa: str) -> None:
    x = torch.zeros(1, 1, 1, 1, 4)
    with pytest.raises(LoweringError, match="axes"):
        run(isa, "softmax", x=x, y=x)
    with pytest.raises(LoweringError, match="kind of binary"):
        run(isa, "binary", y=x, a=x, b=x, kind=9)
