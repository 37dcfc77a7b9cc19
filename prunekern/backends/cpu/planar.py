"""Convolutions whose lanes are pixels, or images of the batch: the ops `planar_conv` and `planar_pool` of
``csrc/cpu/kernels/planar.cpp``.

Channels-last kernels have output channels in their lanes, and their cost jumps at every multiple of a register. Here
each register of inputs is multiplied with one weight of each of up to nine output channels, so a layer costs what its
channels cost: what pruned networks, with their 5, 13 or 37 channels, need.

Two arrangements. With pixels in the lanes (``Form.PLANAR``) registers run over row ends; what they hold of the halo
between rows is computed for nothing (a share of 1 / (width + halo)), and so is the end of an image. With images in the
lanes (``Form.IMAGES``) nothing is: every load is aligned and every lane counts, once the batch fills a register.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekern.backends.cpu.builder import Builder, image
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.native import Isa
from prunekern.backends.cpu.pack import aligned
from prunekern.backends.cpu.place import Form
from prunekern.core.program import Step

def widest(isa: Isa) -> int:
    """Most output channels of a block (``kWidest`` of planar.h)."""
    return 9 if isa.lanes == 16 else 6


def blocks(outputs: int, groups: int, most: int) -> list[int]:
    """Output channels of each block: as few blocks as can be and as even, none across a border of groups."""
    each = outputs // groups
    count = -(-each // most)
    return [each * (i + 1) // count - each * i // count for i in range(count)] * groups


def pack(weight: Tensor, sizes: list[int]) -> Tensor:
    """Weights [O, C / groups, *kernel] as ``[C / groups, *kernel, block]``, block after block."""
    return aligned(torch.cat([part.flatten(1).t().reshape(-1) for part in weight.detach().float().split(sizes)]))


def takes(geometry: Geometry) -> str | None:
    """Why it cannot run a convolution with pixels in the lanes, or None."""
    return "it takes one or two spatial axes" if geometry.rank > 2 else None


def takes_images(geometry: Geometry) -> str | None:
    """Why images in the lanes do not suit a convolution, or None."""
    return takes(geometry) or ("there are few images" if geometry.batch < 8 else None)


def emit(builder: Builder, step: Step, geometry: Geometry) -> None:
    """With pixels in the lanes."""
    _emit(builder, step, geometry, Form.PLANAR)


def emit_images(builder: Builder, step: Step, geometry: Geometry) -> None:
    """With images in the lanes."""
    _emit(builder, step, geometry, Form.IMAGES)


def _emit(builder: Builder, step: Step, geometry: Geometry, form: Form) -> None:
    x, y, name = builder.want(step.inputs[0], form), builder.write(step.output), step.weights["weight"]
    sizes = blocks(geometry.outputs, geometry.groups, widest(builder.isa))
    weight = builder.packed(("planar", name, *sizes), lambda: pack(builder.weight(name), sizes))
    builder.emit("planar_conv", x=image(x), y=image(y), weight=weight, blocks=sizes, groups=geometry.groups,
                 kernel=_two(geometry.kernel, 1), stride=_two(geometry.stride, 1), dilation=_two(geometry.dilation, 1),
                 pad=_two([low for low, _ in geometry.padding], 0), pitch=_two(x.view.stride()[2:], 0),
                 images=int(form is Form.IMAGES), **builder.epilogue(step, form=form))


def _two(values: tuple[int, ...] | list[int], missing: int) -> list[int]:
    """Height and width; a sequence has width only."""
    return [*[missing] * (2 - len(values)), *values]
