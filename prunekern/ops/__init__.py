"""Operator rules, one family a file. ``REGISTRY`` finds the rule of an operator."""

from __future__ import annotations

from prunekern.core.rule import Registry
from prunekern.ops import (
    attention,
    contraction,
    einsum,
    elementwise,
    experts,
    indexing,
    movement,
    norm,
    pieces,
    recurrent,
    scan,
    spatial,
)

FAMILIES = (contraction, einsum, attention, recurrent, norm, elementwise, spatial, movement, pieces, indexing, scan,
            experts)
REGISTRY = Registry(rule for family in FAMILIES for rule in family.RULES)
