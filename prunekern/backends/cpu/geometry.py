"""A convolution at one shape, as numbers; and the tables that make a matrix product of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekern.backends.cpu.place import Halo
from prunekern.core.graph import Shape
from prunekern.core.program import Step

if TYPE_CHECKING:
    from prunekern.backends.cpu.builder import Builder


@dataclass(frozen=True)
class Geometry:
    """A `conv` Step: sizes of one image, and the window. All tuples have one entry per spatial axis."""

    batch: int
    channels: int
    outputs: int
    sizes: Shape
    out: Shape
    kernel: Shape
    stride: Shape
    dilation: Shape
    padding: Halo
    groups: int

    @classmethod
    def of(cls, builder: Builder, step: Step) -> Geometry:
        at, (batch, channels, *sizes) = step.attributes, builder.shape(step.inputs[0])
        _, outputs, *out = builder.shape(step.output)
        kernel, stride, dilation = (tuple(at[name]) for name in ("kernel", "stride", "dilation"))
        padding = tuple((int(low), int(high)) for low, high in at["padding"])
        return cls(batch, channels, outputs, tuple(sizes), tuple(out), kernel, stride, dilation, padding, at["groups"])

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def positions(self) -> int:
        return math.prod(self.out)

    @property
    def depth(self) -> int:
        """K of the GEMM of a group."""
        return math.prod(self.kernel) * self.channels // self.groups

    @property
    def macs(self) -> int:
        return self.batch * self.positions * self.outputs * self.depth

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.channels

    def halo(self) -> Halo:
        """How far windows reach beyond the input."""
        return tuple((low, max(0, (out - 1) * stride + dilation * (kernel - 1) + 1 - size - low))
                     for (low, _), out, stride, dilation, kernel, size in
                     zip(self.padding, self.out, self.stride, self.dilation, self.kernel, self.sizes, strict=True))


def grid(counts: Sequence[int], steps: Sequence[int], start: int = 0) -> Tensor:
    """``start + sum_i index_i * steps_i`` over all indices, the last one fastest."""
    total = torch.tensor(start)
    for count, step in zip(counts, steps, strict=True):
        total = total.unsqueeze(-1) + torch.arange(count) * step
    return total.reshape(-1)


def runs(taps: Sequence[int], channel_stride: int, channels: int) -> list[int]:
    """Offsets of taps and the channels at each, as segments [offset, length, ...]: those that touch are one."""
    if channel_stride != 1 and channels > 1:
        raise ValueError("channels must be next to each other")
    found: list[int] = []
    for tap in taps:
        if found and found[-2] + found[-1] == tap:
            found[-1] += channels
        else:
            found += [tap, channels]
    return found
