"""Layer, root-mean-square and group norm; sums in fp32, the variance from the mean, not from squares.

Sources: J. Ba et al., "Layer Normalization", 2016 (arXiv:1607.06450); B. Zhang, R. Sennrich, "Root Mean Square Layer
Normalization", 2019 (arXiv:1910.07467); Y. Wu, K. He, "Group Normalization", 2018 (arXiv:1803.08494).

``share``: values that are there over values that are counted, the missing ones as zeros (pruned channels). With r for
it, and m and v the mean and variance of what is there, those of all are r m and r v + r (1 - r) m^2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekern_triton.launch import INTERPRETED, Launch, is_wide, power, tiles
from prunekern_triton.softmax import MOST, row_blocks

__all__ = ["MOST", "group_norm", "group_norm_launches", "group_norm_ref", "row_norm", "row_norm_launches",
           "row_norm_ref"]


@triton.jit
def row_norm_kernel(x, c, weight, bias, M, N, NP, ldx, ldc, eps, share, CENTRED: tl.constexpr, WIDE: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr):
    """c [M, NP] = norm of the rows of x [M, N]; CENTRED: layer norm, else by the root of the mean square."""
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    if WIDE:
        rows = rows.to(tl.int64)
    live, inside = (rows < M)[:, None], (cols < N)[None, :]
    u = tl.load(x + rows[:, None] * ldx + cols[None, :], mask=live & inside, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(u, 1) / N
        u = tl.where(inside, u - mean[:, None], 0.0)
        spread = tl.sum(u * u, 1) / N * share + mean * mean * (share * (1.0 - share))
        u = u + (mean * (1.0 - share))[:, None]
    else:
        spread = tl.sum(u * u, 1) / N * share
    y = u / tl.sqrt_rn(spread + eps)[:, None]
    if weight is not None:
        y = y * tl.load(weight + cols, mask=cols < N, other=0.0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + cols, mask=cols < N, other=0.0)[None, :]
    tl.store(c + rows[:, None] * ldc + cols[None, :], tl.where(inside, y, 0.0).to(c.dtype.element_ty),
             mask=live & (cols < NP)[None, :])


@triton.jit
def group_norm_kernel(x, c, weight, bias, P, N, NP, GROUPS, ldx, ldc, eps, share,
                      BP: tl.constexpr, BN: tl.constexpr):
    """c [images * P, NP] = norm of x [images, P, GROUPS * N], each image and group (program axes 0, 1) on its own."""
    image, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own, spots = tl.arange(0, BN), tl.arange(0, BP)
    cols, inside = which * N + own, (own < N)[None, :]
    count = (P * N).to(tl.float32)
    acc = tl.zeros((BP, BN), tl.float32)
    for p in range(0, P, BP):
        acc += tl.load(x + (image * P + p + spots)[:, None] * ldx + cols[None, :],
                       mask=(p + spots < P)[:, None] & inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(acc, 1), 0) / count
    acc = tl.zeros((BP, BN), tl.float32)
    for p in range(0, P, BP):
        seen = (p + spots < P)[:, None] & inside
        u = tl.load(x + (image * P + p + spots)[:, None] * ldx + cols[None, :], mask=seen, other=0.0).to(tl.float32)
        u = tl.where(seen, u - mean, 0.0)
        acc += u * u
    spread = tl.sum(tl.sum(acc, 1), 0) / count * share + mean * mean * (share * (1.0 - share))
    gain, mean = 1.0 / tl.sqrt_rn(spread + eps), mean * share
    scale, shift = tl.full((BN,), 1.0, tl.float32), tl.zeros((BN,), tl.float32)
    if weight is not None:
        scale = tl.load(weight + cols, mask=own < N, other=0.0)
    if bias is not None:
        shift = tl.load(bias + cols, mask=own < N, other=0.0)
    # The last group writes the zeros behind all channels too.
    kept = (own < N) | ((which == GROUPS - 1) & (cols < NP))
    for p in range(0, P, BP):
        live = (p + spots < P)[:, None]
        u = tl.load(x + (image * P + p + spots)[:, None] * ldx + cols[None, :], mask=live & inside,
                    other=0.0).to(tl.float32)
        y = tl.where(inside, (u - mean) * gain * scale[None, :] + shift[None, :], 0.0)
        tl.store(c + (image * P + p + spots)[:, None] * ldc + cols[None, :], y.to(c.dtype.element_ty),
                 mask=live & kept[None, :])


def row_norm_launches(x: Tensor, c: Tensor, n: int, weight: Tensor | None, bias: Tensor | None, eps: float,
                      centred: bool = True, share: float = 1.0) -> tuple[Launch, ...]:
    """The launch of a norm over the n columns of rows. weight, bias: fp32 ``[n]``. At most ``MOST`` columns."""
    m, (tall, across, warps) = x.shape[0], row_blocks(x.shape[0], c.shape[1])
    args = {"x": x, "c": c, "weight": weight, "bias": bias, "M": m, "N": n, "NP": c.shape[1], "ldx": x.stride(0),
            "ldc": c.stride(0), "eps": float(eps), "share": float(share)}
    return (Launch(row_norm_kernel, (tiles(m, tall),), args, {
        "CENTRED": centred, "WIDE": is_wide(x, c), "BM": tall, "BN": across}, warps, 2),)


def group_norm_launches(x: Tensor, c: Tensor, images: int, groups: int, n: int, weight: Tensor | None,
                        bias: Tensor | None, eps: float, share: float = 1.0) -> tuple[Launch, ...]:
    """The launch of a group norm over ``images`` of rows. x: ``[images * P, >= n]``; n: channels of all groups."""
    p, each, width = x.shape[0] // images, n // groups, c.shape[1]
    across = power(max(each, each + width - n if width > n else each), 1)
    high = power(min(p, max(1, (16384 if INTERPRETED else 2048) // across)))
    args = {"x": x, "c": c, "weight": weight, "bias": bias, "P": p, "N": each, "NP": width, "GROUPS": groups,
            "ldx": x.stride(0), "ldc": c.stride(0), "eps": float(eps), "share": float(share)}
    return (Launch(group_norm_kernel, (images, groups), args, {"BP": high, "BN": across}, 4, 2),)


def row_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool = True,
             share: float = 1.0) -> Tensor:
    """``[M, n]``; see ``row_norm_launches``."""
    c = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for launch in row_norm_launches(x, c, x.shape[1], weight, bias, eps, centred, share):
        launch()
    return c


def row_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool = True,
                 share: float = 1.0) -> Tensor:
    """``row_norm`` in plain torch, in the dtype of ``x``: with the missing zeros in place."""
    n = x.shape[1]
    whole = torch.nn.functional.pad(x, (0, round(n / share) - n))
    whole = whole - whole.mean(1, keepdim=True) if centred else whole
    y = (whole / (whole.square().mean(1, keepdim=True) + eps).sqrt())[:, :n]
    y = y if weight is None else y * weight.to(y)
    return y if bias is None else y + bias.to(y)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
               share: float = 1.0) -> Tensor:
    """``[images, P, n]``; see ``group_norm_launches``."""
    c = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for launch in group_norm_launches(x.flatten(0, 1), c.flatten(0, 1), x.shape[0], groups, x.shape[2], weight, bias,
                                      eps, share):
        launch()
    return c


def group_norm_ref(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
                   share: float = 1.0) -> Tensor:
    """``group_norm`` in plain torch, in the dtype of ``x``: with the missing zeros in place."""
    parts = x.unflatten(2, (groups, -1))
    each = parts.shape[3]
    whole = torch.nn.functional.pad(parts, (0, round(each / share) - each))
    variance, mean = torch.var_mean(whole, (1, 3), correction=0, keepdim=True)
    y: Tensor = ((parts - mean) / (variance + eps).sqrt()).flatten(2)
    y = y if weight is None else y * weight.to(y)
    return y if bias is None else y + bias.to(y)
