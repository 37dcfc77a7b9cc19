"""Transposed convolutions as matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from prunekern.backends.cpu.builder import Builder, image
from prunekern.backends.cpu.gemm import Fields
from prunekern.backends.cpu.geometry import grid, runs
from prunekern.backends.cpu.layout import Need
from prunekern.backends.cpu.pack import pack_gemm
from prunekern.backends.cpu.place import Form, Place
from prunekern.core.program import Step


@dataclass(frozen=True)
class _Phase:
    """Outputs ``o = start, start + stride, ...`` along one axis: the taps that reach them, and the input index that
    each tap reads for the first of them."""

    start: int
    count: int
    taps: tuple[int, ...]
    reads: tuple[int, ...]


def _phases(out: int, kernel: int, stride: int, dilation: int, low: int) -> list[_Phase]:
    found = []
    for start in range(min(stride, out)):
        taps = [k for k in range(kernel) if (start + low - k * dilation) % stride == 0]
        found.append(_Phase(start, -(-(out - start) // stride), tuple(taps),
                            tuple((start + low - k * dilation) // stride for k in taps)))
    return found


class ConvTranspose:
    """One GEMM for each phase of the output: positions that the same taps reach (V. Dumoulin, F. Visin, "A guide to
    convolution arithmetic for deep learning", 2016, section 4)."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return None

    def _phases(self, builder: Builder, step: Step) -> list[list[_Phase]]:
        at, out = step.attributes, builder.shape(step.output)[2:]
        return [_phases(size, kernel, stride, dilation, low) for size, kernel, stride, dilation, (low, _) in
                zip(out, at["kernel"], at["stride"], at["dilation"], at["padding"], strict=True)]

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        halo = []
        for size, phases in zip(builder.shape(step.inputs[0])[2:], self._phases(builder, step), strict=True):
            lows = [min(p.reads, default=0) for p in phases]
            highs = [max(p.reads, default=0) + p.count - 1 for p in phases]
            halo.append((max(0, -min(lows)), max(0, max(highs) - size + 1)))
        yield Need(step.inputs[0], Form.LAST, tuple(halo))
        if step.epilogue.residual is not None:
            yield Need(step.epilogue.residual, Form.LAST)

    def gives(self, builder: Builder, step: Step) -> Form:
        return Form.LAST

    def emit(self, builder: Builder, step: Step) -> None:
        builder.algorithms[step.name] = "implicit GEMM by phases"
        x, y = builder.want(step.inputs[0], Form.LAST), builder.write(step.output)
        axes = self._phases(builder, step)
        counts = [len(phases) for phases in axes]
        for number, phase in enumerate(product(*axes)):
            self._emit_phase(builder, step, phase, number if math.prod(counts) > 1 else 0, x, y)

    def _emit_phase(self, builder: Builder, step: Step, phase: tuple[_Phase, ...], number: int, x: Place,
                    y: Place) -> None:
        groups, name, lanes = step.attributes["groups"], step.weights["weight"], builder.isa.lanes
        _, channel, *strides = x.view.stride()
        _, _, *out_strides = y.view.stride()
        starts = [p.start for p in phase]
        counts, stride = [p.count for p in phase], step.attributes["stride"]
        reached = all(p.taps for p in phase)
        taps = [sum(r * s for r, s in zip(reads, strides, strict=True))
                for reads in product(*(p.reads for p in phase))] if reached else [0]
        channels = builder.shape(step.inputs[0])[1] // groups
        outputs = builder.shape(step.output)[1] // groups

        def make() -> Tensor:
            weight = builder.weight(name)                                    # [I, O/g, *kernel]
            rows = weight.view(groups, channels, outputs, *weight.shape[2:])
            if not reached:                                                  # nothing but the bias arrives here
                return pack_gemm(rows.new_zeros(groups, outputs, channels), builder.isa)
            for axis, p in enumerate(phase):
                rows = rows.index_select(3 + axis, torch.tensor(p.taps))
            return pack_gemm(rows.transpose(1, 2).movedim(2, -1).reshape(groups, outputs, -1), builder.isa)

        def places(strides: list[int]) -> int:
            return builder.table(grid(counts, [s * n for s, n in zip(strides, stride, strict=True)],
                                      sum(s * n for s, n in zip(strides, starts, strict=True))))
        fields: Fields = {}
        if step.epilogue.residual is not None:
            fields["residual_table"] = places(list(builder.want(step.epilogue.residual, Form.LAST).view.stride()[2:]))
        builder.emit("gemm", x=image(x), y=image(y), places=math.prod(counts), outputs=outputs, groups=groups,
                     group_in=channels, in_table=builder.table(grid(counts, strides)), out_table=places(out_strides),
                     segments=runs(taps, channel, channels), half=0,
                     weight=builder.packed(("phase", name, number, groups, lanes), make),
                     **builder.epilogue(step, groups, form=Form.LAST), **fields)
