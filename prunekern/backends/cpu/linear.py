"""Linear layers as matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from prunekern.backends.cpu import bf16
from prunekern.backends.cpu.builder import Builder, Ref
from prunekern.backends.cpu.gemm import Fields, is_half
from prunekern.backends.cpu.geometry import grid, runs
from prunekern.backends.cpu.layout import Need
from prunekern.backends.cpu.pack import pack_gemm
from prunekern.backends.cpu.place import Form, Place
from prunekern.core.program import Slot, Step


class Linear:
    """Rows times the weight. A flattened image is not copied: the layer is a convolution with a window of its size."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return None

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        return ()

    def gives(self, builder: Builder, step: Step) -> Form:
        return Form.PLAIN

    def emit(self, builder: Builder, step: Step) -> None:
        pairs = builder.settings.dtype == "bf16"
        builder.algorithms[step.name] = bf16.GEMM if pairs else "GEMM"
        x_slot, y = step.inputs[0], builder.write(step.output)
        source = builder.flat.get(x_slot.name)
        if source is not None:
            self._emit_flat(builder, step, source, y, pairs)
            return
        x = _dense_last(builder, x_slot)
        x = bf16.rows(builder, x_slot, x) if pairs else x
        *counts, _ = x.view.shape
        fields: Fields = {"in_table": builder.table(grid(counts, x.view.stride()[:-1])),
                          "segments": [0, x.view.shape[-1]]}
        self._emit(builder, step, x, y, fields, None, pairs)

    def _emit_flat(self, builder: Builder, step: Step, source: Slot, y: Place, pairs: bool) -> None:
        x = builder.want(source, Form.PAIRS) if pairs else builder.read(source)
        batch, channels, *sizes = x.view.shape
        image_stride, channel, *strides = x.view.stride()
        last = pairs or channel == 1 or channels == 1
        if last:
            segments = runs(grid(sizes, strides).tolist(), 1, channels)
        else:
            segments = runs(grid((channels, *sizes[:-1]), (channel, *strides[:-1])).tolist(), 1, sizes[-1])
        fields: Fields = {"in_table": builder.table(torch.arange(batch) * image_stride), "segments": segments}
        turned = (builder.shape(source)[1], math.prod(sizes)) if last else None
        self._emit(builder, step, x, y, fields, turned, pairs)

    def _emit(self, builder: Builder, step: Step, x: Place, y: Place, fields: Fields,
              turned: tuple[int, int] | None, pairs: bool) -> None:
        """turned: (channels, positions) of the features, where memory has them the other way round."""
        name, half, lanes = step.weights["weight"], not pairs and is_half(builder, step), builder.isa.lanes
        outputs, (*counts, _) = builder.weight(name).shape[0], y.view.shape
        if pairs:
            builder.rows[step.name] = bf16.ROW

        def make() -> Tensor:
            weight = builder.weight(name)
            if turned is not None:
                weight = weight.view(outputs, *turned).transpose(1, 2)
            rows = bf16.pairs(weight) if pairs else weight
            return pack_gemm(rows.reshape(1, outputs, -1), builder.isa, half)
        if step.epilogue.residual is not None:
            residual = _dense_last(builder, step.epilogue.residual)
            fields["residual_table"] = builder.table(grid(counts, residual.view.stride()[:-1]))
        builder.emit("gemm", x=_whole(x), y=_whole(y), places=math.prod(counts),
                     out_table=builder.table(grid(counts, y.view.stride()[:-1])), outputs=outputs, half=int(half),
                     pairs=int(pairs), weight=builder.packed(("linear", name, turned, lanes, half, pairs), make),
                     **fields, **builder.epilogue(step, residual_axes=lambda _: _whole(residual)))


def _whole(place: Place) -> Ref:
    """As one image whose positions tables list."""
    return Ref(place, (None, None, None, None, None))


def _dense_last(builder: Builder, slot: Slot) -> Place:
    """A slot whose last axis is contiguous; copied if it is not."""
    place = builder.read(slot)
    if place.view.stride(-1) == 1 or place.view.shape[-1] == 1:
        return place
    return builder.dense(slot)
