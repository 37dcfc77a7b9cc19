"""Convolutions and linear layers as ops of the engine: which algorithms there are, and the GEMM ones.

An algorithm says what it takes, in which form it reads and writes (with which halo), and emits its ops. Which one
runs is the tuner's choice (tune.py), or that of ``favourite`` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from prunekern.backends.cpu import depthwise, planar, winograd
from prunekern.backends.cpu.builder import Builder, Need, Ref, image
from prunekern.backends.cpu.geometry import Geometry, grid, runs
from prunekern.backends.cpu.native import Field
from prunekern.backends.cpu.pack import pack_gemm
from prunekern.backends.cpu.place import Form, Halo, Place
from prunekern.core.program import Slot, Step

Fields = dict[str, Field | Ref]


@dataclass(frozen=True)
class Algorithm:
    """A way to run a `conv` Step. takes: why it cannot run a geometry, or None. error: its row in
    ``lower/tolerance.py``. tuned: whether the tuner tries it (else it runs only where it is asked for)."""

    name: str
    form: Form
    takes: Callable[[Geometry], str | None]
    emit: Callable[[Builder, Step, Geometry], None]
    halo: Callable[[Geometry], Halo] = Geometry.halo
    error: str = "direct"
    tuned: bool = True


# ---- GEMM ------------------------------------------------------------------------------------------------------


def emit_gemm(builder: Builder, step: Step, geometry: Geometry) -> None:
    """Implicit: windows are found through offsets, nothing is copied."""
    x, y = builder.want(step.inputs[0], Form.LAST), builder.write(step.output)
    fields = _tables(builder, x, y, geometry)
    builder.emit("gemm", x=image(x), y=image(y), **fields, **_weights(builder, step, geometry),
                 **_residual(builder, step), groups=geometry.groups,
                 group_in=geometry.channels // geometry.groups)


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
    builder.emit("gemm", x=image(dense), y=image(y), **fields, **_weights(builder, step, geometry),
                 **_residual(builder, step))


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


def _weights(builder: Builder, step: Step, geometry: Geometry) -> Fields:
    name, groups, half = step.weights["weight"], geometry.groups, _half(builder, step)

    def make() -> Tensor:
        weight = builder.weight(name)
        rows = weight.movedim(1, -1).reshape(groups, weight.shape[0] // groups, -1)      # (*kernel, c)
        return pack_gemm(rows, builder.isa, half)
    return {"outputs": geometry.outputs // groups, "half": int(half),
            "weight": builder.packed(("gemm", name, groups, builder.isa.lanes, half), make),
            **builder.epilogue(step, groups, form=Form.LAST)}


def _half(builder: Builder, step: Step) -> bool:
    """Whether this step's weights are stored as fp16."""
    if builder.settings.weights != "fp16":
        return False
    builder.rows[step.name] = "fp16 weights"
    return True


def _residual(builder: Builder, step: Step) -> Fields:
    """Where the residual's rows are."""
    if step.epilogue.residual is None:
        return {}
    _, _, *strides = builder.want(step.epilogue.residual, Form.LAST).view.stride()
    return {"residual_table": builder.table(grid(builder.shape(step.output)[2:], strides))}


def _any(geometry: Geometry) -> str | None:
    return None


def _windowed(geometry: Geometry) -> str | None:
    if math.prod(geometry.kernel) == 1:
        return "a 1x1 window is a row already"
    return "it takes one group" if geometry.groups > 1 else None


GEMM = Algorithm("implicit GEMM", Form.LAST, _any, emit_gemm)
IM2COL = Algorithm("im2col", Form.LAST, _windowed, emit_im2col)
DEPTHWISE = Algorithm("depthwise", Form.LAST, depthwise.takes, depthwise.emit)
PLANAR = [Algorithm("planar", Form.PLANAR, planar.takes, planar.emit),
          Algorithm("planar by images", Form.IMAGES, planar.takes_images, planar.emit_images)]
WINOGRAD = {m: Algorithm(f"winograd {m}x{m}", Form.LAST, winograd.takes, partial(winograd.emit, m),
                         error=f"winograd {m}x{m}") for m in winograd.POINTS}


# ---- which one -------------------------------------------------------------------------------------------------


def algorithms() -> dict[str, Algorithm]:
    """Every way to run a convolution, by name; the last resort first."""
    return {each.name: each for each in (GEMM, IM2COL, DEPTHWISE, *WINOGRAD.values(), *PLANAR)}


def candidates(geometry: Geometry) -> list[Algorithm]:
    return [each for each in algorithms().values() if each.takes(geometry) is None]


FEW_TILES = 8           # of Winograd: below, its weights (4 times the layer's) take longer to read than it saves
LARGE = 1 << 20         # floats of them that no cache near the core holds
WASTE = 1.4             # lanes that registers of output channels have over what is used, from which pixels suit better


def favourite(builder: Builder, geometry: Geometry) -> Algorithm:
    """A sound guess, where nothing was measured: what the benchmarks favour for geometries of this kind."""
    if geometry.is_depthwise:
        return DEPTHWISE
    if winograd.takes(geometry) is None and min(geometry.channels, geometry.outputs) >= 8 \
            and min(geometry.out) >= 4:
        tiles = geometry.batch * math.prod(-(-size // 4) for size in geometry.out)
        return WINOGRAD[4] if tiles >= FEW_TILES or 36 * geometry.channels * geometry.outputs < LARGE else GEMM
    wasteful = builder.isa.padded(geometry.outputs) > WASTE * geometry.outputs
    dense = geometry.groups == 1 and math.prod(geometry.kernel) > 1 and set(geometry.stride) == {1}
    return PLANAR[0] if wasteful and dense and planar.takes(geometry) is None else GEMM


def chosen(builder: Builder, step: Step) -> tuple[Algorithm, Geometry]:
    """The algorithm of a step: what was asked for where it can, else a guess."""
    geometry = Geometry.of(builder, step)
    wanted = algorithms().get(builder.settings.choices.get(step.name, ""))
    if wanted is not None and wanted.takes(geometry) is None:
        return wanted, geometry
    return favourite(builder, geometry), geometry


class Conv:
    """See ``builder.Compiler``."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return "more than three spatial axes" if len(step.output.shape) > 5 else None

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        algorithm, geometry = chosen(builder, step)
        yield Need(step.inputs[0], algorithm.form, algorithm.halo(geometry))
        if step.epilogue.residual is not None:
            yield Need(step.epilogue.residual, algorithm.form)

    def gives(self, builder: Builder, step: Step) -> Form:
        return chosen(builder, step)[0].form

    def emit(self, builder: Builder, step: Step) -> None:
        algorithm, geometry = chosen(builder, step)
        builder.algorithms[step.name] = "1x1 GEMM" if algorithm is GEMM and math.prod(geometry.kernel) == 1 \
            else algorithm.name
        builder.rows[step.name] = algorithm.error
        algorithm.emit(builder, step, geometry)


# ---- transposed ------------------------------------------------------------------------------------------------


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


# ---- linear ----------------------------------------------------------------------------------------------------


class Linear:
    """Rows times the weight. A flattened image is not copied: the layer is a convolution with a window of its size."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return None

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        return ()

    def gives(self, builder: Builder, step: Step) -> Form:
        return Form.PLAIN

    def emit(self, builder: Builder, step: Step) -> None:
        builder.algorithms[step.name] = "GEMM"
        x_slot, y = step.inputs[0], builder.write(step.output)
        source = builder.flat.get(x_slot.name)
        if source is not None:
            self._emit_flat(builder, step, source, y)
            return
        x = _dense_last(builder, x_slot)
        *counts, _ = x.view.shape
        fields: Fields = {"in_table": builder.table(grid(counts, x.view.stride()[:-1])),
                          "segments": [0, x.view.shape[-1]]}
        self._emit(builder, step, x, y, fields, None)

    def _emit_flat(self, builder: Builder, step: Step, source: Slot, y: Place) -> None:
        x = builder.read(source)
        batch, channels, *sizes = x.view.shape
        image_stride, channel, *strides = x.view.stride()
        last = channel == 1 or channels == 1
        if last:
            segments = runs(grid(sizes, strides).tolist(), 1, channels)
        else:
            segments = runs(grid((channels, *sizes[:-1]), (channel, *strides[:-1])).tolist(), 1, sizes[-1])
        fields: Fields = {"in_table": builder.table(torch.arange(batch) * image_stride), "segments": segments}
        self._emit(builder, step, x, y, fields, (channels, math.prod(sizes)) if last else None)

    def _emit(self, builder: Builder, step: Step, x: Place, y: Place, fields: Fields,
              turned: tuple[int, int] | None) -> None:
        """turned: (channels, positions) of the features, where memory has them the other way round."""
        name, half, lanes = step.weights["weight"], _half(builder, step), builder.isa.lanes
        outputs, (*counts, _) = builder.weight(name).shape[0], y.view.shape

        def make() -> Tensor:
            weight = builder.weight(name)
            if turned is not None:
                weight = weight.view(outputs, *turned).transpose(1, 2).reshape(outputs, -1)
            return pack_gemm(weight.unsqueeze(0), builder.isa, half)
        if step.epilogue.residual is not None:
            residual = _dense_last(builder, step.epilogue.residual)
            fields["residual_table"] = builder.table(grid(counts, residual.view.stride()[:-1]))
        builder.emit("gemm", x=_whole(x), y=_whole(y), places=math.prod(counts),
                     out_table=builder.table(grid(counts, y.view.stride()[:-1])), outputs=outputs, half=int(half),
                     weight=builder.packed(("linear", name, turned, lanes, half), make), **fields,
                     **builder.epilogue(step, residual_axes=lambda _: _whole(residual)))


def _whole(place: Place) -> Ref:
    """As one image whose positions tables list."""
    return Ref(place, (None, None, None, None, None))


def _dense_last(builder: Builder, slot: Slot) -> Place:
    """A slot whose last axis is contiguous; copied if it is not."""
    place = builder.read(slot)
    if place.view.stride(-1) == 1 or place.view.shape[-1] == 1:
        return place
    return builder.dense(slot)
