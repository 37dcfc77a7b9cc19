"""Optimal brain damage with a Fisher diagonal (LeCun et al. 1989), over whole groups."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from prunekern.prune.importance.evidence import Contribution, Evidence, Weight
from prunekern.prune.importance.fisher import remark_on
from prunekern.prune.importance.slices import slice_sums


def obd(evidence: Evidence) -> Iterator[Contribution]:
    """sum 1/2 h w^2 over the group's slice of every parameter; h = E_n (dL_n/dw)^2, the diagonal of the Fisher
    information (of the Gauss-Newton matrix, where the loss is a cross-entropy and labels are drawn from the output).
    It is the rise of the loss at second order once the slice is zero, as if weights did not act together; ``fisher``
    keeps what they do together within a group.

    Squares are of single rows of the data (of the first 1024), not of batches. Labels are the data's own, or are drawn
    from the model's output where it has none.

    Raises InputError without calibration data, or where the output is no class scores and no loss is given.
    """
    found = evidence.curvature()
    remark_on(evidence, found)

    def saliency(weight: Weight, values: Tensor) -> Tensor:
        return values.square() * found.weights[weight.name] / 2

    yield from slice_sums(evidence, saliency)
