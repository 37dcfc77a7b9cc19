"""Turns a Program at one shape into ops of the engine, in two passes: which form every value has and how wide its halo
must be; then places and ops, step by step.

Compilers of Steps (convs.py, simple.py) see a Builder: ``read``, ``want`` and ``write`` give places, ``emit`` adds an
op. Buffers live from the first op that touches them to the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from prunekern.backends.cpu.native import Field, Isa, NativeOp, activation_fields
from prunekern.backends.cpu.place import AXES, LOCAL, Buffer, Form, Halo, Place, allocate, no_halo, widest
from prunekern.core.graph import Shape
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
class Need:
    """A step reads a slot in this form, with at least this halo."""

    slot: Slot
    form: Form
    halo: Halo = ()


@dataclass(frozen=True)
class Settings:
    """What a placement is built for. choices: step name -> algorithm; heuristics decide for the others.
    weights: 'fp32', or 'fp16' (arithmetic is fp32 with both). dtype: of products, 'fp32' or 'bf16'."""

    isa: Isa
    threads: int
    choices: Mapping[str, str] = field(default_factory=dict)
    weights: str = "fp32"
    dtype: str = "fp32"


class Compiler(Protocol):
    """How one kind of Step becomes native ops."""

    def takes(self, builder: Builder, step: Step) -> str | None:
        """Why it cannot (then the step runs through the reference backend), or None."""

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        """The forms in which it reads."""

    def gives(self, builder: Builder, step: Step) -> Form:
        """The form of its output."""

    def emit(self, builder: Builder, step: Step) -> None: ...


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


class Builder:
    """See the top of this file. ``packs`` is shared by all placements of a Program: key -> packed weights."""

    def __init__(self, program: Program, batch: int, settings: Settings, compilers: Mapping[str, Compiler],
                 packs: dict[Key, Tensor]) -> None:
        self.program, self.batch, self.settings, self.isa = program, batch, settings, settings.isa
        self.producers, self.consumers = program.producers(), program.consumers()
        self.forms: dict[str, Form] = {}
        self.foreign: dict[str, str] = {}                    # step -> why it is
        self.algorithms: dict[str, str] = {}
        self.absorbed: dict[str, str] = {}                   # step -> an earlier one that does its work too
        self.rows: dict[str, str] = {}                       # step -> its row of lower/tolerance.py
        self.places: dict[str, Place] = {}
        self.flat: dict[str, Slot] = {}                      # a flattened image that has no place of its own -> it
        self.items: list[_Item | Foreign] = []
        self.spans: dict[str, tuple[int, int]] = {}          # step -> its items
        self.keep: list[Tensor] = []
        self._compilers, self._packs = compilers, packs
        self._halos: dict[tuple[str, Form], Halo] = {}
        self._converted: dict[Key, Place] = {}
        self._touched: dict[Buffer, tuple[int, int]] = {}
        self._cut: dict[str, tuple[Slot, int, int]] = {}     # written into a slice (axis, start) of another slot
        self.constants: list[Tensor] = []
        self.groups: list[tuple[int, ...]] = []              # of items: the first of every chain, and the end
        self.local_bytes = 0
        self._locals: list[Buffer] = []
        self._open_group: list[int] = []
        self._step = ""
        self._outputs = {slot.name: number for number, slot in enumerate(program.output_slots)}
        self._input_count = len(program.input_slots)

    # ---- for compilers -------------------------------------------------------------------------------------------

    def shape(self, slot: Slot) -> Shape:
        return slot.at(self.batch)

    def form(self, slot: Slot) -> Form:
        return self.forms.get(slot.name, Form.PLAIN)

    def read(self, slot: Slot) -> Place:
        """Where a slot is."""
        return self.places[slot.name]

    def want(self, slot: Slot, form: Form) -> Place:
        """A slot in a form, copied if it is in another one; with the halo that ``needs`` asked for."""
        place, key = self.places[slot.name], (slot.name, form)
        shape = self.shape(slot)
        wanted = self._halos.get(key) or no_halo(len(shape))
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
            if slot.name not in self._cut:
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
        if key not in self._packs:
            self._packs[key] = make()
        return self.address(self._packs[key])

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
        for slot in self.program.input_slots:
            self.forms[slot.name] = Form.PLAIN
        for step in self.program.steps:
            self._decide(step)
        self._measure()
        self._cut_cats()
        for number, slot in enumerate(self.program.input_slots):
            if slot.dtype == torch.float32:
                self.places[slot.name] = allocate(self.shape(slot), base=1 + number)
        for step in self.program.steps:
            start = len(self.items)
            self._step = step.name
            self._place(step)
            self.spans[step.name] = (start, len(self.items))
        self._step = "(output)"
        for slot in self.program.output_slots:
            self._export(slot)

    def _decide(self, step: Step) -> None:
        compiler = self._compilers.get(step.op)
        reason = self._reason(compiler, step)
        if reason is not None or compiler is None:
            self.foreign[step.name] = reason or "no kernel"
            forms = Form.PLAIN
        else:
            forms = compiler.gives(self, step)
        for slot in step.outputs:
            self.forms[slot.name] = forms if len(slot.shape) > 2 else Form.PLAIN

    def _reason(self, compiler: Compiler | None, step: Step) -> str | None:
        if compiler is None:
            return f"the engine has no {step.op}"
        strange = [slot for slot in (*step.reads, *step.outputs) if slot.dtype != torch.float32]
        if strange:
            return f"{strange[0].name} is {strange[0].dtype}"
        if any(len(slot.shape) > 5 for slot in (*step.reads, *step.outputs)):
            return "a value has more than five axes"
        return compiler.takes(self, step)

    def needs(self, step: Step) -> list[Need]:
        return [] if step.name in self.foreign else list(self._compilers[step.op].needs(self, step))

    def _measure(self) -> None:
        """The halo of every slot in every form that somebody reads it in."""
        for step in self.program.steps:
            for need in self.needs(step):
                key, halo = (need.slot.name, need.form), need.halo or no_halo(len(need.slot.shape))
                self._halos[key] = widest(self._halos.get(key, halo), halo)

    def _cut_cats(self) -> None:
        """Which producers write straight into their part of a concatenation; the last one that takes them has them.
        A concatenation of neighbours there (DenseNet's grow by one layer at a time) is a part itself."""
        for step in reversed(self.program.steps):
            if step.op != "cat" or step.name in self.foreign:
                continue
            axis, start = step.attributes["axis"], 0
            if step.output.name not in self._cut and (whole := self._neighbours(step)) is not None:
                self._cut_into(step.output, *whole)
                continue
            for slot in step.inputs:
                if self._may_cut(slot, step):
                    self._cut_into(slot, step.output, axis, start)
                start += self.shape(slot)[axis]

    def _cut_into(self, slot: Slot, whole: Slot, axis: int, start: int) -> None:
        self._cut[slot.name] = (whole, axis, start)
        form = self.form(whole)
        halo = self._halos.get((slot.name, form))
        while halo is not None:                              # what holds it has room for its readers too
            self._halos[whole.name, form] = halo = widest(self._halos.get((whole.name, form), halo), halo)
            if whole.name not in self._cut:
                break
            whole = self._cut[whole.name][0]

    def _neighbours(self, step: Step) -> tuple[Slot, int, int] | None:
        """Where the inputs of a concatenation lie, if they lie in its order in another one already."""
        axis, parts = step.attributes["axis"], [self._cut.get(slot.name) for slot in step.inputs]
        first = parts[0] if parts else None
        if first is None or step.output.name in self._outputs:
            return None
        whole, expected = first[0], first[2]
        for slot, part in zip(step.inputs, parts, strict=True):
            if part != (whole, axis, expected):
                return None
            expected += self.shape(slot)[axis]
        return (whole, axis, first[2]) if self.form(whole) is self.form(step.output) else None

    def _may_cut(self, slot: Slot, cat: Step) -> bool:
        producer = self.producers.get(slot.name)
        return (producer is not None and producer.name not in self.foreign and producer.op not in ("move", "constant")
                and self.form(slot) is self.form(cat.output) and slot.name not in self._cut
                and [s.name for s in cat.inputs].count(slot.name) == 1 and slot.name not in self._outputs
                and cat.attributes["axis"] < 2)

    def is_written(self, slot: Slot, cat: Step, start: int) -> bool:
        """Whether a slot is in its part of a concatenation already."""
        return self._root(slot, 0) == self._root(cat.output, start) if slot.name in self._cut else False

    def _root(self, slot: Slot, start: int) -> tuple[str, int]:
        """The outermost value that a position lies in, and where."""
        while slot.name in self._cut:
            slot, _, offset = self._cut[slot.name]
            start += offset
        return slot.name, start

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
        if isinstance(last, Foreign):
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

    def _new(self, slot: Slot) -> Place:
        if slot.name in self._cut:
            whole, axis, start = self._cut[slot.name]
            return self.write(whole).part(axis, start, self.shape(slot)[axis])
        form = self.form(slot)
        halo = self._halos.get((slot.name, form)) or no_halo(len(slot.shape))
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

    def _export(self, slot: Slot) -> None:
        number = 1 + self._input_count + self._outputs[slot.name]
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
        """The items with their Views filled in; None for a halo that needs no work."""
        for buffer in self._locals:
            buffer.base = 1 + self._input_count + len(self._outputs) + len(self.constants)
        return [item if isinstance(item, Foreign) else None if item.op == "halo" and skip_halos else
                NativeOp(item.op, item.step, {key: value.fields() if isinstance(value, Ref) else value
                                              for key, value in item.fields.items()})
                for item in self.items]


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
