"""Convolutions and linear layers as im2col + GEMM. No torch convolution or linear operator is called.

Convolutions work on slices of the batch, small enough that patches, result and epilogue stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekern.backends.reference.engine import Compiler, Finish, Kernel, Layout
from prunekern.core.graph import Shape
from prunekern.core.program import Step
from prunekern.kernels import im2col_nhwc, unavailable

PATCH_BYTES = 2 << 20              # of the im2col matrix that is made at once: what stays in cache
DEVICE_PATCH_BYTES = 256 << 20     # on a GPU: few launches, bounded memory
LANES, WIDE = 8, 128               # widths that torch's GEMM likes; above, its remainder hardly matters
FEW_CHANNELS = 8                   # below, runs of pixels are longer than runs of channels


def conv(layout: Layout, step: Step) -> Kernel:
    """Pad, lay out patches, multiply; or less where the geometry allows it."""
    at = step.attributes
    channels, groups = layout.shape(step.inputs[0])[1], at["groups"]
    padded = any(p for pair in at["padding"] for p in pair)
    if math.prod(at["kernel"]) == 1 and groups == 1 and not padded:
        return _pointwise(layout, step)
    if groups > 1 and groups == channels:
        return _depthwise(layout, step)
    return _im2col(layout, step)


@dataclass
class _Part:
    """One slice of the batch: its rows, its place in the output, and the views that are the same in every run."""

    rows: slice
    y: Tensor
    source: Tensor | None      # the input's slice, channels last, where the input has a fixed place
    inner: Tensor | None       # where it goes in the padded buffer
    image: Tensor | None       # the padded slice
    taps: Tensor | None        # its windows


class _Window:
    """The padded slices of a step's input and strided windows over them, ``[n, *out, *kernel, C]``.

    planar: the padded copy keeps each channel's positions together instead of each position's channels.
    """

    def __init__(self, layout: Layout, step: Step, y: Tensor, bytes_each: int, planar: bool = False) -> None:
        at = step.attributes
        self.batch, self.channels, *sizes = layout.shape(step.inputs[0])
        self.count = per_slice(layout, self.batch, bytes_each)
        self.out, self.rank = tuple(y.shape[2:]), y.dim() - 2
        self.kernel, self.stride, self.dilation = at["kernel"], at["stride"], at["dilation"]
        self.read, fixed = layout.get(step.inputs[0]), layout.fixed(step.inputs[0])
        pairs = at["padding"]
        padded: Tensor | None = None
        inner: Tensor | None = None
        if planar or any(p for pair in pairs for p in pair):
            full = [n + low + high for n, (low, high) in zip(sizes, pairs, strict=True)]
            shape = (self.count, self.channels, *full) if planar else (self.count, *full, self.channels)
            padded = torch.zeros(shape, dtype=y.dtype, device=layout.device)        # borders stay 0
            padded = self.last(padded) if planar else padded
            inner = padded[(slice(None), *(slice(low, low + n) for n, (low, _) in zip(sizes, pairs, strict=True)))]
        self.parts = [self._part(slice(a, min(a + self.count, self.batch)), y, fixed, padded, inner)
                      for a in range(0, self.batch, self.count)]

    def _part(self, rows: slice, y: Tensor, fixed: Tensor | None, padded: Tensor | None, inner: Tensor | None) -> _Part:
        n = rows.stop - rows.start
        source = None if fixed is None else self.last(fixed[rows])
        image = source if padded is None else padded[:n]
        return _Part(rows, y[rows], source, None if inner is None else inner[:n], image,
                     None if image is None else self.taps(image))

    def last(self, x: Tensor) -> Tensor:
        """Channels as the last axis."""
        return x.permute(0, *range(2, self.rank + 2), 1)

    def load(self, part: _Part) -> Tensor:
        """``[n, *padded, C]`` of this run."""
        source = part.source if part.source is not None else self.last(self.read()[part.rows])
        if part.inner is None:
            return source
        part.inner.copy_(source)
        return part.image  # type: ignore[return-value]

    def windows(self, part: _Part) -> Tensor:
        """``[n, *out, *kernel, C]`` of this run, a view."""
        image = self.load(part)
        return part.taps if part.taps is not None else self.taps(image)

    def taps(self, x: Tensor) -> Tensor:
        n, *spatial, c = x.stride()
        return x.as_strided(
            (x.shape[0], *self.out, *self.kernel, self.channels),
            (n, *(a * s for a, s in zip(spatial, self.stride, strict=True)),
             *(a * d for a, d in zip(spatial, self.dilation, strict=True)), c), x.storage_offset())


def per_slice(layout: Layout, batch: int, bytes_each: int) -> int:
    """How many images are worked on at once."""
    budget = PATCH_BYTES if layout.device.type == "cpu" else DEVICE_PATCH_BYTES
    return max(1, min(batch, budget // max(1, bytes_each)))


def _rows(y: Tensor) -> Tensor:
    """``[n * positions, channels]`` of a channels-last output."""
    return y.permute(0, *range(2, y.dim()), 1).reshape(-1, y.shape[1])


Multiply = Callable[[Tensor, Tensor], Any]      # (a [m, K], out [m, N]): out = a @ weight.t() + bias


def _gemm(layout: Layout, weight: Tensor, bias: Tensor | None, rows: int, used: int = 0) -> Multiply:
    """The product with one weight ``[N, K]``, for at most ``rows`` rows; ``used`` bytes of scratch hold ``a``.

    The weight stays as stored, ``[N, K]``: packed the other way, few outputs lose a digit. On CPUs, torch's GEMM
    takes up to three times as long where N is not a multiple of 8, as it seldom is in a pruned network. The
    transposed product has the long axis there instead.
    """
    outputs = weight.shape[0]
    if layout.device.type != "cpu" or outputs % LANES == 0 or outputs > WIDE or rows < LANES:
        turned = weight.t()
        if bias is None:
            return lambda a, out: torch.mm(a, turned, out=out)
        return lambda a, out: torch.addmm(bias, a, turned, out=out)
    across = layout.scratch((outputs * rows,), weight.dtype, -(-used // 64) * 64)

    def transposed(a: Tensor, out: Tensor) -> None:
        narrow = across()[:outputs * len(a)].view(outputs, len(a))
        torch.mm(weight, a.t(), out=narrow)
        if bias is None:
            out.copy_(narrow.t())
        else:
            torch.add(narrow.t(), bias, out=out)
    return transposed


def _pointwise(layout: Layout, step: Step) -> Kernel:
    """1x1: the input's own rows are the matrix."""
    layout.algorithms[step.name] = "1x1 direct"
    at, x_slot = step.attributes, step.inputs[0]
    weight = layout.weight(step.weights["weight"]).flatten(1)
    y = layout.out(step.output, channels_last=True)
    rank, read, finish = y.dim() - 2, layout.get(x_slot), layout.finish(step, skip_bias=True)
    picks = (slice(None), *(slice(None, None, s) for s in at["stride"]))
    rows, channels = _rows(y), weight.shape[1]
    multiply = _gemm(layout, weight, layout.bias(step), len(rows))
    fixed = layout.fixed(x_slot)

    def matrix(x: Tensor) -> Tensor:
        return x.permute(0, *range(2, rank + 2), 1)[picks].reshape(-1, channels)
    if fixed is not None:
        ready = matrix(fixed)
        if ready.untyped_storage().data_ptr() == fixed.untyped_storage().data_ptr():
            return _with_finish(lambda: multiply(ready, rows), finish, y)
    return _with_finish(lambda: multiply(matrix(read()), rows), finish, y)


def _with_finish(kernel: Callable[[], Any], finish: Finish | None, y: Tensor) -> Kernel:
    if finish is None:
        return kernel
    everything = slice(None)

    def run() -> None:
        kernel()
        finish(y, everything)
    return run


Product = Callable[[_Part], Any]      # writes a part's GEMM (and bias)


def _im2col(layout: Layout, step: Step) -> Kernel:
    """Explicit im2col, one matrix a group."""
    at, dtype = step.attributes, step.output.dtype
    weight, y = layout.weight(step.weights["weight"]), layout.out(step.output, channels_last=True)
    positions, depth = math.prod(y.shape[2:]), math.prod(weight.shape[1:])
    few = at["groups"] == 1 and weight.shape[1] < FEW_CHANNELS
    window = _Window(layout, step, y, positions * depth * at["groups"] * dtype.itemsize, planar=few)
    make = _grouped if at["groups"] > 1 else _by_taps if few else _by_rows
    return _over_parts(window, make(layout, step, window, weight), layout.finish(step, skip_bias=True))


def _over_parts(window: _Window, product: Product, finish: Finish | None) -> Kernel:
    parts = window.parts

    def run() -> None:
        for part in parts:
            product(part)
            if finish is not None:
                finish(part.y, part.rows)
    return run


def _matrix(weight: Tensor) -> Tensor:
    """``[O, prod(kernel) * I]``: the other operand of the GEMM, columns over (*kernel, i)."""
    return weight.permute(0, *range(2, weight.dim()), 1).reshape(weight.shape[0], -1).contiguous()


def _by_rows(layout: Layout, step: Step, window: _Window, weight: Tensor) -> Product:
    """A window's taps side by side: a row is a run of contiguous channels after another."""
    layout.algorithms[step.name] = "im2col"
    matrix_of, positions = _matrix(weight), math.prod(window.out)
    rows, depth = window.count * positions, matrix_of.shape[1]
    used = rows * depth * step.output.dtype.itemsize
    if window.rank == 2 and _extension_pays(layout, step, window.count * positions * depth):
        layout.algorithms[step.name] = "im2col (C++)"
        direct = _gemm(layout, matrix_of, layout.bias(step), rows)
        return lambda part: direct(im2col_nhwc(window.load(part), window.kernel, window.stride, window.dilation),
                                   _rows(part.y))
    patches = layout.scratch((rows, depth), step.output.dtype)
    multiply = _gemm(layout, matrix_of, layout.bias(step), rows, used)

    def product(part: _Part) -> None:
        view = window.windows(part)
        matrix = patches()[:view.shape[0] * positions]
        matrix.view(view.shape).copy_(view)
        multiply(matrix, _rows(part.y))
    return product


def _extension_pays(layout: Layout, step: Step, elements: int) -> bool:
    return (unavailable() is None and layout.device.type == "cpu" and elements >= 1 << 16
            and step.output.dtype in (torch.float32, torch.float64))


def _by_taps(layout: Layout, step: Step, window: _Window, weight: Tensor) -> Product:
    """The transposed matrix, one tap of one channel a row: for few channels its runs are rows of pixels."""
    layout.algorithms[step.name] = "im2col by taps"
    matrix_of, rows, rank = _matrix(weight), window.count * math.prod(window.out), window.rank
    depth, dtype = matrix_of.shape[1], step.output.dtype
    patches = layout.scratch((depth * rows,), dtype)
    multiply = _gemm(layout, matrix_of, layout.bias(step), rows, depth * rows * dtype.itemsize)
    order = (*range(rank + 1, 2 * rank + 2), *range(rank + 1))         # [*kernel, C, n, *out]

    def product(part: _Part) -> None:
        view = window.windows(part).permute(order)
        matrix = patches()[:view.numel()].view(depth, -1)
        matrix.view(view.shape).copy_(view)
        multiply(matrix.t(), _rows(part.y))
    return product


def _grouped(layout: Layout, step: Step, window: _Window, weight: Tensor) -> Product:
    """A batch of GEMMs, one a group."""
    layout.algorithms[step.name] = "grouped im2col"
    groups, dtype, bias = step.attributes["groups"], step.output.dtype, layout.bias(step)
    each, per = weight.shape[0] // groups, weight.shape[1]
    packed = torch.stack([_matrix(w).t() for w in weight.chunk(groups)])
    positions, depth = math.prod(window.out), packed.shape[1]
    left = groups * window.count * positions * depth
    patches = layout.scratch((left,), dtype)
    results = layout.scratch((groups * window.count * positions * each,), dtype, -(-left * dtype.itemsize // 64) * 64)
    shift = None if bias is None else bias.view(groups, 1, each)

    def product(part: _Part) -> None:
        view = window.windows(part).unflatten(-1, (groups, per)).movedim(-2, 0)      # [g, n, *out, *kernel, c]
        rows = view.shape[1] * positions
        matrix = patches()[:view.numel()].view(groups, rows, depth)
        matrix.view(view.shape).copy_(view)
        result = results()[:groups * rows * each].view(groups, rows, each)
        if shift is None:
            torch.bmm(matrix, packed, out=result)
        else:
            torch.baddbmm(shift, matrix, packed, out=result)
        _rows(part.y).view(rows, groups, each).copy_(result.transpose(0, 1))
    return product


def _depthwise(layout: Layout, step: Step) -> Kernel:
    """Every channel on its own: the taps' shifted views, multiplied and summed."""
    layout.algorithms[step.name] = "depthwise"
    weight, y = layout.weight(step.weights["weight"]), layout.out(step.output, channels_last=True)
    channels, rank = layout.shape(step.inputs[0])[1], weight.dim() - 2
    each = weight.shape[0] // channels
    taps = weight.reshape(channels, each, -1).permute(2, 0, 1).contiguous()       # [taps, C, m]
    window = _Window(layout, step, y, math.prod(y.shape[1:]) * step.output.dtype.itemsize * 2)
    bias = layout.bias(step)
    shift = None if bias is None else bias.view(channels, each)
    spots = [(slice(None),) * (rank + 1) + _unravel(number, tuple(window.kernel)) for number in range(len(taps))]

    half = y.dtype.itemsize < 4
    if half:                       # sums of many terms are kept in fp32, as a GEMM keeps them
        taps, shift = taps.float(), None if shift is None else shift.float()

    def product(part: _Part) -> None:
        views = window.windows(part).float() if half else window.windows(part)
        place = window.last(part.y).unflatten(-1, (channels, each))
        out = torch.empty_like(place, dtype=torch.float32) if half else place
        first, *rest = [views[spot].unsqueeze(-1) for spot in spots]
        if shift is None:
            torch.mul(first, taps[0], out=out)
        else:
            torch.addcmul(shift, first, taps[0], out=out)
        for view, tap in zip(rest, taps[1:], strict=True):
            out.addcmul_(view, tap)
        if half:
            place.copy_(out)
    return _over_parts(window, product, layout.finish(step, skip_bias=True))


def _unravel(number: int, shape: Shape) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        number, rest = divmod(number, size)
        index.append(rest)
    return tuple(reversed(index))


def conv_transpose(layout: Layout, step: Step) -> Kernel:
    """GEMM to all taps of all positions, then the taps are added where they belong (col2im)."""
    layout.algorithms[step.name] = "GEMM + col2im"
    at, groups = step.attributes, step.attributes["groups"]
    weight = layout.weight(step.weights["weight"])
    kernel, stride, dilation = at["kernel"], at["stride"], at["dilation"]
    rank, outs = len(kernel), weight.shape[1]
    inputs = weight.shape[0] // groups
    packed = weight.view(groups, inputs, outs, -1).permute(0, 1, 3, 2).reshape(groups, inputs, -1).contiguous()
    y = layout.out(step.output, channels_last=True)
    sizes = layout.shape(step.inputs[0])[2:]
    extent = tuple(max((n - 1) * s + d * (k - 1) + 1, low + out) for n, s, d, k, (low, _), out in
                   zip(sizes, stride, dilation, kernel, at["padding"], y.shape[2:], strict=True))
    crop = (slice(None), *(slice(low, low + out) for (low, _), out in zip(at["padding"], y.shape[2:], strict=True)))
    bytes_each = math.prod(sizes) * packed.shape[2] * groups * step.output.dtype.itemsize
    batch = y.shape[0]
    count = per_slice(layout, batch, bytes_each)
    read, bias = layout.get(step.inputs[0]), layout.bias(step)
    finish = layout.finish(step, skip_bias=True)
    slices = [slice(start, min(start + count, batch)) for start in range(0, batch, count)]
    places = [tuple(slice(i * d, i * d + (n - 1) * s + 1, s) for i, d, n, s in
                    zip(_unravel(tap, tuple(kernel)), dilation, sizes, stride, strict=True))
              for tap in range(math.prod(kernel))]

    def run() -> None:
        for rows in slices:
            x = read()[rows].permute(0, *range(2, rank + 2), 1)
            n = x.shape[0]
            matrix = x.reshape(-1, groups, inputs).transpose(0, 1)
            columns = torch.bmm(matrix, packed).view(groups, n, *sizes, len(places), outs)
            full = torch.zeros((n, *extent, groups, outs), dtype=x.dtype, device=x.device)
            for tap, place in enumerate(places):
                full[(slice(None), *place)] += columns.select(-2, tap).movedim(0, -2)
            part, result = y[rows], full[crop].flatten(-2)
            target = part.permute(0, *range(2, rank + 2), 1)
            if bias is None:
                target.copy_(result)
            else:
                torch.add(result, bias, out=target)
            if finish is not None:
                finish(part, rows)
    return run


def linear(layout: Layout, step: Step) -> Kernel:
    """Rows times the weight."""
    layout.algorithms[step.name] = "GEMM"
    x_slot, weight = step.inputs[0], layout.weight(step.weights["weight"])
    if x_slot.name in layout.flat:       # columns in the order that the memory has
        channels, *sizes = layout.shape(layout.producers[x_slot.name].inputs[0])[1:]
        weight = weight.view(-1, channels, math.prod(sizes)).transpose(1, 2).reshape(weight.shape)
    y = layout.out(step.output, channels_last=False)
    rows = y.view(-1, y.shape[-1])
    read, multiply = layout.get(x_slot), _gemm(layout, weight.contiguous(), layout.bias(step), len(rows))
    depth, finish = weight.shape[1], layout.finish(step, skip_bias=True, axis=-1)
    fixed = layout.fixed(x_slot)
    if fixed is not None:
        ready = fixed.reshape(-1, depth)
        if ready.untyped_storage().data_ptr() == fixed.untyped_storage().data_ptr():
            return _with_finish(lambda: multiply(ready, rows), finish, y)
    return _with_finish(lambda: multiply(read().reshape(-1, depth), rows), finish, y)


def matmul(layout: Layout, step: Step) -> Kernel:
    """Two values, batched as torch.matmul has it."""
    layout.algorithms[step.name] = "GEMM"
    y = layout.out(step.output, channels_last=False)
    left, right = (layout.get(slot) for slot in step.inputs)
    return _with_finish(lambda: torch.matmul(left(), right(), out=y), layout.finish(step, axis=-1), y)


GEMM_COMPILERS: dict[str, Compiler] = {"conv": conv, "conv_transpose": conv_transpose, "linear": linear,
                                       "matmul": matmul}
