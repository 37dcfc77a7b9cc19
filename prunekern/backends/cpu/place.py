"""Where values lie: the forms that kernels want, buffers with halos, and views of them.

Everything is planned on meta tensors: a view of a value is made by torch's own view operators, and its strides and
offset become the engine's View. A value that no view can express is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from prunekern.core.graph import Shape

LOCAL = -1          # base of what a thread keeps to itself; its number comes after all others
ALIGNMENT = 16      # floats: a cache line
AXES = 5            # of a View: n, c, d, h, w


class Form(Enum):
    """How a value of three or more axes lies in memory. PLAIN: in torch's order, dense. LAST: channels last, with a
    halo of zeros. PLANAR: [channel, image, row, column], with halos that neighbouring rows and images share. IMAGES:
    [channel, row, column, image], with a halo; images fill whole registers. PAIRS: as LAST, of bf16 numbers; its Places
    are of pairs of channels, each as large as a float (bf16.py)."""

    PLAIN = "plain"
    LAST = "channels last"
    PLANAR = "planar"
    IMAGES = "images last"
    PAIRS = "channels last, bf16"


Halo = tuple[tuple[int, int], ...]      # zeros before and after, per spatial axis


def no_halo(rank: int) -> Halo:
    return ((0, 0),) * max(rank - 2, 0)


def widest(*halos: Halo) -> Halo:
    """One that serves all of them."""
    return tuple((max(low for low, _ in pairs), max(high for _, high in pairs)) for pairs in zip(*halos, strict=True))


@dataclass(eq=False)
class Buffer:
    """A stretch of memory of its own. base: 0 for the arena, else the number of an input or output, or LOCAL; offset
    (bytes) is known once the arena is planned."""

    floats: int
    base: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Place:
    """A value in a buffer: ``view`` is a meta tensor of the value's logical shape with its strides and offset.
    halo: zeros that lie around it (only in a form that is not PLAIN)."""

    buffer: Buffer
    view: Tensor
    form: Form = Form.PLAIN
    halo: Halo = ()

    @property
    def offset(self) -> int:
        """Bytes from the base."""
        return self.buffer.offset + 4 * int(self.view.storage_offset())

    def fields(self, axes: Sequence[int | None]) -> list[int]:
        """The engine's View. axes: which of the value's axes is n, c, d, h, w; None where there is none."""
        sizes = [1 if axis is None else int(self.view.shape[axis]) for axis in axes]
        strides = [0 if axis is None else int(self.view.stride(axis)) for axis in axes]     # halos need those of size 1
        return [self.buffer.base, self.offset, *sizes, *strides]

    def on(self, memory: Tensor) -> Tensor:
        """The value in a real arena (bytes)."""
        return memory.view(torch.float32).as_strided(self.view.shape, self.view.stride(), self.offset // 4)

    @property
    def padded(self) -> bool:
        return any(n for pair in self.halo for n in pair)

    def fits(self, form: Form, halo: Halo) -> bool:
        """Whether it can be read as it is by who wants a form and a halo."""
        wanted = any(n for pair in halo for n in pair)
        if self.form is form:
            return not wanted or widest(self.halo, halo) == self.halo
        rank = self.view.dim()
        by_channel = rank > 2 and (self.view.stride(1) == 1 or self.view.shape[1] == 1)
        return form is Form.LAST and by_channel and not wanted

    def part(self, axis: int, start: int, size: int) -> Place:
        """Some channels or images (axes 0 and 1); other axes have no halo of their own inside."""
        view = self.view.narrow(axis, start, size)
        return Place(self.buffer, view, self.form, self.halo) if axis < 2 else Place(self.buffer, view)

    def shares(self, view: Tensor) -> bool:
        return bool(view.untyped_storage()._cdata == self.view.untyped_storage()._cdata)


def allocate(shape: Shape, form: Form = Form.PLAIN, halo: Halo = (), base: int = 0) -> Place:
    """A value in a buffer of its own."""
    if form is Form.PLAIN or len(shape) < 3:
        view = torch.empty(shape, device="meta")
        return Place(Buffer(view.numel(), base), view)
    halo = halo or no_halo(len(shape))
    return {Form.LAST: _last, Form.PLANAR: _planar, Form.IMAGES: _images, Form.PAIRS: _pairs}[form](shape, halo)


def _last(shape: Shape, halo: Halo) -> Place:
    n, c, *spatial = shape
    full = [size + low + high for size, (low, high) in zip(spatial, halo, strict=True)]
    whole = torch.empty((n, *full, c), device="meta")
    for axis, (size, (low, _)) in enumerate(zip(spatial, halo, strict=True), 1):
        whole = whole.narrow(axis, low, size)
    count = n * math.prod(full) * c
    return Place(Buffer(count), whole.permute(0, -1, *range(1, len(shape) - 1)), Form.LAST, halo)


def _pairs(shape: Shape, halo: Halo) -> Place:
    n, c, *spatial = shape
    return replace(_last((n, -(-c // 2), *spatial), halo), form=Form.PAIRS)


def _planar(shape: Shape, halo: Halo) -> Place:
    """[C][N][*D][H][W]: what follows a row (an image, a channel) is both its own halo and the next one's."""
    n, c, *spatial = shape
    steps = [size + max(pair) for size, pair in zip(spatial, halo, strict=True)]
    strides = [math.prod(steps[axis + 1:]) for axis in range(len(spatial))]
    image = math.prod(steps)
    before = sum(max(pair) * stride for pair, stride in zip(halo, strides, strict=True))
    before = -(-before // ALIGNMENT) * ALIGNMENT
    plane = n * image
    count = before + c * plane + before + ALIGNMENT
    storage = torch.empty(count, device="meta")
    view = storage.as_strided(shape, (image, plane, *strides), before)
    return Place(Buffer(count), view, Form.PLANAR, halo)


def _images(shape: Shape, halo: Halo) -> Place:
    """[C][*D][H][W][N]; a register may reach beyond the images that there are."""
    n, c, *spatial = shape
    full = [size + low + high for size, (low, high) in zip(spatial, halo, strict=True)]
    whole = torch.empty((c, *full, -(-n // ALIGNMENT) * ALIGNMENT), device="meta")
    count = whole.numel() + ALIGNMENT
    for axis, (size, (low, _)) in enumerate(zip(spatial, halo, strict=True), 1):
        whole = whole.narrow(axis, low, size)
    return Place(Buffer(count), whole.movedim(-1, 0)[:n], Form.IMAGES, halo)
