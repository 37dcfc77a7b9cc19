"""Steps that move values: as views wherever strides can say it, and copies of the rest."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from prunekern.backends.cpu.builder import Builder, axes
from prunekern.backends.cpu.layout import Need
from prunekern.backends.cpu.place import Form, Place
from prunekern.core.program import Step


class Move:
    """reshape, permute, slice, expand: a view of the input. See ``builder.Compiler``."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return None

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        return ()

    def gives(self, builder: Builder, step: Step) -> Form:
        return builder.form(step.inputs[0]) if self._keeps_form(step) else Form.PLAIN

    def _keeps_form(self, step: Step) -> bool:
        at = step.attributes
        return bool(at["kind"] == "slice" and at["axis"] < 2 and at["step"] == 1)

    def emit(self, builder: Builder, step: Step) -> None:
        source, at = step.inputs[0], step.attributes
        builder.algorithms[step.name] = "view"
        if self._flattens(builder, step):
            builder.flat[step.output.name] = source
            return
        place = builder.read(source)
        if self._keeps_form(step):
            size = builder.shape(step.output)[at["axis"]]
            builder.places[step.output.name] = place.part(at["axis"], at["start"], size)
            return
        view = self._view(builder, step, place.view)
        if not place.shares(view):
            builder.algorithms[step.name] = "copy"
            place = builder.dense(source)
            view = self._view(builder, step, place.view)
        builder.places[step.output.name] = Place(place.buffer, view)

    def _view(self, builder: Builder, step: Step, x: Tensor) -> Tensor:
        at, shape = step.attributes, builder.shape(step.output)
        match at["kind"]:
            case "reshape":
                return x.reshape(shape)
            case "permute":
                return x.permute(at["axes"])
            case "expand":
                return x.expand(shape)
        axis, start, each = at["axis"], at["start"], at["step"]
        stop = start + max(shape[axis] - 1, 0) * each + min(shape[axis], 1)
        return x[(*[slice(None)] * axis, slice(start, stop, each))]

    def _flattens(self, builder: Builder, step: Step) -> bool:
        """``[N, C, *sizes]`` to ``[N, C * sizes]``, read by linear layers only: they read the image itself."""
        source, target = step.inputs[0], step.output
        if step.attributes["kind"] != "reshape" or len(target.shape) != 2 or len(source.shape) < 3 \
                or source.name in builder.flat or target in builder.program.output_slots:
            return False
        place = builder.read(source)
        dense_runs = 1 in (place.view.stride(1), place.view.stride(-1)) or place.view.shape[1] == 1
        return (builder.shape(source)[:1] == builder.shape(target)[:1] and dense_runs
                and place.form is not Form.PLAIN
                and all(user.op == "linear" and user.epilogue.residual != target and user.name not in builder.foreign
                        for user in builder.consumers[target.name]))


class Cat:
    """Producers wrote into their parts already, where they could."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return None

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        return ()

    def gives(self, builder: Builder, step: Step) -> Form:
        forms = [builder.form(slot) for slot in step.inputs]
        return next((form for form in forms if form is not Form.PLAIN), Form.PLAIN)

    def emit(self, builder: Builder, step: Step) -> None:
        y, axis, start = builder.write(step.output), step.attributes["axis"], 0
        copies = 0
        for slot in step.inputs:
            size = builder.shape(slot)[axis]
            if not builder.is_written(slot, step, start) and size:
                builder.emit("copy", x=axes(builder.read(slot)), y=axes(y.part(axis, start, size)))
                copies += 1
            start += size
        builder.algorithms[step.name] = f"copy of {copies} of {len(step.inputs)}" if copies else "written in place"


class Constant:
    """A weight that is a value."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return None

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        return ()

    def gives(self, builder: Builder, step: Step) -> Form:
        return Form.PLAIN

    def emit(self, builder: Builder, step: Step) -> None:
        builder.algorithms[step.name] = "weight"
        builder.constant(step.output, builder.weight(step.weights["value"]).contiguous())
