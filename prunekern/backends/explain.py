"""``lowered.explain()``: what every step is, what it costs, how long it takes and how near the machine's limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from prunekern.backends.base import Placement
from prunekern.backends.roofline import Roof, measure_roof
from prunekern.core.program import GEMMS, Program, Slot, Step

REPEATS = 7             # measurements of every step, at least
SECONDS = 0.1           # of measuring, at least
WITHIN = "within "      # before the name of the step that does the work of this one too
NOTHING_DONE = ("view", "weight")      # algorithms that move nothing


@runtime_checkable
class TimesSteps(Protocol):
    """A Placement that can time its own steps, without the copies and calls between them that ``observe`` needs."""

    threads: int

    def step_seconds(self, seconds: float, repeats: int) -> Mapping[str, float]:
        """The least seconds of every step that it can time so; measured so often and so long at least."""


@dataclass(frozen=True)
class Row:
    """One step. M, N, K: the GEMM a group (0 where it is none). bytes: inputs, outputs and weights once each.
    seconds, roofline: None unless measured; roofline is the least time this machine could take over ``seconds``."""

    step: str
    op: str
    M: int
    N: int
    K: int
    groups: int
    algorithm: str
    macs: int
    bytes: int
    epilogue: str
    source: str
    seconds: float | None = None
    roofline: float | None = None

    @property
    def gemm(self) -> str:
        if not self.K:
            return ""
        return f"{self.M}x{self.N}x{self.K}" + (f" x{self.groups}" if self.groups > 1 else "")

    @property
    def speed(self) -> str:
        """Of arithmetic (two operations a MAC) where there is any, else of memory; '' unless measured."""
        if not self.seconds or not (self.macs or self.bytes):
            return ""
        amount, unit = (2 * self.macs, "GFLOP/s") if self.macs else (self.bytes, "GB/s")
        return f"{amount / self.seconds / 1e9:.3g} {unit}"


@dataclass(frozen=True)
class Explanation:
    """Prints as a table; ``rows`` for programs. call: seconds of a whole call, outputs allocated; None unless
    measured. threads: of a call."""

    rows: tuple[Row, ...]
    backend: str
    batch: int
    arena: str
    roof: Roof | None
    notes: tuple[str, ...]
    call: float | None = None
    threads: int = 1

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def seconds(self) -> float | None:
        return sum(row.seconds or 0.0 for row in self.rows) if self.roof is not None else None

    @property
    def remarks(self) -> tuple[str, ...]:
        """How to read what looks odd."""
        above = any((row.roofline or 0) > 1 and row.algorithm.startswith("winograd") for row in self.rows)
        return ("MACs are those of the direct convolution; Winograd does fewer, and may be above the roof for them.",
                ) if above else ()

    def to_json(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in ("backend", "batch", "arena", "macs", "seconds", "call",
                                                        "threads")},
                "notes": list(self.notes), "roof": None if self.roof is None else asdict(self.roof),
                "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        head = ["step", "op", "MxNxK", "algorithm", "MACs", "bytes", "epilogue"]
        table = [[row.step, row.op, row.gemm, row.algorithm, f"{row.macs:,}" if row.macs else "", f"{row.bytes:,}",
                  row.epilogue] for row in self.rows]
        if self.roof is not None:
            head[6:6] = ["us", "speed", "roofline"]
            for line, row in zip(table, self.rows, strict=True):
                line[6:6] = [f"{(row.seconds or 0) * 1e6:.1f}", row.speed, f"{row.roofline or 0:.0%}"]
        widths = [max(map(len, column)) for column in zip(head, *table, strict=True)]
        right = {"MACs", "bytes", "us", "speed", "roofline"}
        lines = ["  ".join(cell.rjust(width) if name in right else cell.ljust(width)
                           for cell, width, name in zip(line, widths, head, strict=True)).rstrip()
                 for line in [head, *table]]
        total = f"{self.backend}, batch {self.batch}: {self.macs:,} MACs, {self.arena}"
        if self.roof is not None:
            total += (f", {(self.seconds or 0) * 1e6:.1f} us in steps, {(self.call or 0) * 1e6:.1f} us a call on "
                      f"{self.threads} thread{'s' * (self.threads > 1)}; {self.roof}")
        return "\n".join((*lines, total, *self.notes, *self.remarks))


def explain(placement: Placement, inputs: Sequence[Tensor], backend: str, measure: bool) -> Explanation:
    """The rows of a Placement; measured where asked for (the least of some runs, on these inputs or ones like them)."""
    program, batch = placement.program, placement.signature.batch
    rows = [_row(program, step, batch, placement.algorithms.get(step.name, "")) for step in program.steps]
    threads = placement.threads if isinstance(placement, TimesSteps) else torch.get_num_threads()
    plain = Explanation(tuple(rows), backend, batch, str(placement.arena), None, program.notes, threads=threads)
    if not measure:
        return plain
    roof = measure_roof(placement.signature.device, _dtype(program), threads)
    seconds = _step_seconds(placement, inputs)
    return replace(plain, roof=roof, call=_call_seconds(placement, inputs),
                   rows=tuple(_timed(row, seconds.get(row.step), roof) for row in rows))


def _timed(row: Row, seconds: float | None, roof: Roof) -> Row:
    if seconds is None:
        return row
    return replace(row, seconds=seconds, roofline=roof.seconds(row.macs, row.bytes) / seconds if seconds else 0.0)


def _step_seconds(placement: Placement, inputs: Sequence[Tensor]) -> dict[str, float]:
    """The least seconds of every step: as the placement itself measures them, else observed from outside."""
    found = dict(placement.step_seconds(SECONDS, REPEATS)) if isinstance(placement, TimesSteps) else {}
    if all(step.name in found for step in placement.program.steps):
        return found
    seen: dict[str, float] = {}
    for _ in range(REPEATS):
        placement.run(inputs, lambda step, _, now: seen.update({step.name: min(seen.get(step.name, now), now)}))
    return {**seen, **found}


def _call_seconds(placement: Placement, inputs: Sequence[Tensor]) -> float:
    """The least seconds of a whole call."""
    direct = placement.direct()
    call: Callable[[], Any] = partial(placement.run, inputs) if direct is None else partial(direct, *inputs)
    least, start, count = math.inf, time.perf_counter(), 0
    wait: Callable[[], Any] = torch.cuda.synchronize if placement.signature.device.type == "cuda" else lambda: None
    while count < REPEATS or time.perf_counter() - start < SECONDS / 2:
        before = time.perf_counter()
        call()
        wait()
        least, count = min(least, time.perf_counter() - before), count + 1
    return least


def _row(program: Program, step: Step, batch: int, algorithm: str) -> Row:
    size = {"M": 0, "N": 0, "K": 0, "groups": 1}
    if step.op in GEMMS:
        weight = program.weights[step.weights["weight"]]
        size = _gemm(step, tuple(weight.shape), batch)
    elif step.op == "matmul":
        *lead, m, n = step.output.at(batch)
        size = {"M": m, "N": n, "K": step.inputs[0].at(batch)[-1], "groups": math.prod(lead)}
    touched = 0
    if algorithm not in NOTHING_DONE and not algorithm.startswith(WITHIN):
        touched = sum(program.weights[name].nbytes for name in step.weight_names())
        touched += sum(_bytes(slot, batch) for slot in (*step.reads, *step.outputs))
    return Row(step.name, step.op, **size, algorithm=algorithm, macs=step.macs.at(batch),
               bytes=touched,
               epilogue=str(step.epilogue), source=step.source)


def _gemm(step: Step, weight: tuple[int, ...], batch: int) -> dict[str, int]:
    groups = step.attributes.get("groups", 1)
    if step.op == "linear":
        return {"M": math.prod(step.output.at(batch)[:-1]), "N": weight[0], "K": weight[1], "groups": 1}
    if step.op == "conv":
        positions = batch_of(step.output, batch) * math.prod(step.output.at(batch)[2:])
        return {"M": positions, "N": weight[0] // groups, "K": math.prod(weight[1:]), "groups": groups}
    positions = batch_of(step.inputs[0], batch) * math.prod(step.inputs[0].at(batch)[2:])
    return {"M": positions, "N": math.prod(weight[1:]), "K": weight[0] // groups, "groups": groups}


def batch_of(slot: Slot, batch: int) -> int:
    return slot.at(batch)[0]


def _bytes(slot: Slot, batch: int) -> int:
    return math.prod(slot.at(batch)) * slot.dtype.itemsize


def _dtype(program: Program) -> torch.dtype:
    return next((slot.dtype for slot in program.slots().values() if slot.dtype.is_floating_point), torch.float32)
