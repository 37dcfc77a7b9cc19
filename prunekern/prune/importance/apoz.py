"""Average percentage of zeros (Hu et al. 2016, 'Network Trimming'): mostly zero goes first."""

from __future__ import annotations

from collections.abc import Iterator

from prunekern.prune.importance.evidence import Contribution, Evidence
from prunekern.prune.importance.slices import per_group


def apoz(evidence: Evidence) -> Iterator[Contribution]:
    """1 - APoZ: the share of values other than zero over data and positions, of every activation in which
    layers read the group's channels. It tells channels apart behind ReLU and its like only.

    Raises InputError without calibration data.
    """
    for statistics in evidence.activations():
        yield per_group(statistics.groups, 1 - statistics.zeros, "mean")
