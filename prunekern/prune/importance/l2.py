"""L2 magnitude of a group (as in Fang et al. 2023, 'DepGraph': all that leaves with it counts)."""

from __future__ import annotations

from collections.abc import Iterator

from prunekern.prune.importance.evidence import Contribution, Evidence
from prunekern.prune.importance.slices import slice_sums


def l2(evidence: Evidence) -> Iterator[Contribution]:
    """(sum w^2)^(1/2) of the group's slice of every parameter that it owns a part of."""
    for groups, squares in slice_sums(evidence, lambda weight, values: values.square()):
        yield groups, squares.sqrt()
