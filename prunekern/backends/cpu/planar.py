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

POOLS = {"max": 1, "avg": 2}
CLAMPS = ("relu", "clamp", "clamp_min", "clamp_max")

# Cycles for each register and channel that pooling in registers saves: of storing and loading it again (measured).
POOLING = 5


def widest(isa: Isa, pooled: bool = False) -> int:
    """Most output channels of a block (``kWidest`` and ``kQuadWidest`` of planar.h)."""
    return (6 if pooled else 9) if isa.lanes == 16 else (2 if pooled else 6)


def blocks(outputs: int, groups: int, most: int) -> list[int]:
    """Output channels of each block: as few blocks as can be and as even, none across a border of groups."""
    each = outputs // groups
    count = -(-each // most)
    return [each * (i + 1) // count - each * i // count for i in range(count)] * groups


def pack(weight: Tensor, sizes: list[int]) -> Tensor:
    """Weights [O, C / groups, *kernel] as ``[C / groups, *kernel, block]``, block after block."""
    return aligned(torch.cat([part.flatten(1).t().reshape(-1) for part in weight.detach().float().split(sizes)]))


def halves(builder: Builder, pool: Step) -> bool:
    """Whether a Step pools 2 x 2 with stride 2, and no window sticks out."""
    if pool.op != "pool" or len(pool.output.shape) != 4:
        return False
    at, sizes, out = pool.attributes, builder.shape(pool.inputs[0])[2:], builder.shape(pool.output)[2:]
    return (list(at["kernel"]) == [2, 2] == list(at["stride"]) and not at["divisor"] and set(at["dilation"]) == {1}
            and not any(n for pair in at["padding"] for n in pair)
            and all(2 * n <= size for n, size in zip(out, sizes, strict=True)))


def pooled_after(builder: Builder, step: Step, geometry: Geometry, form: Form) -> Step | None:
    """The pooling that a convolution can do in registers: ``halves``, of nobody else's input, after a clamp at most.
    None too where it would not pay: with pixels in the lanes, pairs of rows are cut into registers one by one, so
    narrow images leave more lanes empty, and a cycle is lost for every product of those."""
    users, activation = builder.consumers[step.output.name], step.epilogue.activation
    if len(users) != 1 or users[0].name in builder.foreign or step.output in builder.program.output_slots \
            or step.epilogue.residual is not None or (activation and activation.kind not in CLAMPS) \
            or not halves(builder, users[0]):
        return None
    height, width = builder.shape(users[0].output)[2:]
    pairs = height * -(-2 * width // builder.isa.lanes)
    quads, single = 4 * -(-pairs // 2), -(-2 * height * (geometry.out[1] + 1) // builder.isa.lanes)
    pays = form is Form.IMAGES or (quads - single) * geometry.depth < POOLING * single
    return users[0] if pays else None


def emit_pool(builder: Builder, step: Step) -> bool:
    """A `pool` Step by the op `planar_pool`, where that takes it."""
    x, y = builder.read(step.inputs[0]), builder.write(step.output)
    if x.form is not Form.PLANAR or y.form is not Form.PLANAR or not halves(builder, step):
        return False
    builder.emit("planar_pool", x=image(x), y=image(y), kind=POOLS[step.attributes["kind"]])
    return True


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
    pool = pooled_after(builder, step, geometry, form)
    x, y = builder.want(step.inputs[0], form), builder.absorb(pool, step) if pool else builder.write(step.output)
    name, sizes = step.weights["weight"], blocks(geometry.outputs, geometry.groups, widest(builder.isa, bool(pool)))
    weight = builder.packed(("planar", name, *sizes), lambda: pack(builder.weight(name), sizes))
    builder.emit("planar_conv", x=image(x), y=image(y), weight=weight, blocks=sizes, groups=geometry.groups,
                 kernel=_two(geometry.kernel, 1), stride=_two(geometry.stride, 1), dilation=_two(geometry.dilation, 1),
                 pad=_two([low for low, _ in geometry.padding], 0), pitch=_two(x.view.stride()[2:], 0),
                 images=int(form is Form.IMAGES), pool=POOLS[pool.attributes["kind"]] if pool else 0,
                 **builder.epilogue(step, form=form))


def _two(values: tuple[int, ...] | list[int], missing: int) -> list[int]:
    """Height and width; a sequence has width only."""
    return [*[missing] * (2 - len(values)), *values]
