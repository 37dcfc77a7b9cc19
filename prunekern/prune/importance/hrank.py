"""Rank of feature maps (Lin et al. 2020, 'HRank'): what carries little information goes first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekern.prune.importance.evidence import Contribution, Evidence, Site
from prunekern.prune.importance.slices import as_float, per_group

ROWS = 128  # of the data: the paper finds that a few images give a channel's mean rank (its figure 2)


def hrank(evidence: Evidence) -> Iterator[Contribution]:
    """E rank(A), A [height, width] being the map of a channel for one row of the data, of every activation in which
    layers read the group's channels; the mean where several lie in one. Measured on the first 128 rows.

    A map of more than two axes counts as [first, all others]. Activations without maps (vectors, sequences) have no
    rank to speak of and are left to l2, which the notes say. Source: the paper's equation 4.

    Raises InputError without calibration data.
    """
    total: dict[Site, Tensor] = {}
    rows: dict[Site, int] = {}

    def see(site: Site, value: Tensor) -> None:
        if value.dim() < 4:
            return
        maps = as_float(value).flatten(3)
        if min(maps.shape[2:]) > 1:
            ranks = torch.stack([torch.linalg.matrix_rank(row) for row in maps])
            total[site] = total.get(site, 0) + ranks.double().sum(0).cpu()
            rows[site] = rows.get(site, 0) + len(maps)

    evidence.maps(see, ROWS)
    for site, ranks in total.items():
        yield per_group(site.groups, ranks / rows[site], "mean")
