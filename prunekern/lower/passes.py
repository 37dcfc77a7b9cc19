"""The passes in order. Each is a function Program -> Program that keeps what is computed."""

from __future__ import annotations

from prunekern.core.program import Program
from prunekern.lower.channels import drop_dead_channels
from prunekern.lower.dead import drop_dead_steps
from prunekern.lower.fold import fold_after, fold_before
from prunekern.lower.fuse import fuse

PASSES = (drop_dead_steps, fold_after, fold_before, fuse, drop_dead_channels, drop_dead_steps)


def optimise(program: Program) -> Program:
    """Everything folded, fused and dropped that can be."""
    for each in PASSES:
        program = each(program)
    return program
