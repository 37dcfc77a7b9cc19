"""Convolutions and linear layers as im2col + GEMM. No torch convolution or linear operator is called.

Convolutions work on slices of the batch, small enough that patches, result and epilogue stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekern.backends.reference.engine import Compiler, Finish, Kernel, Layout
from prunekern.core.graph import Shape
from prunekern.core.program import Step

PATCH_BYTES = 1 << 20          # of the im2col matrix that is made at once


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


class _Window:
    """The padded, channels-last slices of a step's input and strided windows over them."""

    def __init__(self, layout: Layout, step: Step, count: int) -> None:
        at = step.attributes
        self.layout, self.step, self.count = layout, step, count
        self.batch, self.channels, *sizes = layout.shape(step.inputs[0])
        self.out = layout.shape(step.output)[2:]
        self.kernel, self.stride, self.dilation = at["kernel"], at["stride"], at["dilation"]
        self.rank = len(sizes)
        self.read = layout.get(step.inputs[0])
        self.padded: Tensor | None = None
        if any(p for pair in at["padding"] for p in pair):
            shape = (count, *(n + low + high for n, (low, high) in zip(sizes, at["padding"], strict=True)), self.channels)
            self.padded = torch.zeros(shape, dtype=step.inputs[0].dtype, device=layout.device)   # borders stay 0
            self.inner = self.padded[(slice(None), *(slice(low, low + n) for n, (low, _) in
                                                     zip(sizes, at["padding"], strict=True)))]

    def slices(self) -> list[slice]:
        return [slice(start, min(start + self.count, self.batch)) for start in range(0, self.batch, self.count)]

    def load(self, rows: slice) -> Tensor:
        """``[n, *padded, C]`` for a slice of the batch."""
        x = self.read()[rows].permute(0, *range(2, self.rank + 2), 1)
        if self.padded is None:
            return x
        n = x.shape[0]
        self.inner[:n].copy_(x)
        return self.padded[:n]

    def taps(self, x: Tensor) -> Tensor:
        """``[n, *out, *kernel, C]``, a view."""
        n, *spatial, c = x.stride()
        return x.as_strided(
            (x.shape[0], *self.out, *self.kernel, self.channels),
            (n, *(a * s for a, s in zip(spatial, self.stride, strict=True)),
             *(a * d for a, d in zip(spatial, self.dilation, strict=True)), c), x.storage_offset())


def _per_slice(layout: Layout, step: Step, bytes_each: int) -> int:
    """How many images are worked on at once."""
    batch = layout.shape(step.inputs[0])[0]
    return max(1, min(batch, PATCH_BYTES // max(1, bytes_each))) if layout.device.type == "cpu" else max(1, batch)


def _rows(y: Tensor) -> Tensor:
    """``[n * positions, channels]`` of a channels-last output."""
    return y.permute(0, *range(2, y.dim()), 1).reshape(-1, y.shape[1])


def _multiply(bias: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Any]:
    if bias is None:
        return lambda a, b, out: torch.mm(a, b, out=out)
    return lambda a, b, out: torch.addmm(bias, a, b, out=out)


def _pointwise(layout: Layout, step: Step) -> Kernel:
    """1x1: the input's own rows are the matrix."""
    layout.algorithms[step.name] = "1x1 direct"
    at, x_slot = step.attributes, step.inputs[0]
    weight = layout.weight(step.weights["weight"]).flatten(1).t().contiguous()
    y = layout.out(step.output, channels_last=True)
    rank, read, multiply, finish = y.dim() - 2, layout.get(x_slot), _multiply(layout.bias(step)), \
        layout.finish(step, skip_bias=True)
    picks = (slice(None), *(slice(None, None, s) for s in at["stride"]))
    rows, channels = _rows(y), weight.shape[0]
    fixed = layout.fixed(x_slot)

    def matrix(x: Tensor) -> Tensor:
        return x.permute(0, *range(2, rank + 2), 1)[picks].reshape(-1, channels)
    if fixed is not None:
        ready = matrix(fixed)
        if ready.untyped_storage().data_ptr() == fixed.untyped_storage().data_ptr():
            return _with_finish(lambda: multiply(ready, weight, rows), finish, y)
    return _with_finish(lambda: multiply(matrix(read()), weight, rows), finish, y)


def _with_finish(kernel: Callable[[], Any], finish: Finish | None, y: Tensor) -> Kernel:
    if finish is None:
        return kernel
    everything = slice(None)

    def run() -> None:
        kernel()
        finish(y, everything)
    return run


def _im2col(layout: Layout, step: Step) -> Kernel:
    """Explicit im2col, one matrix a group."""
    at, groups = step.attributes, step.attributes["groups"]
    layout.algorithms[step.name] = "im2col" if groups == 1 else "grouped im2col"
    weight = layout.weight(step.weights["weight"])
    outs, depth = weight.shape[0], math.prod(weight.shape[1:])
    y = layout.out(step.output, channels_last=True)
    positions, taps = math.prod(y.shape[2:]), math.prod(at["kernel"])
    dtype = step.output.dtype
    window = _Window(layout, step, _per_slice(layout, step, positions * depth * groups * dtype.itemsize))
    finish, bias = layout.finish(step, skip_bias=True), layout.bias(step)
    count, rank = window.count, window.rank
    if groups == 1:
        packed = weight.permute(*range(2, rank + 2), 1, 0).reshape(depth, outs).contiguous()
        patches, multiply = layout.scratch((count * positions, depth), dtype), _multiply(bias)

        def product(part: Tensor, x: Tensor) -> None:
            view = window.taps(x)
            matrix = patches()[:view.shape[0] * positions]
            matrix.view(view.shape).copy_(view)
            multiply(matrix, packed, _rows(part))
    else:
        packed = weight.view(groups, outs // groups, -1, *at["kernel"]).permute(0, *range(3, rank + 3), 2, 1) \
            .reshape(groups, depth, outs // groups).contiguous()
        product = _grouped(layout, step, window, packed, positions, taps, bias)
    slices = window.slices()

    def run() -> None:
        for rows in slices:
            part = y[rows]
            product(part, window.load(rows))
            if finish is not None:
                finish(part, rows)
    return run


def _grouped(layout: Layout, step: Step, window: _Window, packed: Tensor, positions: int, taps: int,
             bias: Tensor | None) -> Callable[[Tensor, Tensor], None]:
    groups, depth, each = packed.shape
    dtype, per = step.output.dtype, depth // taps
    left: Shape = (groups, window.count * positions, depth)
    patches = layout.scratch(left, dtype)
    start = -(-math.prod(left) * dtype.itemsize // 64) * 64
    product_of = layout.scratch((groups, window.count * positions, each), dtype, start)
    shift = None if bias is None else bias.view(groups, 1, each)

    def product(part: Tensor, x: Tensor) -> None:
        view = window.taps(x).unflatten(-1, (groups, per)).movedim(-2, 0)      # [g, n, *out, *kernel, c]
        rows = view.shape[1] * positions
        matrix = patches().view(-1)[:groups * rows * depth].view(groups, rows, depth)
        matrix.view(view.shape).copy_(view)
        result = product_of().view(-1)[:groups * rows * each].view(groups, rows, each)
        if shift is None:
            torch.bmm(matrix, packed, out=result)
        else:
            torch.baddbmm(shift, matrix, packed, out=result)
        _rows(part).view(rows, groups, each).copy_(result.transpose(0, 1))
    return product


def _depthwise(layout: Layout, step: Step) -> Kernel:
    """Every channel on its own: the taps' shifted views, multiplied and summed."""
    layout.algorithms[step.name] = "depthwise"
    weight = layout.weight(step.weights["weight"])
    channels, rank = layout.shape(step.inputs[0])[1], weight.dim() - 2
    each = weight.shape[0] // channels
    taps = weight.reshape(channels, each, -1).permute(2, 0, 1).contiguous()       # [taps, C, m]
    y = layout.out(step.output, channels_last=True)
    bytes_each = math.prod(y.shape[1:]) * step.output.dtype.itemsize * 2
    window = _Window(layout, step, _per_slice(layout, step, bytes_each))
    bias = layout.bias(step)
    shift = None if bias is None else bias.view(channels, each)
    finish, slices = layout.finish(step, skip_bias=True), window.slices()

    def run() -> None:
        for rows in slices:
            views, part = window.taps(window.load(rows)), y[rows]
            out = part.permute(0, *range(2, rank + 2), 1).unflatten(-1, (channels, each))
            _tap_sum(views, taps, shift, out, rank)
            if finish is not None:
                finish(part, rows)
    return run


def _tap_sum(views: Tensor, taps: Tensor, shift: Tensor | None, out: Tensor, rank: int) -> None:
    for number, tap in enumerate(taps):
        index = _unravel(number, views.shape[rank + 1:2 * rank + 1])
        view = views[(slice(None),) * (rank + 1) + index].unsqueeze(-1)
        if number:
            out.addcmul_(view, tap)
        elif shift is None:
            torch.mul(view, tap, out=out)
        else:
            torch.addcmul(shift, view, tap, out=out)


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
    count = _per_slice(layout, step, bytes_each)
    read, bias = layout.get(step.inputs[0]), layout.bias(step)
    finish = layout.finish(step, skip_bias=True)
    batch = y.shape[0]
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
    """Rows times the packed weight."""
    layout.algorithms[step.name] = "GEMM"
    x_slot, weight = step.inputs[0], layout.weight(step.weights["weight"])
    if x_slot.name in layout.flat:       # columns in the order that the memory has
        channels, *sizes = layout.shape(layout.producers[x_slot.name].inputs[0])[1:]
        weight = weight.view(-1, channels, math.prod(sizes)).transpose(1, 2).reshape(weight.shape)
    packed = weight.t().contiguous()
    y = layout.out(step.output, channels_last=False)
    rows = y.view(-1, y.shape[-1])
    read, multiply = layout.get(x_slot), _multiply(layout.bias(step))
    depth, finish = packed.shape[0], layout.finish(step, skip_bias=True, axis=-1)
    fixed = layout.fixed(x_slot)
    if fixed is not None:
        ready = fixed.reshape(-1, depth)
        if ready.untyped_storage().data_ptr() == fixed.untyped_storage().data_ptr():
            return _with_finish(lambda: multiply(ready, packed, rows), finish, y)
    return _with_finish(lambda: multiply(read().reshape(-1, depth), packed, rows), finish, y)


def matmul(layout: Layout, step: Step) -> Kernel:
    """Two values, batched as torch.matmul has it."""
    layout.algorithms[step.name] = "GEMM"
    y = layout.out(step.output, channels_last=False)
    left, right = (layout.get(slot) for slot in step.inputs)
    return _with_finish(lambda: torch.matmul(left(), right(), out=y), layout.finish(step, axis=-1), y)


GEMM_COMPILERS: dict[str, Compiler] = {"conv": conv, "conv_transpose": conv_transpose, "linear": linear,
                                       "matmul": matmul}
