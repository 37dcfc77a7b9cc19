"""L1 magnitude of a group (Li et al. 2017, 'Pruning Filters for Efficient ConvNets', over whole groups)."""

from __future__ import annotations

from collections.abc import Iterator

from prunekern.prune.importance.evidence import Contribution, Evidence
from prunekern.prune.importance.slices import slice_sums


def l1(evidence: Evidence) -> Iterator[Contribution]:
    """sum |w| of the group's slice of every parameter that it owns a part of."""
    return slice_sums(evidence, lambda weight, values: values.abs())
