"""A batch that has no good divisor, in two parts: slices that fill the caches, and what is left over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prunekern.backends.base import Gather, Observe, Signature
from prunekern.backends.cpu.placement import CpuPlacement
from prunekern.core.program import Program
from prunekern.lower.arena import Arena


class PartedPlacement:
    """See ``backends.base.Placement``. parts: placements of neighbouring parts of the batch, first to last."""

    def __init__(self, program: Program, signature: Signature, parts: Sequence[CpuPlacement]) -> None:
        self.program, self.signature, self.parts = program, signature, parts
        first = parts[0]
        self.algorithms: Mapping[str, str] = first.algorithms
        self.arena: Arena = first.arena
        self.rows = {**parts[-1].rows, **first.rows}
        self._shapes = [slot.at(signature.batch) for slot in program.output_slots]

    def run(self, inputs: Sequence[Tensor], observe: Observe | None = None) -> list[Tensor]:
        outputs = [torch.empty(shape, dtype=slot.dtype) for shape, slot in
                   zip(self._shapes, self.program.output_slots, strict=True)]
        if observe is None:
            self.run_into(inputs, outputs)
            return outputs
        gather = Gather()
        for part, xs, ys in self._cut(inputs, outputs):
            part.run_into(xs, ys, gather.note)
        gather.deliver(self.program.steps, observe)
        return outputs

    def run_into(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        for part, xs, ys in self._cut(inputs, outputs):
            part.run_into(xs, ys)

    def direct(self) -> None:
        return None

    def step_seconds(self, seconds: float, repeats: int) -> dict[str, float]:
        """See ``CpuPlacement.step_seconds``."""
        found: dict[str, float] = {}
        for part in self.parts:
            for step, time in part.step_seconds(seconds, repeats).items():
                found[step] = found.get(step, 0.0) + time
        return found

    @property
    def threads(self) -> int:
        return self.parts[0].threads

    def _cut(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor],
             ) -> Iterator[tuple[CpuPlacement, list[Tensor], list[Tensor]]]:
        start = 0
        for part in self.parts:
            rows = slice(start, start + part.signature.batch)
            start = rows.stop
            yield part, [x[rows] for x in inputs], [y[rows] for y in outputs]
