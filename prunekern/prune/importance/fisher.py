"""Fisher information of whole groups (Theis et al. 2018; Liu et al. 2021, 'Group Fisher Pruning')."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prunekern.prune.importance.curvature import Curvature
from prunekern.prune.importance.evidence import Contribution, Evidence


def fisher(evidence: Evidence) -> Iterator[Contribution]:
    """1/2 E_n (dL_n/dm)^2, where m multiplies all that layers read of the group's channels (1 as it is, 0 removed) and
    n runs over samples: the rise of the loss at second order once the group is gone, if the network is at a minimum.
    The derivatives of everything that leaves together are added before they are squared, so a group has one score.

    Squares are of single rows of the data (of the first 1024), not of batches. Labels are the data's own, or are drawn
    from the model's output where it has none. Sources: Theis et al., 'Faster gaze prediction with dense networks and
    Fisher pruning', equation 8; Liu et al., 'Group Fisher Pruning for Practical Network Compression', section 3.

    Raises InputError without calibration data, or where the output is no class scores and no loss is given.
    """
    found = evidence.curvature()
    remark_on(evidence, found)
    read = torch.zeros(evidence.groups.labels.groups, dtype=torch.bool)
    for args in evidence.groups.labels.masked.values():
        for arg in args:
            for _, groups in evidence.groups.labels.live.get(arg, ()):
                read[groups] = True
    ids = read.nonzero()[:, 0]
    yield ids, found.gates[ids] / 2


def remark_on(evidence: Evidence, found: Curvature) -> None:
    """Say what the data did not give."""
    if found.drawn:
        evidence.remark("the data holds no targets: labels for squared gradients were drawn from the model's output")
    if found.samples < found.rows:
        evidence.remark(f"squared gradients are of {found.samples} batches: the forward takes no single rows")
