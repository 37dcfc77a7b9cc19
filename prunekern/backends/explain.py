"""``lowered.explain()``: what every step is, what it costs, how long it takes and how near the machine's limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from prunekern.backends.base import Placement
from prunekern.backends.roofline import Roof, measure_roof
from prunekern.core.program import GEMMS, Program, Slot, Step

REPEATS = 7
NOTHING_DONE = ("view", "weight")      # algorithms that move nothing


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


@dataclass(frozen=True)
class Explanation:
    """Prints as a table; ``rows`` for programs."""

    rows: tuple[Row, ...]
    backend: str
    batch: int
    arena: str
    roof: Roof | None
    notes: tuple[str, ...]

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def seconds(self) -> float | None:
        return sum(row.seconds or 0.0 for row in self.rows) if self.roof is not None else None

    def to_json(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in ("backend", "batch", "arena", "macs", "seconds")},
                "notes": list(self.notes), "roof": None if self.roof is None else asdict(self.roof),
                "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        head = ["step", "op", "MxNxK", "algorithm", "MACs", "bytes", "epilogue"]
        table = [[row.step, row.op, row.gemm, row.algorithm, f"{row.macs:,}" if row.macs else "", f"{row.bytes:,}",
                  row.epilogue] for row in self.rows]
        if self.roof is not None:
            head[6:6] = ["us", "roofline"]
            for line, row in zip(table, self.rows, strict=True):
                line[6:6] = [f"{(row.seconds or 0) * 1e6:.1f}", f"{row.roofline or 0:.0%}"]
        widths = [max(map(len, column)) for column in zip(head, *table, strict=True)]
        right = {"MACs", "bytes", "us", "roofline"}
        lines = ["  ".join(cell.rjust(width) if name in right else cell.ljust(width)
                           for cell, width, name in zip(line, widths, head, strict=True)).rstrip()
                 for line in [head, *table]]
        total = f"{self.backend}, batch {self.batch}: {self.macs:,} MACs, {self.arena}"
        if self.roof is not None:
            total += f", {(self.seconds or 0) * 1e6:.0f} us in steps; {self.roof}"
        return "\n".join((*lines, total, *self.notes))


def explain(placement: Placement, inputs: Sequence[Tensor], backend: str, measure: bool) -> Explanation:
    """The rows of a Placement; measured on these inputs (the median of a few runs) where asked for."""
    program, batch = placement.program, placement.signature.batch
    seconds: dict[str, list[float]] = {}
    roof = None
    if measure:
        roof = measure_roof(placement.signature.device, _dtype(program))
        for _ in range(REPEATS):
            placement.run(inputs, lambda step, _, time: seconds.setdefault(step.name, []).append(time))
    rows = []
    for step in program.steps:
        row = _row(program, step, batch, placement.algorithms.get(step.name, ""))
        times = sorted(seconds.get(step.name, ()))
        if roof is not None and times:
            median = times[len(times) // 2]
            row = Row(**{**asdict(row), "seconds": median,
                         "roofline": roof.seconds(row.macs, row.bytes) / median if median else 0.0})
        rows.append(row)
    return Explanation(tuple(rows), backend, batch,
                       str(placement.arena), roof, program.notes)


def _row(program: Program, step: Step, batch: int, algorithm: str) -> Row:
    size = {"M": 0, "N": 0, "K": 0, "groups": 1}
    if step.op in GEMMS:
        weight = program.weights[step.weights["weight"]]
        size = _gemm(step, tuple(weight.shape), batch)
    elif step.op == "matmul":
        *lead, m, n = step.output.at(batch)
        size = {"M": m, "N": n, "K": step.inputs[0].at(batch)[-1], "groups": math.prod(lead)}
    touched = 0
    if algorithm not in NOTHING_DONE:
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


def _dtype(program: Program) -> Any:
    import torch
    return next((slot.dtype for slot in program.slots().values() if slot.dtype.is_floating_point), torch.float32)
