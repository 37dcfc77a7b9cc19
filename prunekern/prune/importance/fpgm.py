"""Geometric median (He et al. 2019, 'FPGM'): the most replaceable goes first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekern.prune.importance.evidence import Contribution, Evidence
from prunekern.prune.importance.slices import as_float, filters, per_group

ROWS = 1024  # filters whose distances are held at a time


def fpgm(evidence: Evidence) -> Iterator[Contribution]:
    """Sum of the Euclidean distances from a filter to all filters of its layer, for every layer that issues
    the group's channels; the mean over a group's filters where it has several in one layer.
    """
    labels = evidence.groups.labels
    for name, axis in labels.produced:
        groups = labels.axes.get((name, axis))
        if groups is None or not evidence.graph.tensors[name].is_floating_point():
            continue
        points = filters(as_float(evidence.graph.tensors[name]), axis, groups)
        yield per_group(groups.reshape(-1), distances(points), "mean")


def distances(points: Tensor) -> Tensor:
    """Row sums of the distance matrix of points [n, d]."""
    points = points - points.mean(0)  # distances are the same, and cancel less in the fast formula
    return torch.cat([torch.cdist(rows, points).sum(1, dtype=torch.float64) for rows in points.split(ROWS)])
