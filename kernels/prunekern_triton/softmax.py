"""Softmax and its logarithm along rows; the whole row in registers.

Source: M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867), section 2, the
safe form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekern_triton.launch import INTERPRETED, Launch, is_wide, power, tiles

MOST = 16384            # columns of a row


@triton.jit
def softmax_kernel(x, c, M, N, NP, ldx, ldc, LOG: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr):
    """c [M, NP] = softmax of x [M, N] along rows, zeros from N on."""
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    if WIDE:
        rows = rows.to(tl.int64)
    live, inside = (rows < M)[:, None], (cols < N)[None, :]
    u = tl.load(x + rows[:, None] * ldx + cols[None, :], mask=live & inside, other=float("-inf")).to(tl.float32)
    most = tl.max(u, 1)[:, None]
    u = u - tl.where(live, most, 0.0)
    e = tl.exp(u)
    total = tl.sum(e, 1)[:, None]
    y = u - tl.log(total) if LOG else e / total
    tl.store(c + rows[:, None] * ldc + cols[None, :], tl.where(inside, y, 0.0).to(c.dtype.element_ty),
             mask=live & (cols < NP)[None, :])


def row_blocks(m: int, n: int) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps."""
    across = power(n, 16)
    tall = power(min(m, 4096)) if INTERPRETED else max(1, 2048 // across)
    return tall, across, 8 if across >= 4096 else 4


def softmax_launches(x: Tensor, c: Tensor, n: int, log: bool = False) -> tuple[Launch, ...]:
    """The launch that computes ``c [M, >= n]`` from ``x [M, >= n]``, rows of any pitch, at most ``MOST`` columns."""
    m, (tall, across, warps) = x.shape[0], row_blocks(x.shape[0], c.shape[1])
    args = {"x": x, "c": c, "M": m, "N": n, "NP": c.shape[1], "ldx": x.stride(0), "ldc": c.stride(0)}
    return (Launch(softmax_kernel, (tiles(m, tall),), args, {
        "LOG": log, "WIDE": is_wide(x, c), "BM": tall, "BN": across}, warps, 2),)


def softmax(x: Tensor, log: bool = False) -> Tensor:
    """``[M, n]``; see ``softmax_launches``."""
    c = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for launch in softmax_launches(x, c, x.shape[1], log):
        launch()
    return c


def softmax_ref(x: Tensor, log: bool = False) -> Tensor:
    """``softmax`` in plain torch."""
    return torch.log_softmax(x, 1) if log else torch.softmax(x, 1)
