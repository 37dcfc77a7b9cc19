"""Channel independence (Sui et al. 2021, 'CHIP'): a channel that others can express goes first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prunekern.prune.importance.evidence import Contribution, Evidence, Site
from prunekern.prune.importance.slices import per_group

ROWS = 64  # of the data: a singular value decomposition each, of every activation
REACH, STEP = math.log(1e9), 0.3  # of the integral over log t: what lies outside, and between, is below 1e-9


def chip(evidence: Evidence) -> Iterator[Contribution]:
    """E ||A||_* - ||A without the channel||_*, A [channels, positions] being an activation for one row of the data
    and ||.||_* the sum of its singular values, of every activation in which layers read the group's channels; the
    mean where several lie in one. Measured on the first 64 rows; where an activation has no positions, the rows take
    their place. Source: the paper's equations 3 and 4 (one channel at a time).

    Raises InputError without calibration data.
    """
    total: dict[Site, Tensor] = {}
    rows: dict[Site, int] = {}
    vectors: dict[Site, list[Tensor]] = {}

    def see(site: Site, value: Tensor) -> None:
        matrices = value.detach().to("cpu", torch.float64).flatten(2) if value.dim() > 2 else value[..., None]
        if matrices.shape[2] == 1:
            vectors.setdefault(site, []).append(matrices[..., 0].to("cpu", torch.float64))
        else:
            for matrix in matrices:
                total[site] = total.get(site, 0) + independence(matrix)
            rows[site] = rows.get(site, 0) + len(matrices)

    evidence.maps(see, ROWS)
    for site, values in total.items():
        yield per_group(site.groups, values / rows[site], "mean")
    for site, parts in vectors.items():
        yield per_group(site.groups, independence(torch.cat(parts).T), "mean")


def independence(matrix: Tensor) -> Tensor:
    """How much the nuclear norm falls when each row alone is zeroed: [n, p] fp64 -> [n], all from one decomposition.

    With ||A||_* = tr sqrt(G), G = A'A, and sqrt(x) = 2/pi int x/(x + t^2) dt over t > 0, a row's removal is a rank-one
    change of G, of which the trace of (G + t^2)^-1 is known in closed form (Sherman and Morrison):

        fall = 2/pi int t^2 sum_j l_j u_j^2 / (l_j + t^2)^2 / (1 - sum_j l_j u_j^2 / (l_j + t^2)) dt

    for A = U diag(sqrt l) V', u the row of U. The integrand is analytic in log t around the real axis, so the
    trapezoid rule converges exponentially (Trefethen and Weideman 2014). It costs n p k for k = 140 nodes, where a
    decomposition for each row would cost n times as much as the first.
    """
    u, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    scale = float(sigma.max()) if sigma.numel() else 0.0
    if not scale:
        return matrix.new_zeros(len(matrix))
    weight, eigen = u.square(), (sigma / scale).square()
    rest = (1 - weight.sum(1, keepdim=True)).clamp(min=0)  # of the row's direction that no column reaches
    t = torch.arange(-REACH, REACH, STEP, dtype=matrix.dtype).exp()
    pole = eigen[:, None] + t.square()
    above = weight @ (eigen[:, None] * t.square() / pole.square())
    below = weight @ (t.square() / pole) + rest  # = 1 - sum l u^2 / (l + t^2), without its cancellation
    fall: Tensor = (above / below * t).sum(1) * (scale * 2 / math.pi * STEP)
    return fall
