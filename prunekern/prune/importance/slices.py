"""Sums over the slices of a weight that belong to each group; what the criteria on weights share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Literal

import torch
from torch import Tensor

from prunekern.prune.importance.evidence import Contribution, Evidence, Weight


def per_group(groups: Tensor, values: Tensor, how: Literal["sum", "mean"]) -> Contribution:
    """One entry per group: a channel may own several indices of an axis (the pixels behind a flatten).

    groups: int64 [n]; values: [n], on any device.
    """
    values = values.detach().to("cpu", torch.float64)
    ids, inverse = torch.unique(groups, return_inverse=True)
    total = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, inverse, values)
    if how == "mean":
        total /= torch.bincount(inverse, minlength=len(ids))
    return ids, total


def slice_sums(
    evidence: Evidence,
    of: Callable[[Weight, Tensor], Tensor],
    only: Collection[tuple[str, int]] | None = None,
) -> Iterator[Contribution]:
    """For every axis with channels of every weight: the sum over each group's slice.

    of(weight, values): what is summed up, a tensor of the weight's shape; values: the weight in fp32 or fp64.
    only: (name, axis) of the slices that count; None: all.
    """
    for weight in evidence.weights():
        axes = [axis for axis in sorted(weight.axes) if only is None or (weight.name, axis) in only]
        if axes and weight.tensor.is_floating_point():
            summands = of(weight, as_float(weight.tensor))
            for axis in axes:
                groups = weight.axes[axis]
                yield per_group(groups.reshape(-1), axis_sums(summands, axis, groups).reshape(-1), "sum")


def axis_sums(values: Tensor, axis: int, groups: Tensor) -> Tensor:
    """Sums over all but one axis, [rows, n]; ``groups``: [n], or [rows, n] where blocks of axis 0 differ.

    What lies in front goes first: whole contiguous rows are added, several times faster than a reduction
    over all other axes at once.
    """
    table = _blocks(values, axis, groups)
    table = table.squeeze(1) if table.shape[1] == 1 else table.sum(1)
    return table.squeeze(2) if table.shape[2] == 1 else table.sum(2)


def _blocks(tensor: Tensor, axis: int, groups: Tensor) -> Tensor:
    """[blocks of axis 0, everything else in front of the axis, the axis, everything behind it]"""
    rows = len(groups) if groups.dim() == 2 else 1
    return tensor.reshape(rows, -1, tensor.shape[axis], tensor.shape[axis + 1 :].numel())


def filters(tensor: Tensor, axis: int, groups: Tensor) -> Tensor:
    """The slices of an axis as the rows of a matrix [n, d], in the order of ``groups.reshape(-1)``."""
    return _blocks(tensor, axis, groups).transpose(1, 2).flatten(2).flatten(0, 1)


def as_float(tensor: Tensor) -> Tensor:
    """Half precision overflows in squares and sums; fp32 and fp64 stay as they are."""
    return tensor.detach().float() if tensor.dtype.itemsize < 4 else tensor.detach()
