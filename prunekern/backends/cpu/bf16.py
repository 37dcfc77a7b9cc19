"""``dtype="bf16"``: matrix products of bf16 numbers that are summed up in fp32 (AVX512-BF16's ``vdpbf16ps``).

Values stay fp32 between steps. What a GEMM multiplies is rounded to bf16 first (8 bits of precision, fp32's range): the
weights once, activations by the op `to_bf16`, into a buffer of pairs of neighbouring channels. A pair takes the room of
a float, so all that the engine knows about floats (views, halos, offsets, packing) is true for half as many pairs; only
the instruction that multiplies them is another one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from prunekern.backends.cpu.builder import Builder, Ref
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.native import extension, isa
from prunekern.backends.cpu.place import Place, allocate
from prunekern.core.program import Slot

ROW = "bf16"        # of lower/tolerance.py
GEMM = "bf16 GEMM"


def unavailable() -> str | None:
    """Why bf16 cannot be used here, or None."""
    name = isa().name
    return None if extension().runs_bf16(name) else \
        f"the instruction set in use, {name}, has no bf16 here (AVX512-BF16 has: Zen 4, Cooper Lake and newer)"


def pairs(values: Tensor) -> Tensor:
    """Rounds to bf16: ``[..., K]`` as ``[..., ceil(K / 2)]`` floats, each of which is the bits of two numbers; an odd
    K gets a zero."""
    padded = functional.pad(values.detach(), (0, values.shape[-1] % 2))
    *lead, depth = padded.shape
    return padded.bfloat16().flatten().view(torch.float32).view(*lead, depth // 2)


def takes(geometry: Geometry) -> str | None:
    """Why a convolution cannot be done in pairs of channels, or None."""
    if geometry.groups > 1 and geometry.channels // geometry.groups % 2:
        return "pairs of channels would reach across groups"
    return None


def paired(geometry: Geometry) -> Geometry:
    """With pairs for channels."""
    return replace(geometry, channels=-(-geometry.channels // 2))


def rows(builder: Builder, slot: Slot, x: Place) -> Place:
    """A value as pairs along its last axis, which ``x`` has without gaps."""
    *counts, depth = x.view.shape

    def make() -> Place:
        y = allocate((*counts, -(-depth // 2)))
        builder.emit("to_bf16", x=_last_as_channels(x), y=_last_as_channels(y))
        return y
    return builder.once((slot.name, "pairs of the last axis"), make)


def _last_as_channels(place: Place) -> Ref:
    last = place.view.dim() - 1
    lead: list[int | None] = [*[None] * (4 - last), *range(last)]
    return Ref(place, (lead[0], last, *lead[1:]))
