"""Turns a Program at one shape into ops of the engine: after the first pass (layout.py), places and ops step by step.

Compilers of Steps (convs.py, simple.py) see a Builder: ``read``, ``want`` and ``write`` give places, ``emit`` adds an
op. Buffers live from the first op that touches them to the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekern.backends.cpu.layout import Compiler, Layout, Settings
from prunekern.backends.cpu.native import Field, Isa, NativeOp, activation_fields
from prunekern.backends.cpu.place import AXES, LOCAL, Buffer, Form, Place, allocate, no_halo
from prunekern.core.program import Program, Slot, Step
from prunekern.lower.arena import Arena, Wanted, pack

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Ref:
    """A place as an op sees it: which of its axes is n, c, d, h, w. It becomes a View once the arena is planned."""

    place: Place
    axes: tuple[int | None, ...]

    def fields(self) -> list[int]:
        return self.place.fields(self.axes)


@dataclass(frozen=True)
class Foreign:
    """Steps that the reference backend runs, between native ops."""

    steps: tuple[Step, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Item:
    op: str
    step: str
    fields: Mapping[str, Field | Ref]


class Builder(Layout):
    """See the top of this file. ``packs`` is shared by all placements of a Program: key -> packed weights."""

    def __init__(self, program: Program, batch: int, settings: Settings, compilers: Mapping[str, Compiler],
                 packs: dict[Key, Tensor]) -> None:
        super().__init__(program, batch, settings, compilers)
        self.algorithms: dict[str, str] = {}
        self.absorbed: dict[str, str] = {}                   # step -> an earlier one that does its work too
        self.rows: dict[str, str] = {}                       # step -> its row of lower/tolerance.py
        self.places: dict[str, Place] = {}
        self.flat: dict[str, Slot] = {}                      # a flattened image that has no place of its own -> it
        self.items: list[_Item | Foreign] = []
        self.spans: dict[str, tuple[int, int]] = {}          # step -> its items
        self.keep: list[Tensor] = []
        self._packs = packs
        self._converted: dict[Key, Place] = {}
        self._touched: dict[Buffer, tuple[int, int]] = {}
        self.constants: list[Tensor] = []
        self.groups: list[tuple[int, ...]] = []              # of items: the first of every chain, and the end
        self.local_bytes = 0
        self._locals: list[Buffer] = []
        self._open_group: list[int] = []
        self._step = ""
        self._outputs = {slot.name: number for number, slot in enumerate(program.output_slots)}
        self._input_count = len(program.input_slots)

    # ---- for compilers -------------------------------------------------------------------------------------------

    def read(self, slot: Slot) -> Place:
        """Where a slot is."""
        return self.places[slot.name]

    def want(self, slot: Slot, form: Form) -> Place:
        """A slot in a form, copied if it is in another one; with the halo that ``needs`` asked for."""
        place, key = self.places[slot.name], (slot.name, form)
        shape = self.shape(slot)
        wanted = self.halos.get(key) or no_halo(len(shape))
        if place.fits(form, wanted):
            return place
        if key not in self._converted:
            if form is Form.PAIRS and not place.fits(Form.LAST, no_halo(len(shape))):
                place = self.want(slot, Form.LAST)
            self._converted[key] = copy = allocate(shape, form, wanted)
            self._open(copy)
            if form is Form.PAIRS:
                self.emit("to_bf16", x=image(place), y=image(copy))
            else:
                self.emit("copy", x=axes(place), y=axes(copy))
        return self._converted[key]

    def once(self, key: Key, make: Callable[[], Place]) -> Place:
        """What ``make`` emits and where its result is, the first time; from then on, where it is."""
        if key not in self._converted:
            self._converted[key] = make()
        return self._converted[key]

    def dense(self, slot: Slot) -> Place:
        """A slot in torch's order, without gaps; copied if it is not."""
        place = self.places[slot.name]
        if place.view.is_contiguous():
            return place
        key = (slot.name, Form.PLAIN)
        if key not in self._converted:
            self._converted[key] = allocate(self.shape(slot))
            self.emit("copy", x=axes(place), y=axes(self._converted[key]))
        return self._converted[key]

    def write(self, slot: Slot) -> Place:
        """Where a step puts its output; made on first use."""
        if slot.name not in self.places:
            self.places[slot.name] = place = self._new(slot)
            if slot.name not in self.cuts:
                self._open(place)
        return self.places[slot.name]

    def absorb(self, step: Step, by: Step) -> Place:
        """Where a later step puts its output, which ``by`` does now; what is between them never is in memory."""
        self.absorbed[step.name] = by.name
        return self.write(step.output)

    def temporary(self, floats: int) -> Place:
        """Memory between two ops of a step."""
        return allocate((floats,))

    def local(self, places: Sequence[Place]) -> None:
        """Puts buffers side by side into the memory that a chain's thread keeps to itself."""
        offset = 0
        for place in places:
            place.buffer.base, place.buffer.offset = LOCAL, offset
            offset += -(-4 * place.buffer.floats // 64) * 64
            self._locals.append(place.buffer)
        self.local_bytes = max(self.local_bytes, offset)

    def chain(self) -> None:
        """What is emitted from here on, to the next ``chain`` or ``end_chains``, runs on one thread from end to end."""
        self._open_group.append(len(self.items))

    def end_chains(self) -> None:
        self.groups.append((*self._open_group, len(self.items)))
        self._open_group = []

    def constant(self, slot: Slot, value: Tensor) -> None:
        """A slot that is the same in every run: the tensor's memory is a base of its own."""
        number = 1 + self._input_count + len(self._outputs) + len(self.constants)
        self.constants.append(value)
        self.places[slot.name] = allocate(self.shape(slot), base=number)

    def emit(self, op: str, **fields: Field | Ref) -> None:
        """One op of csrc/cpu/ops.def for the present step."""
        for value in fields.values():
            if isinstance(value, Ref):
                self._touch(value.place, len(self.items))
        self.items.append(_Item(op, self._step, fields))

    def weight(self, name: str) -> Tensor:
        return self.program.weights[name]

    def address(self, tensor: Tensor) -> int:
        """Of a contiguous tensor that will live as long as the network."""
        self.keep.append(tensor)
        return tensor.data_ptr()

    def packed(self, key: Key, make: Callable[[], Tensor]) -> int:
        """The address of packed weights; made once for all placements."""
        found = self._packs.get(key)
        if found is None:                          # another thread's tuner may empty the packs at any time
            self._packs[key] = found = make()
        return self.address(found)

    def table(self, values: Tensor) -> int:
        """The address of a table of offsets (int32)."""
        return self.address(values.to(torch.int32).contiguous())

    def epilogue(self, step: Step, groups: int = 1, residual_axes: Callable[[Place], Ref] | None = None,
                 form: Form = Form.PLAIN) -> dict[str, Field | Ref]:
        """The fields of ``Epilogue::of``. Bias: each group's part padded to whole registers."""
        e = step.epilogue
        found: dict[str, Field | Ref] = dict(activation_fields(e.activation))
        if e.bias is not None:
            name = e.bias
            found["bias"] = self.packed(("bias", name, groups, self.isa.lanes),
                                        lambda: pad_bias(self.weight(name), groups, self.isa))
        if e.residual is not None:
            place = self.want(e.residual, form) if form is not Form.PLAIN else self.read(e.residual)
            found["residual"] = (residual_axes or image)(place)
            found["residual_last"] = int(e.residual_last)
        return found

    # ---- the two passes ------------------------------------------------------------------------------------------

    def build(self) -> None:
        self.decide()
        for number, slot in enumerate(self.program.input_slots):
            if slot.dtype == torch.float32:
                self.places[slot.name] = allocate(self.shape(slot), base=1 + number)
        for step in self.program.steps:
            start = len(self.items)
            self._step = step.name
            self._place(step)
            self.spans[step.name] = (start, len(self.items))
        self._step = "(output)"
        for number, slot in enumerate(self.program.output_slots):
            self._export(slot, 1 + self._input_count + number)

    def _place(self, step: Step) -> None:
        if step.name in self.absorbed:
            self.algorithms[step.name] = f"within {self.absorbed[step.name]}"
        elif step.name in self.foreign:
            self._place_foreign(step)
        else:
            self._compilers[step.op].emit(self, step)

    def _place_foreign(self, step: Step) -> None:
        reason = self.foreign[step.name]
        last = self.items[-1] if self.items else None
        if isinstance(last, Foreign) and self._continues(last, step):
            self.items[-1] = Foreign((*last.steps, step), (*last.reasons, reason))
        else:
            self.items.append(Foreign((step,), (reason,)))
        self.algorithms[step.name] = "reference"
        for slot in step.outputs:
            if slot.dtype == torch.float32:
                self.places[slot.name] = allocate(self.shape(slot))
        for slot in (*step.reads, *step.outputs):
            if slot.name in self.places:
                self._touch(self.places[slot.name], len(self.items) - 1)

    def _continues(self, last: Foreign, step: Step) -> bool:
        """Whether a step can run in one go with those before it: not where it reads a view of what they give, since
        all that such a run reads is taken before it starts."""
        made = {slot.name for one in last.steps for slot in one.outputs}
        written = [self.places[name].buffer for name in made if name in self.places]
        for slot in step.reads:
            source = slot.name
            while source in self.flat:
                source = self.flat[source].name
            viewed = source in self.places and any(self.places[source].buffer is buffer for buffer in written)
            if slot.name not in made and (source in made or viewed):
                return False
        return True

    def _new(self, slot: Slot) -> Place:
        if slot.name in self.cuts:
            whole, axis, start = self.cuts[slot.name]
            return self.write(whole).part(axis, start, self.shape(slot)[axis])
        form = self.form(slot)
        halo = self.halos.get((slot.name, form)) or no_halo(len(slot.shape))
        place = allocate(self.shape(slot), form, halo)
        number = self._outputs.get(slot.name)
        if number is not None and place.view.is_contiguous() and not place.padded:
            place.buffer.base = 1 + self._input_count + number       # straight to the caller
        return place

    def _open(self, place: Place) -> None:
        """The halo of a buffer that is about to be written."""
        if place.padded:
            low, high = (spatial([pair[i] for pair in place.halo]) for i in (0, 1))
            self.emit("halo", y=image(place), low=low, high=high)

    def _export(self, slot: Slot, number: int) -> None:
        place = self.places.get(slot.name)
        if place is None or place.buffer.base == number:
            return
        self.emit("copy", x=axes(place), y=axes(allocate(self.shape(slot), base=number)))

    def _touch(self, place: Place, item: int) -> None:
        first, last = self._touched.get(place.buffer, (item, item))
        self._touched[place.buffer] = (min(first, item), max(last, item))

    # ---- the result ----------------------------------------------------------------------------------------------

    def arena(self, reuse: bool) -> Arena:
        """Offsets for every buffer; without reuse, halos stay as they are first made: zero."""
        end = len(self.items)
        wanted = [Wanted(str(number), 4 * buffer.floats, *(span if reuse else (0, end)))
                  for number, (buffer, span) in enumerate(self._touched.items()) if buffer.base == 0]
        arena = pack(wanted)
        for number, buffer in enumerate(self._touched):
            if str(number) in arena.buffers:
                buffer.offset = arena.buffers[str(number)].offset
        return arena

    def ops(self, skip_halos: bool) -> list[NativeOp | Foreign | None]:
        """The items with their Views filled in. skip_halos: None for those in the arena, which nobody overwrites (a
        thread's own memory is of many uses)."""
        for buffer in self._locals:
            buffer.base = 1 + self._input_count + len(self._outputs) + len(self.constants)
        return [item if isinstance(item, Foreign) else None if skip_halos and _is_halo(item) else
                NativeOp(item.op, item.step, {key: value.fields() if isinstance(value, Ref) else value
                                              for key, value in item.fields.items()})
                for item in self.items]


def _is_halo(item: _Item) -> bool:
    return item.op == "halo" and all(value.place.buffer.base == 0 for value in item.fields.values()
                                     if isinstance(value, Ref))


def image(place: Place) -> Ref:
    """As [N, C, *spatial]; a missing spatial axis comes before those there are."""
    spatial_axes = range(2, place.view.dim())
    return Ref(place, (0, 1, *[None] * (3 - len(spatial_axes)), *spatial_axes))


def axes(place: Place) -> Ref:
    """As up to five axes in their order, missing ones first."""
    rank = place.view.dim()
    return Ref(place, (*[None] * (AXES - rank), *range(rank)))


def spatial(values: Iterable[int], missing: int = 0) -> list[int]:
    """Depth, height, width."""
    given = list(values)
    return [*[missing] * (3 - len(given)), *given]


def pad_bias(bias: Tensor, groups: int, isa: Isa) -> Tensor:
    rows = bias.detach().reshape(groups, -1)
    return torch.nn.functional.pad(rows, (0, isa.padded(rows.shape[1]) - rows.shape[1])).contiguous()
