"""Recurrent layers as ops of the engine: one GEMM for the inputs of all time steps, then the op `recurrent`.

Columns of both products are in panels: a register or two of hidden units, and all of their gates next to each other
(csrc/cpu/kernels/recurrent.cpp), so that a cell is finished in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from prunekern.backends.cpu.builder import Builder, Ref, axes
from prunekern.backends.cpu.geometry import grid
from prunekern.backends.cpu.layout import Need
from prunekern.backends.cpu.native import Field, Isa
from prunekern.backends.cpu.pack import aligned, fits_half, pack_gemm
from prunekern.backends.cpu.place import Form, Place, allocate
from prunekern.core.program import Slot, Step

KINDS = {kind: number for number, kind in enumerate(("lstm", "gru", "rnn_tanh", "rnn_relu"))}
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
UNITS = {"lstm": 1, "gru": 1, "rnn_tanh": 2, "rnn_relu": 2}     # registers of them in a panel
Fields = dict[str, Field | Ref]
CHUNK_BYTES = 384 << 10         # of input that is worked on with one panel of weights (gemm.cpp)
FEW = 4                 # rows of the batch for each thread: below, threads share out columns instead
SPLIT_MACS = 200_000    # of one time step, that are worth a meeting of threads


@dataclass(frozen=True)
class Cells:
    """One direction of one layer; ``suffix`` of its weights' roles."""

    builder: Builder
    step: Step
    suffix: str

    @property
    def kind(self) -> str:
        return str(self.step.attributes["kind"])

    def weight(self, role: str) -> Tensor | None:
        name = self.step.weights.get(role + self.suffix)
        return None if name is None else self.builder.weight(name).detach()

    @property
    def hidden(self) -> int:
        return int(self.builder.weight(self.step.weights["weight_hh" + self.suffix]).shape[1])

    @property
    def columns(self) -> int:
        """Of all gates, in whole panels."""
        width = UNITS[self.kind] * self.builder.isa.lanes
        return -(-self.hidden // width) * width * GATES[self.kind]

    @property
    def half(self) -> bool:
        """Whether weights are stored as fp16: where that is asked for, and keeps their bits."""
        weights = (self.weight("weight_ih"), self.weight("weight_hh"))
        return self.builder.settings.weights == "fp16" and all(w is not None and fits_half(w) for w in weights)

    def packed(self, what: str) -> int:
        """The address of the "input" or the "state" weights, of the "bias" of the input, or of a "new" gate's own."""
        make: dict[str, Callable[[], Tensor]] = {"input": self._input, "state": self._state, "bias": self._bias,
                                                 "new": self._new_bias}
        return self.builder.packed(("recurrent", self.step.name, self.suffix, what, self.builder.isa.lanes, self.half),
                                   make[what])

    def _panels(self, rows: Tensor) -> Tensor:
        return in_panels(rows, self.hidden, GATES[self.kind], UNITS[self.kind], self.builder.isa)

    def _input(self) -> Tensor:
        weight = self.weight("weight_ih")
        assert weight is not None
        return pack_gemm(self._panels(weight).flatten(0, 1).unsqueeze(0), self.builder.isa, self.half)

    def _state(self) -> Tensor:
        weight = self.weight("weight_hh")
        assert weight is not None
        panels = self._panels(weight).transpose(1, 2)                        # [panels, hidden, columns of a panel]
        return aligned(panels.half() if self.half else panels.float())

    def _bias(self) -> Tensor:
        """What is added before any gate; all but the state's bias of a GRU's new gate, which is reset with it."""
        ours, theirs = self.weight("bias_ih"), self.weight("bias_hh")
        assert ours is not None
        assert theirs is not None
        if self.kind == "gru":
            theirs = torch.cat((theirs[:2 * self.hidden], torch.zeros_like(theirs[2 * self.hidden:])))
        return aligned(self._panels((ours + theirs).unsqueeze(1)))

    def _new_bias(self) -> Tensor:
        bias = self.weight("bias_hh")
        assert bias is not None
        width = self.builder.isa.lanes
        return aligned(functional.pad(bias[2 * self.hidden:], (0, -self.hidden % width)))


def in_panels(rows: Tensor, hidden: int, gates: int, units: int, isa: Isa) -> Tensor:
    """Rows ``[gates * hidden, K]`` as ``[panels, gates * width, K]``: width hidden units of every gate; missing units
    are zeros."""
    width = units * isa.lanes
    padded = functional.pad(rows.view(gates, hidden, -1), (0, 0, 0, -hidden % width))
    return padded.view(gates, -1, width, rows.shape[1]).transpose(0, 1).flatten(1, 2).contiguous()


class Recurrent:
    """See ``builder.Compiler``."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        return None if all(builder.shape(step.inputs[0])) else "the input is empty"

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        return ()

    def gives(self, builder: Builder, step: Step) -> Form:
        return Form.PLAIN

    def emit(self, builder: Builder, step: Step) -> None:
        at = step.attributes
        builder.algorithms[step.name] = "GEMM, then cells in time"
        outputs = [builder.write(slot) for slot in step.outputs]
        x, y = _in_time(step, _rows(builder, step.inputs[0])), None if at["cell"] else _in_time(step, outputs[0])
        given = [_stacked(step, _rows(builder, slot)) for slot in step.inputs[1:]]
        last = [_stacked(step, place) for place in (outputs if at["cell"] else outputs[1:])]
        for layer in range(at["layers"]):
            cells = [Cells(builder, step, f"_l{layer}{suffix}") for suffix in ("", "_reverse")[:at["directions"]]]
            whole = y if y is not None and layer + 1 == at["layers"] else \
                allocate((*x.view.shape[:2], len(cells) * cells[0].hidden))
            if any(each.half for each in cells):
                builder.rows[step.name] = "fp16 weights"
            states = [[_at(place, layer * len(cells) + number) for place in (*given, *last)]
                      for number in range(len(cells))]
            self._layer(cells, x, whole, states, len(given))
            x = whole

    def _layer(self, cells: Sequence[Cells], x: Place, y: Place, states: Sequence[Sequence[Place]],
               given: int) -> None:
        """states: for each direction the given and the last ones."""
        builder = cells[0].builder
        (steps, batch, hidden), threads = y.view.shape, builder.settings.threads
        hidden //= len(cells)
        few = threads > 1 and batch < FEW * threads and batch * hidden * cells[0].columns >= SPLIT_MACS
        side_by_side = few and len(cells) == threads
        gates = [_input(each, x) for each in cells]
        for number, (each, gate) in enumerate(zip(cells, gates, strict=True)):
            part = Place(y.buffer, y.view.narrow(2, number * hidden, hidden))
            fields = _fields(each, gate, part, states[number], given, reverse=number)
            if side_by_side:
                builder.chain()
            for first in range(steps) if few and not side_by_side else (0,):
                builder.emit("recurrent", first=first, **fields,
                             **({"count": 1, "split": 1} if few and not side_by_side else {"count": steps}))
        if side_by_side:
            builder.end_chains()


def _input(cells: Cells, x: Place) -> Place:
    """The part of all gates that the input makes, [T, N, columns]: one product for all time steps."""
    builder, (steps, batch, width) = cells.builder, x.view.shape
    gates = allocate((steps, batch, cells.columns))
    bias: Fields = {"bias": cells.packed("bias")} if cells.weight("bias_ih") is not None else {}
    builder.emit("gemm", x=_whole(x), y=_whole(gates), places=steps * batch, outputs=cells.columns,
                 in_table=builder.table(grid((steps, batch), x.view.stride()[:2])),
                 out_table=builder.table(torch.arange(steps * batch) * cells.columns), segments=[0, width],
                 weight=cells.packed("input"), half=int(cells.half), chunk=max(1, CHUNK_BYTES // (4 * width)), **bias)
    return gates


def _fields(cells: Cells, gates: Place, y: Place, states: Sequence[Place], given: int, reverse: int) -> Fields:
    names = (*("h0", "c0")[:given], "h1", "c1")
    fields: Fields = {name: axes(place) for name, place in zip(names, states, strict=False)}
    if cells.kind == "gru" and cells.weight("bias_hh") is not None:
        fields["bias"] = cells.packed("new")
    return {**fields, "x": axes(gates), "y": axes(y), "kind": KINDS[cells.kind], "weight": cells.packed("state"),
            "half": int(cells.half), "reverse": reverse}


def _rows(builder: Builder, slot: Slot) -> Place:
    """A value whose last axis is contiguous; copied if it is not."""
    place = builder.read(slot)
    return place if place.view.stride(-1) == 1 or place.view.shape[-1] == 1 else builder.dense(slot)


def _in_time(step: Step, place: Place) -> Place:
    """[T, N, features]."""
    view = place.view.unsqueeze(0) if step.attributes["cell"] else place.view
    return Place(place.buffer, view.transpose(0, 1) if step.attributes["batch_first"] else view)


def _stacked(step: Step, place: Place) -> Place:
    """States as [layers * directions, N, H]."""
    return Place(place.buffer, place.view.unsqueeze(0)) if step.attributes["cell"] else place


def _at(place: Place, number: int) -> Place:
    return Place(place.buffer, place.view.select(0, number))


def _whole(place: Place) -> Ref:
    """As one image whose positions tables list."""
    return Ref(place, (None,) * 5)
