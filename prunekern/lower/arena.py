"""Where each value of a Program lives in one buffer: offsets by liveness, shared by the backends.

Source: greedy by size, Y. Pisarchyk, J. Lee, "Efficient Memory Management for Deep Neural Net Inference",
2020 (arXiv:2001.03288), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prunekern.core.program import Program, Slot, Step

ALIGNMENT = 64      # bytes: a cache line, and the widest vector register


@dataclass(frozen=True)
class Buffer:
    """A stretch of the arena: ``[offset, offset + size)`` bytes, in use from step ``first`` to ``last``."""

    slot: str
    size: int
    first: int
    last: int
    offset: int

    def overlaps(self, other: Buffer) -> bool:
        """Both are alive at one step and share a byte."""
        return (self.first <= other.last and other.first <= self.last
                and self.offset < other.offset + other.size and other.offset < self.offset + self.size)


@dataclass(frozen=True)
class Arena:
    """One buffer of ``size`` bytes and what lives in it; ``naive`` is what no reuse would take."""

    buffers: Mapping[str, Buffer]
    size: int
    naive: int

    def __str__(self) -> str:
        return (f"arena {self.size / 2**20:.2f} MiB for {len(self.buffers)} slots "
                f"({self.naive / 2**20:.2f} MiB without reuse)")


def lifetimes(program: Program, views: Callable[[Step], bool]) -> dict[str, tuple[int, int]]:
    """Slot -> (step that makes it, last step that reads it or a view of it); -1 for inputs; outputs live on.

    views: whether a Step's outputs may share their inputs' memory.
    """
    end = len(program.steps)
    first: dict[str, int] = {slot.name: -1 for slot in program.input_slots}
    last: dict[str, int] = dict(first)
    for index, step in enumerate(program.steps):
        first.update({slot.name: index for slot in step.outputs})
        last.update({slot.name: index for slot in (*step.reads, *step.outputs)})
    last.update({slot.name: end for slot in program.output_slots})
    for step in reversed(program.steps):          # a view keeps alive what it is a view of
        if views(step):
            latest = max(last[slot.name] for slot in step.outputs)
            for slot in step.inputs:
                last[slot.name] = max(last[slot.name], latest)
    return {name: (first[name], last[name]) for name in first}


@dataclass(frozen=True)
class Wanted:
    """A stretch to be placed: bytes, and the first and last moment at which it is in use."""

    name: str
    size: int
    first: int
    last: int


def plan(program: Program, size: Callable[[Slot], int], views: Callable[[Step], bool]) -> Arena:
    """Offsets for every slot with a size above 0.

    size: bytes of a slot in the backend's layout at its batch size; 0 where it lives elsewhere.
    views: see ``lifetimes``.
    """
    alive = lifetimes(program, views)
    return pack([Wanted(slot.name, size(slot), *alive[slot.name]) for step in program.steps for slot in step.outputs])


def pack(wanted: Sequence[Wanted]) -> Arena:
    """Offsets for every stretch with a size above 0, so that what is in use at one moment shares no byte."""
    placed: dict[str, Buffer] = {}
    for item in sorted(wanted, key=lambda w: (-w.size, w.first, w.last, w.name)):
        count = -(-item.size // ALIGNMENT) * ALIGNMENT
        if count:
            placed[item.name] = _lowest(item.name, count, (item.first, item.last), placed)
    total = max((b.offset + b.size for b in placed.values()), default=0)
    return Arena(placed, total, sum(b.size for b in placed.values()))


def _lowest(name: str, size: int, alive: tuple[int, int], placed: Mapping[str, Buffer]) -> Buffer:
    """The lowest gap that is free for as long as the slot lives."""
    first, last = alive
    rivals = sorted((b for b in placed.values() if b.first <= last and first <= b.last), key=lambda b: b.offset)
    offset = 0
    for rival in rivals:
        if offset + size <= rival.offset:
            break
        offset = max(offset, rival.offset + rival.size)
    return Buffer(name, size, first, last, offset)
