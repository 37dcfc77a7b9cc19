"""What nobody reads is not computed."""

from __future__ import annotations

from prunekern.core.program import Program, Step


def drop_dead_steps(program: Program) -> Program:
    """Without the steps that no output depends on."""
    wanted = {slot.name for slot in program.output_slots}
    kept: list[Step] = []
    for step in reversed(program.steps):
        if any(slot.name in wanted for slot in step.outputs):
            kept.append(step)
            wanted.update(slot.name for slot in step.reads)
    return program.with_steps(reversed(kept))
