"""Weights of Winograd's convolution: ``Y = A^T [(G w G^T) . (B^T d B)] A`` in tiles of m x m outputs.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. The other two matrices are in
``csrc/cpu/kernels/winograd.h``.

Points: F(2x2) has 0, ±1, infinity. F(4x4) has 0, ±sqrt(1/2), ±sqrt(2), infinity: pairs (p, 1/p) keep the powers that
are summed near 1 (B. Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
Neural Networks", ACM TOMS 46(4), 2020), and the error was a quarter of that with the usual 0, ±1, ±2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2.0), -math.sqrt(2.0))}


def weight_matrix(m: int) -> Tensor:
    """G, [m + 2, 3], in fp64: row i evaluates a kernel at point i, divided by the product of its distances to the
    other points (Lagrange); the last row is the point at infinity. Raises KeyError where m is not 2 or 4."""
    points = POINTS[m]
    rows = [[p ** k / math.prod(p - q for q in points if q != p) for k in range(3)] for p in points]
    g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    if m == 2:
        g[0] = -g[0]            # the kernel has d0 - d2 in its first row: no sign to flip
    return g


def transform(weight: Tensor, m: int) -> Tensor:
    """``G w G^T`` of weights [O, C, 3, 3]: [(m + 2)^2, C, O], rounded once, to fp32."""
    g = weight_matrix(m)
    return torch.einsum("ik,ockl,jl->ijco", g, weight.double(), g).flatten(0, 1).float()


def pack(matrices: Tensor, lanes: int, panel_vectors: int) -> Tensor:
    """[n, K, O] cut into panels of columns: per matrix and panel [K][columns], padded with zeros to whole vectors.

    The vectors of ``lanes`` columns are shared out evenly among as few panels as have at most ``panel_vectors`` each.
    """
    vectors = -(-matrices.shape[2] // lanes)
    panels = -(-vectors // panel_vectors)
    starts = [panel * vectors // panels * lanes for panel in range(panels + 1)]
    padded = torch.nn.functional.pad(matrices, (0, vectors * lanes - matrices.shape[2]))
    return torch.cat([padded[:, :, start:stop].flatten(1) for start, stop in zip(starts, starts[1:])], 1).contiguous()
