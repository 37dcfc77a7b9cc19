"""Activations and residual adds become epilogues of the steps that make their input."""

from __future__ import annotations

from dataclasses import replace

from prunekern.core.program import ACTIVATED, GEMMS, Program, Slot, Step
from prunekern.lower.fold import readers


def fuse(program: Program) -> Program:
    """``activation(gemm + bias + residual)`` and ``activation(gemm + bias) + residual`` as one step each.

    Only where nobody else reads what lies between. A residual add takes the place of the add, so both operands
    are there; of two GEMMs the later one takes it, so the other's value need not live longer.
    """
    count = readers(program)
    steps: list[Step | None] = []
    made: dict[str, int] = {}

    def host(slot: Slot) -> int | None:
        """The step that makes a slot, where the slot is read once only."""
        return made.get(slot.name) if count[slot.name] == 1 else None

    for step in program.steps:
        index, fused = None, None
        if step.op == "activation" and step.epilogue.residual is None:
            index = host(step.inputs[0])
            before = None if index is None else steps[index]
            fused = None if before is None else _activated(before, step)
        elif step.op == "binary" and step.attributes["kind"] == "add" and not step.epilogue:
            for index, other in sorted(((host(a), b) for a, b in (step.inputs, step.inputs[::-1])),
                                       key=lambda pair: -1 if pair[0] is None else pair[0], reverse=True):
                before = None if index is None else steps[index]
                fused = None if before is None else _added(before, other, step)
                if fused is not None:
                    break
        if fused is None or index is None:
            made.update({slot.name: len(steps) for slot in step.outputs})
            steps.append(step)
            continue
        steps[index] = None
        made[fused.output.name] = len(steps)
        steps.append(fused)
    return program.with_steps(step for step in steps if step is not None)


def _activated(before: Step, step: Step) -> Step | None:
    old = before.epilogue
    if before.op not in ACTIVATED or old.activation is not None:
        return None
    return replace(before, outputs=step.outputs, epilogue=replace(old, activation=step.epilogue.activation))


def _added(before: Step, other: Slot, step: Step) -> Step | None:
    old, out = before.epilogue, step.output
    if before.op not in GEMMS or old.residual is not None or other.shape != out.shape \
            or before.output.shape != out.shape or other.dtype != out.dtype or other.name == before.output.name:
        return None
    return replace(before, outputs=step.outputs,
                   epilogue=replace(old, residual=other, residual_last=old.activation is not None))
