"""Layer-adaptive magnitude (Lee et al. 2021, 'LAMP'), of slices in place of single weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekern.core.labels import FIXED
from prunekern.prune.importance.evidence import Contribution, Evidence, brings
from prunekern.prune.importance.slices import slice_sums


@brings(normalisation="none")
def lamp(evidence: Evidence) -> Iterator[Contribution]:
    """s_i / (s_i + sum of the larger s_j), s being the squared L2 norms of a layer's slices, for every layer that
    issues or reads the group's channels.

    It is the share of the energy still there that leaves with the slice, the smaller ones having gone before it. So
    scores of different layers can be compared as they are, and the largest slice of a layer has 1: LAMP *is* a
    normalisation, and brings ``normalisation='none'``; dividing by a family's mean would undo it. What must stay is
    in every sum. The paper (section 3) scores single weights; biases and batch norms, which it leaves alone, are not
    counted here either.
    """
    labels = evidence.groups.labels
    layers = set(labels.produced) | set(labels.consumed)
    for groups, squares in slice_sums(evidence, lambda weight, values: values.square(), layers):
        yield groups, shares(squares, groups == FIXED)


def shares(squares: Tensor, stays: Tensor) -> Tensor:
    """Each value over the sum of itself and those that rank above it; equal ones rank by position. 0/0 is 0.

    squares: fp64 [n], not negative. stays: boolean [n], ranks above all others.
    """
    order = torch.where(stays, torch.inf, squares).argsort(stable=True)
    left = squares[order].flip(0).cumsum(0).flip(0)
    result = torch.empty_like(squares)
    result[order] = torch.where(left > 0, squares[order] / left, 0.0)
    return result
