"""A Program laid out for the engine: native stretches, and reference steps between them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from prunekern.backends.base import Gather, Observe, Placement, Signature
from prunekern.backends.cpu.builder import Builder, Foreign, Key
from prunekern.backends.cpu.layout import Compiler, Settings
from prunekern.backends.cpu.native import NativeOp, Network, Recipe, advise_huge
from prunekern.backends.reference import ReferenceBackend
from prunekern.core.program import Program, Slot, Step
from prunekern.lower.arena import Arena

SMALL = 768 << 10      # bytes: below, memory is not reused, and halos are written once


@dataclass(frozen=True)
class Stretch:
    """Native ops [begin, end)."""

    begin: int
    end: int


@dataclass(frozen=True)
class Aside:
    """Steps on the reference backend: it reads and writes values by slot."""

    placement: Placement
    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]


@dataclass(frozen=True)
class _State:
    """One run: its arena, what the engine's other bases are, and values that do not live in an arena."""

    memory: Tensor
    bases: Sequence[Tensor]
    loose: dict[str, Tensor]


class Direct(Protocol):
    """See ``CpuPlacement.direct``."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor | None: ...


class CpuPlacement:
    """See ``backends.base.Placement``. Any number of threads may run it at a time, each in an arena of its own.

    slices: how many slices of the batch ``program`` is built for one of.
    """

    def __init__(self, program: Program, signature: Signature, settings: Settings,
                 compilers: Mapping[str, Compiler], packs: dict[Key, Tensor], slices: int = 1) -> None:
        self.program, self.signature, self.settings, self.slices = program, signature, settings, slices
        each = signature.batch // slices
        self.builder = builder = Builder(program, each, settings, compilers, packs)
        with torch.no_grad():
            builder.build()
        self.algorithms: Mapping[str, str] = builder.algorithms
        self.rows: Mapping[str, str] = builder.rows
        self.arena: Arena = builder.arena(reuse=False)
        reuse = self.arena.size > SMALL
        if reuse:
            self.arena = builder.arena(reuse=True)
        self._lay_out(builder.ops(skip_halos=not reuse))
        self._free: list[Tensor] = []
        self._lock = threading.Lock()
        self._shapes = [torch.Size(slot.at(signature.batch)) for slot in program.output_slots]
        self._constants = [tensor.data_ptr() for tensor in builder.constants]
        self.plain = len(self.items) == 1 and isinstance(self.items[0], Stretch)

    def _lay_out(self, items: Sequence[NativeOp | Foreign | None]) -> None:
        ops: list[NativeOp] = []
        self.items: list[Stretch | Aside] = []
        self._at: list[int] = []                    # item of the builder -> ops before it
        for item in items:
            self._at.append(len(ops))
            if isinstance(item, NativeOp):
                last = self.items[-1] if self.items else None
                if isinstance(last, Stretch):
                    self.items[-1] = Stretch(last.begin, len(ops) + 1)
                else:
                    self.items.append(Stretch(len(ops), len(ops) + 1))
                ops.append(item)
            elif isinstance(item, Foreign):
                self.items.append(self._aside(item))
        self._at.append(len(ops))
        slots = (*self.program.input_slots, *self.program.output_slots)
        per_slice = [slot.dtype.itemsize * torch.Size(slot.at(self.builder.batch)).numel() for slot in slots]
        recipe = Recipe(self.settings.isa.name, self.settings.threads, self.arena.size, tuple(ops), self.slices,
                        (*per_slice, *[0] * len(self.builder.constants)),
                        tuple(tuple(self._at[item] for item in group) for group in self.builder.groups),
                        self.builder.local_bytes)
        self.network = Network(recipe, [*self.builder.keep, *self.builder.constants])

    def _aside(self, item: Foreign) -> Aside:
        made = {slot.name for step in item.steps for slot in step.outputs}
        later = {slot.name for step in self.program.steps if step not in item.steps for slot in step.reads}
        wanted = later | {slot.name for slot in self.program.output_slots}
        reads = tuple({slot.name: slot for step in item.steps for slot in step.reads if slot.name not in made}.values())
        writes = tuple(slot for step in item.steps for slot in step.outputs if slot.name in wanted)
        part = replace(self.program, inputs=reads, outputs=writes).with_steps(item.steps)
        batch = self.builder.batch
        signature = Signature(tuple(slot.at(batch) for slot in reads), batch, self.signature.device)
        return Aside(ReferenceBackend().place(part, signature), reads, writes)

    # ---- running -------------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Tensor], observe: Observe | None = None) -> list[Tensor]:
        outputs = [torch.empty(shape, dtype=slot.dtype) for shape, slot in
                   zip(self._shapes, self.program.output_slots, strict=True)]
        self.run_into(inputs, outputs, observe)
        return outputs

    def run_into(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], observe: Observe | None = None) -> None:
        """The same, into given contiguous tensors; nothing is allocated where all steps are native."""
        inputs = [x.detach().contiguous().resolve_neg() for x in inputs]
        with torch.no_grad():
            if observe is not None:
                self._observed(inputs, outputs, observe)
            elif self.plain:
                self.network.run(self.network.handle, 0, self._at[-1], 0, *self._addresses(inputs, outputs))
            else:
                self._mixed(inputs, outputs)

    def direct(self) -> Direct | None:
        """One tensor to one tensor past all layers, where that is what the network does: gives None for an input that
        is not exactly what the placement is for."""
        inputs, outputs = self.program.input_slots, self.program.output_slots
        if not (self.plain and len(inputs) == len(outputs) == 1 and inputs[0].dtype == torch.float32
                and math.prod(self.signature.shapes[0]) > 1):      # a single number may be a negated view
            return None
        shape, made = torch.Size(self.signature.shapes[0]), self._shapes[0]
        run, handle, last = self.network.run, self.network.handle, self._at[-1]
        constants, dtype, empty_like = self._constants, torch.float32, torch.empty_like
        like = torch.empty(made, dtype=dtype)      # measured: half the time of torch.empty(shape)

        def call(x: Tensor, out: Tensor | None = None) -> Tensor | None:
            if type(x) is not Tensor or x.shape != shape or x.dtype is not dtype or not x.is_cpu \
                    or not x.is_contiguous():
                return None
            if out is None:
                out = empty_like(like)
            elif out.shape != made or out.dtype is not dtype or not out.is_cpu or not out.is_contiguous():
                return None
            if constants:
                run(handle, 0, last, 0, x.data_ptr(), out.data_ptr(), *constants)
            else:                                  # measured: unpacking nothing is not free
                run(handle, 0, last, 0, x.data_ptr(), out.data_ptr())
            return out
        return call

    def _addresses(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[int]:
        return [*[x.data_ptr() for x in inputs], *[y.data_ptr() for y in outputs], *self._constants]

    def _mixed(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        state = self._start(inputs, outputs)
        addresses = self._addresses(inputs, outputs)
        for item in self.items:
            if isinstance(item, Stretch):
                self.network.run(self.network.handle, item.begin, item.end, state.memory.data_ptr(), *addresses)
            else:
                self._run_aside(item, state)
        self._finish(state, outputs)

    def _start(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> _State:
        with self._lock:
            memory = self._free.pop() if self._free else None
        if memory is None:
            memory = torch.zeros(max(self.arena.size, 64), dtype=torch.uint8)
            advise_huge(memory)
        loose = {slot.name: x for slot, x in zip(self.program.input_slots, inputs, strict=True)}
        return _State(memory, [*inputs, *outputs, *self.builder.constants], loose)

    def _run_aside(self, aside: Aside, state: _State, observe: Observe | None = None) -> None:
        given = [self.value(slot, state) for slot in aside.reads]
        for slot, result in zip(aside.writes, aside.placement.run(given, observe), strict=True):
            state.loose[slot.name] = result
            if slot.name in self.builder.places:
                self.builder.places[slot.name].on(state.memory).copy_(result)

    def _finish(self, state: _State, outputs: Sequence[Tensor]) -> None:
        """Deliver the outputs that no native op writes."""
        for slot, y in zip(self.program.output_slots, outputs, strict=True):
            if slot.dtype != torch.float32:
                y.copy_(state.loose[slot.name])
        with self._lock:
            self._free.append(state.memory)

    def value(self, slot: Slot, state: _State) -> Tensor:
        """A slot's value, in torch's order of axes."""
        if slot.name in state.loose:
            return state.loose[slot.name]
        source = self.builder.flat.get(slot.name)
        if source is not None:
            return self.value(source, state).reshape(slot.at(self.builder.batch))
        place = self.builder.places[slot.name]
        base = place.buffer.base
        if base == 0:
            return place.on(state.memory)
        origin = state.bases[base - 1]                # a slice of the batch begins somewhere in its storage
        return origin.as_strided(place.view.shape, place.view.stride(), origin.storage_offset() + place.offset // 4)

    def timer(self) -> Callable[[], list[int]]:
        """Runs the native ops of one slice on random inputs and gives the nanoseconds of each; for the tuner."""
        generator = torch.Generator().manual_seed(0)
        batch = self.builder.batch
        slots = (*self.program.input_slots, *self.program.output_slots)
        values = [torch.randn(slot.at(batch), generator=generator).to(slot.dtype) for slot in slots]
        memory = torch.zeros(max(self.arena.size, 64), dtype=torch.uint8)
        advise_huge(memory)
        addresses = self._addresses(values, [])
        return lambda: self.network.times(self.network.handle, memory.data_ptr(), *addresses) if values else []

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Step -> its native ops [first, last)."""
        return {step: (self._at[a], self._at[b]) for step, (a, b) in self.builder.spans.items()}

    @property
    def threads(self) -> int:
        """Of one call."""
        return self.settings.threads

    def least(self, seconds: float, rounds: int) -> dict[str, float]:
        """Step -> least nanoseconds of its native ops in one slice, of so many rounds and seconds at least."""
        call, least = self.timer(), list[int]()
        deadline, done = time.perf_counter() + seconds, 0
        while done < rounds or time.perf_counter() < deadline:
            now = call()
            least = list(map(min, least, now)) if least else now
            done += 1
        return {step: sum(least[a:b]) for step, (a, b) in self.ranges().items()}

    def step_seconds(self, seconds: float, repeats: int) -> dict[str, float]:
        """Least seconds of every native step for the whole batch, as the engine's own clock has them."""
        turns = self.slices / min(self.slices, self.threads)        # slices run side by side, one on each thread
        return {step: turns * each / 1e9 for step, each in self.least(seconds, repeats).items()
                if step not in self.builder.foreign}

    # ---- step by step --------------------------------------------------------------------------------------------

    def _observed(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], observe: Observe) -> None:
        gather = Gather()
        for number in range(self.slices):
            self._one_slice([x.chunk(self.slices)[number] if self.slices > 1 else x for x in inputs],
                            [y.chunk(self.slices)[number] if self.slices > 1 else y for y in outputs], gather.note)
        gather.deliver(self.program.steps, observe)

    def _in_memory(self, step: Step) -> bool:
        """Whether a step's outputs ever are: not if another step's op makes more of them right away."""
        builder = self.builder
        return step.name in builder.foreign or all(slot.name in builder.places or slot.name in builder.flat
                                                   for slot in step.outputs)

    def _one_slice(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], note: Observe) -> None:
        state = self._start(inputs, outputs)
        memory, addresses = state.memory.data_ptr(), self._addresses(inputs, outputs)
        asides = iter([item for item in self.items if isinstance(item, Aside)])
        done: set[str] = set()
        for step in self.program.steps:
            if step.name in done:
                continue
            if step.name in self.builder.foreign:
                aside = next(asides)
                self._run_aside(aside, state, note)
                done.update(inner.name for inner in aside.placement.program.steps)
                continue
            first, last = (self._at[item] for item in self.builder.spans[step.name])
            start = time.perf_counter()
            self.network.run(self.network.handle, first, last, memory, *addresses)
            seconds = time.perf_counter() - start
            values = tuple(self.value(slot, state) for slot in step.outputs) if self._in_memory(step) else ()
            note(step, values, seconds)
        exports = self.builder.spans[self.program.steps[-1].name][1] if self.program.steps else 0
        self.network.run(self.network.handle, self._at[exports], self._at[-1], memory, *addresses)
        self._finish(state, outputs)
