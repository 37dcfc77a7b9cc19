"""First-order Taylor importance (Molchanov et al. 2017; 2019, 'Importance Estimation')."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from prunekern.prune.importance.evidence import Contribution, Evidence, Weight
from prunekern.prune.importance.slices import as_float, slice_sums


def taylor(evidence: Evidence) -> Iterator[Contribution]:
    """|sum w * dL/dw| of the group's slice of every parameter: the change of the loss if the slice were zero,
    at first order. L is the mean loss over the calibration data.

    Raises InputError without calibration data, or without targets and loss.
    """
    gradients = evidence.gradients()

    def change(weight: Weight, values: Tensor) -> Tensor:
        return values * as_float(gradients[weight.name])

    for groups, changes in slice_sums(evidence, change):
        yield groups, changes.abs()
