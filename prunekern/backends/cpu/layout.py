"""The first pass over a Program: who runs each step, which form every value has, how wide its halo must be, and which
values are written straight into a concatenation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import torch

from prunekern.backends.cpu.native import Isa
from prunekern.backends.cpu.place import Form, Halo, no_halo, widest
from prunekern.core.graph import Shape
from prunekern.core.program import Program, Slot, Step

if TYPE_CHECKING:
    from prunekern.backends.cpu.builder import Builder


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


class Layout:
    """What is decided before anything has a place. ``foreign`` steps run through the reference backend."""

    def __init__(self, program: Program, batch: int, settings: Settings, compilers: Mapping[str, Compiler]) -> None:
        self.program, self.batch, self.settings, self.isa = program, batch, settings, settings.isa
        self.producers, self.consumers = program.producers(), program.consumers()
        self.forms: dict[str, Form] = {slot.name: Form.PLAIN for slot in program.input_slots}
        self.foreign: dict[str, str] = {}                    # step -> why it is
        self.halos: dict[tuple[str, Form], Halo] = {}        # (slot, form) -> what its readers want
        self.cuts: dict[str, tuple[Slot, int, int]] = {}     # written into a part (axis, start) of another slot
        self._compilers = compilers
        self._leaves = {slot.name for slot in program.output_slots}

    def decide(self) -> None:
        """Fills all of the above."""
        for step in self.program.steps:
            self._decide(step)
        self._measure()
        self._cut_cats()

    def shape(self, slot: Slot) -> Shape:
        return slot.at(self.batch)

    def form(self, slot: Slot) -> Form:
        return self.forms.get(slot.name, Form.PLAIN)

    @property
    def _builder(self) -> Builder:
        """What compilers are given: this, which always is one."""
        return cast("Builder", self)

    def _decide(self, step: Step) -> None:
        compiler = self._compilers.get(step.op)
        reason = self._reason(compiler, step)
        if reason is not None or compiler is None:
            self.foreign[step.name] = reason or "no kernel"
            forms = Form.PLAIN
        else:
            forms = compiler.gives(self._builder, step)
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
        return compiler.takes(self._builder, step)

    def needs(self, step: Step) -> list[Need]:
        return [] if step.name in self.foreign else list(self._compilers[step.op].needs(self._builder, step))

    def _measure(self) -> None:
        """The halo of every slot in every form that somebody reads it in."""
        for step in self.program.steps:
            for need in self.needs(step):
                key, halo = (need.slot.name, need.form), need.halo or no_halo(len(need.slot.shape))
                self.halos[key] = widest(self.halos.get(key, halo), halo)

    def _cut_cats(self) -> None:
        """Which producers write straight into their part of a concatenation; the last one that takes them has them.
        A concatenation of neighbours there (DenseNet's grow by one layer at a time) is a part itself."""
        for step in reversed(self.program.steps):
            if step.op != "cat" or step.name in self.foreign:
                continue
            axis, start = step.attributes["axis"], 0
            if step.output.name not in self.cuts and (whole := self._neighbours(step)) is not None:
                self._cut_into(step.output, *whole)
                continue
            for slot in step.inputs:
                if self._may_cut(slot, step):
                    self._cut_into(slot, step.output, axis, start)
                start += self.shape(slot)[axis]

    def _cut_into(self, slot: Slot, whole: Slot, axis: int, start: int) -> None:
        self.cuts[slot.name] = (whole, axis, start)
        form = self.form(whole)
        halo = self.halos.get((slot.name, form))
        while halo is not None:                              # what holds it has room for its readers too
            self.halos[whole.name, form] = halo = widest(self.halos.get((whole.name, form), halo), halo)
            if whole.name not in self.cuts:
                break
            whole = self.cuts[whole.name][0]

    def _neighbours(self, step: Step) -> tuple[Slot, int, int] | None:
        """Where the inputs of a concatenation lie, if they lie in its order in another one already."""
        axis, parts = step.attributes["axis"], [self.cuts.get(slot.name) for slot in step.inputs]
        first = parts[0] if parts else None
        if first is None or step.output.name in self._leaves:
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
                and self.form(slot) is self.form(cat.output) and slot.name not in self.cuts
                and [s.name for s in cat.inputs].count(slot.name) == 1 and slot.name not in self._leaves
                and cat.attributes["axis"] < 2)

    def is_written(self, slot: Slot, cat: Step, start: int) -> bool:
        """Whether a slot is in its part of a concatenation already."""
        return self._root(slot, 0) == self._root(cat.output, start) if slot.name in self.cuts else False

    def _root(self, slot: Slot, start: int) -> tuple[str, int]:
        """The outermost value that a position lies in, and where."""
        while slot.name in self.cuts:
            slot, _, offset = self.cuts[slot.name]
            start += offset
        return slot.name, start
