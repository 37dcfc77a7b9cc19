"""Depthwise convolution (csrc/cpu/kernels/depthwise.cpp): a vector of channels at a time, no matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekern.backends.cpu.builder import Builder, image, spatial
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.place import Form, Place
from prunekern.core.program import Step


def takes(geometry: Geometry) -> str | None:
    """Why it cannot run a convolution, or None."""
    return None if geometry.channels == geometry.groups else "every input channel has a group of its own in it"


def pack(weight: Tensor, lanes: int) -> Tensor:
    """``[O, 1, *kernel]`` as [taps, O padded to whole registers]."""
    outputs = weight.shape[0]
    taps = weight.detach().float().reshape(outputs, -1).t()
    return torch.nn.functional.pad(taps, (0, -outputs % lanes)).contiguous()


def emit(builder: Builder, step: Step, geometry: Geometry) -> None:
    emit_on(builder, step, geometry, builder.want(step.inputs[0], Form.LAST), builder.write(step.output))


def emit_on(builder: Builder, step: Step, geometry: Geometry, x: Place, y: Place) -> None:
    """On given places, which may be parts of what the step works on."""
    name, lanes = step.weights["weight"], builder.isa.lanes
    weight = builder.packed(("depthwise", name, lanes), lambda: pack(builder.weight(name), lanes))
    builder.emit("depthwise", x=image(x), y=image(y), weight=weight, channels=builder.isa.padded(geometry.outputs),
                 multiplier=geometry.outputs // geometry.channels, kernel=spatial(geometry.kernel, 1),
                 stride=spatial(geometry.stride, 1), padding=spatial([low for low, _ in geometry.padding]),
                 dilation=spatial(geometry.dilation, 1), **builder.epilogue(step, form=Form.LAST))
