"""Convolutions as matrix products: windows found through tables of offsets, or copied into rows first."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekern.backends.cpu import bf16
from prunekern.backends.cpu.builder import Builder, Ref, image
from prunekern.backends.cpu.geometry import Geometry, grid, runs
from prunekern.backends.cpu.native import Field
from prunekern.backends.cpu.pack import fits_half, pack_gemm
from prunekern.backends.cpu.place import Form, Place
from prunekern.core.program import Step

Fields = dict[str, Field | Ref]
POINTWISE = "1x1 GEMM"


def emit(builder: Builder, step: Step, geometry: Geometry, form: Form = Form.LAST) -> None:
    """Implicit: windows are found through offsets, nothing is copied. form: of the input, LAST or PAIRS (bf16.py)."""
    residual = step.epilogue.residual
    emit_on(builder, step, geometry, builder.want(step.inputs[0], form), builder.write(step.output),
            None if residual is None else builder.want(residual, Form.LAST))


def emit_on(builder: Builder, step: Step, geometry: Geometry, x: Place, y: Place, residual: Place | None) -> None:
    """The same on given places, which may be parts of what the step works on."""
    pairs = x.form is Form.PAIRS
    read = bf16.paired(geometry) if pairs else geometry
    builder.emit("gemm", x=image(x), y=image(y), **_tables(builder, x, y, read),
                 **_weights(builder, step, geometry, pairs), **_epilogue(builder, step, geometry, residual),
                 groups=read.groups, group_in=read.channels // read.groups)


def emit_im2col(builder: Builder, step: Step, geometry: Geometry) -> None:
    """Explicit: the windows are copied into the rows of a matrix first."""
    x, y = builder.want(step.inputs[0], Form.LAST), builder.write(step.output)
    fields = _tables(builder, x, y, geometry)
    rows = geometry.batch * geometry.positions
    matrix = builder.temporary(rows * geometry.depth)
    matrix = Place(matrix.buffer, matrix.view.view(geometry.batch, geometry.depth, geometry.positions))
    builder.emit("im2col", x=image(x), y=image(matrix), places=geometry.positions, in_table=fields["in_table"],
                 segments=fields["segments"])
    dense = Place(matrix.buffer, matrix.view.view(geometry.batch, geometry.positions, geometry.depth).mT)
    fields.update(segments=[0, geometry.depth],
                  in_table=builder.table(torch.arange(geometry.positions) * geometry.depth))
    residual = None if step.epilogue.residual is None else builder.want(step.epilogue.residual, Form.LAST)
    builder.emit("gemm", x=image(dense), y=image(y), **fields, **_weights(builder, step, geometry),
                 **_epilogue(builder, step, geometry, residual))


def _tables(builder: Builder, x: Place, y: Place, geometry: Geometry) -> Fields:
    """Where windows start, what a window is made of, where results go."""
    _, channel, *strides = x.view.stride()
    _, _, *out_strides = y.view.stride()
    starts = grid(geometry.out, [s * n for s, n in zip(strides, geometry.stride, strict=True)],
                  -sum(s * low for s, (low, _) in zip(strides, geometry.padding, strict=True)))
    taps = grid(geometry.kernel, [s * d for s, d in zip(strides, geometry.dilation, strict=True)])
    each = geometry.channels // geometry.groups
    found: Fields = {"places": geometry.positions, "in_table": builder.table(starts),
                     "out_table": builder.table(grid(geometry.out, out_strides)),
                     "segments": runs(taps.tolist(), channel, each)}
    return found


def _weights(builder: Builder, step: Step, geometry: Geometry, pairs: bool = False) -> Fields:
    name, groups = step.weights["weight"], geometry.groups
    half = not pairs and is_half(builder, step)

    def make() -> Tensor:
        weight = builder.weight(name).movedim(1, -1)                                     # (*kernel, c)
        rows = bf16.pairs(weight) if pairs else weight
        return pack_gemm(rows.reshape(groups, len(rows) // groups, -1), builder.isa, half)
    return {"outputs": geometry.outputs // groups, "half": int(half), "pairs": int(pairs),
            "weight": builder.packed(("gemm", name, groups, builder.isa.lanes, half, pairs), make)}


def is_half(builder: Builder, step: Step) -> bool:
    """Whether this step's weights are stored as fp16; its algorithm tells where they should be and cannot."""
    if builder.settings.weights != "fp16":
        return False
    if not fits_half(builder.weight(step.weights["weight"])):
        builder.algorithms[step.name] += ", fp32 weights (beyond the range of fp16)"
        return False
    builder.rows[step.name] = "fp16 weights"
    return True


def _epilogue(builder: Builder, step: Step, geometry: Geometry, residual: Place | None) -> Fields:
    """With the rows of the residual."""
    if residual is None:
        return builder.epilogue(step, geometry.groups)
    fields = builder.epilogue(step, geometry.groups, lambda _: image(residual), Form.LAST)
    return {**fields, "residual_table": builder.table(grid(geometry.out, residual.view.stride()[2:]))}
