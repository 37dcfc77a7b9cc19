"""Inverted residuals in bands of rows: expand (1x1), depthwise, project (1x1) for a few rows at a time, so that what is
between them, several times as wide as either end, never leaves the second cache.

A chain of bands runs on one thread: the last rows of a band that the next one's windows reach are kept, nothing is
computed twice within a chain. Where there are fewer images than threads, an image is cut into several chains.
Source: M. Alwani et al., "Fused-Layer CNN Accelerators", MICRO 2016.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prunekern.backends.cpu import bf16, depthwise, gemm
from prunekern.backends.cpu.builder import Builder, image
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.place import Form, Place, allocate
from prunekern.core.program import Step

BYTES = 320 << 10           # of rows between the layers that are alive at a time
LARGE = 512 << 10           # bytes of one image's expanded value, from which a guess is for bands


@dataclass(frozen=True)
class Inverted:
    """The three steps, first to last."""

    expand: Step
    middle: Step
    project: Step


def takes(geometry: Geometry) -> str | None:
    """Why a convolution cannot be the first of the three, or None."""
    if not _is_pointwise(geometry) or geometry.outputs <= geometry.channels:
        return "it takes 1x1 convolutions that widen, before a depthwise one"
    return None


def pays(geometry: Geometry) -> bool:
    """A guess."""
    return takes(geometry) is None and 4 * geometry.outputs * geometry.positions >= LARGE


def find(builder: Builder, expand: Step) -> Inverted | None:
    """The inverted residual that starts with a step, if there is one and nothing of it is needed elsewhere."""
    middle = _only_user(builder, expand)
    project = None if middle is None else _only_user(builder, middle)
    if middle is None or project is None or not {middle.name, project.name}.isdisjoint(builder.foreign):
        return None
    inner, last, residual = Geometry.of(builder, middle), Geometry.of(builder, project), project.epilogue.residual
    fits = (inner.rank == 2 and _is_pointwise(last) and inner.is_depthwise and inner.outputs == inner.channels
            and inner.dilation == (1, 1) and inner.kernel[0] >= inner.stride[0]
            and all(builder.form(step.output) is Form.LAST for step in (expand, middle, project))
            and middle.epilogue.residual is None and expand.epilogue.residual is None
            and (residual is None or residual.name in builder.places))
    return Inverted(expand, middle, project) if fits else None


def _only_user(builder: Builder, step: Step) -> Step | None:
    users = builder.consumers[step.output.name]
    alone = len(users) == 1 and users[0].op == "conv" and step.output not in builder.program.output_slots
    return users[0] if alone and users[0].epilogue.residual != step.output else None


def _is_pointwise(geometry: Geometry) -> bool:
    return geometry.kernel == (1, 1) and geometry.stride == (1, 1) and geometry.groups == 1 \
        and not any(n for pair in geometry.padding for n in pair)


class Bands:
    """Emits one inverted residual. form: of what its GEMMs read, LAST or PAIRS (bf16.py)."""

    def __init__(self, builder: Builder, steps: Inverted, form: Form) -> None:
        self.builder, self.steps, self.form = builder, steps, form
        self.outer, self.inner, self.last = (Geometry.of(builder, step) for step in
                                             (steps.expand, steps.middle, steps.project))
        inner = self.inner
        self.kernel, self.stride, self.pad = inner.kernel[0], inner.stride[0], inner.padding[0][0]
        row = 4 * inner.channels * (inner.sizes[1] + sum(inner.halo()[1]))
        most = max(1, (BYTES // row - self.kernel) // self.stride + 1)
        count = -(-inner.out[0] // most)
        self.rows = -(-inner.out[0] // count)               # of the depthwise layer's output in a band
        self.ring_rows = (self.rows - 1) * self.stride + self.kernel
        self.ring = allocate((1, inner.channels, self.ring_rows, inner.sizes[1]), Form.LAST,
                             ((0, 0), inner.halo()[1]))
        self.between = allocate((1, inner.channels, self.rows, inner.out[1]), Form.LAST)
        self.rounded = allocate((1, inner.channels, self.rows, inner.out[1]), form)

    def emit(self) -> None:
        builder, steps = self.builder, self.steps
        self.x = builder.want(steps.expand.inputs[0], self.form)
        builder.absorbed[steps.middle.name] = steps.expand.name
        self.y = builder.absorb(steps.project, steps.expand)
        residual = steps.project.epilogue.residual
        self.residual = None if residual is None else builder.want(residual, Form.LAST)
        builder.local([self.ring, self.between, *([self.rounded] if self.form is Form.PAIRS else [])])
        bands = [(start, min(start + self.rows, self.inner.out[0]))
                 for start in range(0, self.inner.out[0], self.rows)]
        images, threads = self.outer.batch, builder.settings.threads
        pieces = 1 if images >= threads else min(threads, len(bands))
        for number in range(images):
            for piece in range(pieces):
                builder.chain()
                self._chain(number, bands[piece * len(bands) // pieces:(piece + 1) * len(bands) // pieces])
        builder.end_chains()

    def _chain(self, number: int, bands: list[tuple[int, int]]) -> None:
        """Bands [first, last) of the depthwise layer's output rows, one after another."""
        low, high = self.inner.halo()[1]
        if low or high:
            self.builder.emit("halo", y=image(self.ring), low=[0, 0, low], high=[0, 0, high])
        done = None                                          # input rows that are in the ring, from its first row on
        for first, last in bands:
            start = first * self.stride - self.pad
            end = (last - 1) * self.stride - self.pad + self.kernel
            fresh = start
            if done is not None and done[1] > start:
                fresh = done[1]
                self._copy(start - done[0], fresh - start)
            self._expand(number, start, fresh, end)
            self._finish(number, first, last)
            done = (start, end)

    def _copy(self, source: int, count: int) -> None:
        """Rows of the ring to its front; row by row where both overlap."""
        step = count if source >= count else max(source, 1)
        for row in range(0, count, step):
            size = min(step, count - row)
            self.builder.emit("copy", x=image(_rows(self.ring, source + row, size)),
                              y=image(_rows(self.ring, row, size)))

    def _expand(self, number: int, start: int, fresh: int, end: int) -> None:
        """Input rows [fresh, end) into a ring that starts at row ``start``; zeros beyond the image."""
        size = self.outer.sizes[0]
        for first, last in ((fresh, min(end, 0)), (max(fresh, size), end)):
            if last > first:
                self.builder.emit("fill", y=image(_rows(self.ring, first - start, last - first)), value=0.0)
        first, last = max(fresh, 0), min(end, size)
        if last > first:
            geometry = replace(self.outer, batch=1, sizes=(last - first, self.outer.sizes[1]),
                               out=(last - first, self.outer.sizes[1]))
            gemm.emit_on(self.builder, self.steps.expand, geometry, _rows(_image(self.x, number), first, last - first),
                         _rows(self.ring, first - start, last - first), None)

    def _finish(self, number: int, first: int, last: int) -> None:
        """Depthwise from the ring, then the projection to output rows [first, last)."""
        count, inner = last - first, self.inner
        middle = _rows(self.between, 0, count)
        rows = _rows(self.ring, 0, (count - 1) * self.stride + self.kernel)
        geometry = replace(inner, batch=1, sizes=(rows.view.shape[2], inner.sizes[1]), out=(count, inner.out[1]),
                           padding=((0, 0), inner.padding[1]))
        depthwise.emit_on(self.builder, self.steps.middle, geometry, rows, middle)
        if self.form is Form.PAIRS:
            floats, middle = middle, _rows(self.rounded, 0, count)
            self.builder.emit("to_bf16", x=image(floats), y=image(middle))
        last_geometry = replace(self.last, batch=1, sizes=(count, inner.out[1]), out=(count, inner.out[1]))
        residual = None if self.residual is None else _rows(_image(self.residual, number), first, count)
        y = _rows(_image(self.y, number), first, count)
        gemm.emit_on(self.builder, self.steps.project, last_geometry, middle, y, residual)


def _rows(place: Place, start: int, count: int) -> Place:
    """Some rows of an image; what lies beside them stays."""
    return Place(place.buffer, place.view.narrow(2, start, count), place.form, place.halo)


def _image(place: Place, number: int) -> Place:
    return place.part(0, number, 1)


def emit(builder: Builder, step: Step, geometry: Geometry, form: Form = Form.LAST) -> None:
    """In bands, or as a plain GEMM where no inverted residual starts here."""
    found = find(builder, step)
    if found is None:
        builder.algorithms[step.name] = gemm.POINTWISE if form is Form.LAST else bf16.GEMM
        gemm.emit(builder, step, geometry, form)
    else:
        Bands(builder, found, form).emit()
