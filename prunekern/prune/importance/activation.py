"""Mean post-activation (Tan & Motani 2020, 'DropNet')."""

from __future__ import annotations

from collections.abc import Iterator

from prunekern.prune.importance.evidence import Contribution, Evidence
from prunekern.prune.importance.slices import per_group


def activation(evidence: Evidence) -> Iterator[Contribution]:
    """E|a| over data and positions, of every activation in which layers read the group's channels.

    Raises InputError without calibration data.
    """
    for statistics in evidence.activations():
        yield per_group(statistics.groups, statistics.magnitude, "mean")
