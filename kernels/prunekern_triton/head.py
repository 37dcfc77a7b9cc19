"""Global mean pooling, alone or with the classifier behind it in one launch: no pooled vector is written in between.

The latter for small batches, where launches cost more than reading an image once for each block of outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekern_triton.epilogue import NO_EPILOGUE, Epilogue, finish
from prunekern_triton.launch import INTERPRETED, Launch, is_wide, power, tiles


@triton.jit
def head_kernel(x, b, c, bias, scale, residual, M, N, NP, P, C, ldx, ldb, ldc, ldr, WIDE: tl.constexpr,
                LAST: tl.constexpr, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
                BP: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr):
    """c [M images, NP] = epilogue(mean over P positions of x [M, P, C] @ b [N, C]^T)."""
    image, cols = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * BN + tl.arange(0, BN)
    at = image.to(tl.int64) if WIDE else image
    acc = tl.zeros((BN,), tl.float32)
    for start in range(0, C, BC):
        channels = start + tl.arange(0, BC)
        there = channels < C
        total = tl.zeros((BP, BC), tl.float32)
        for p in range(0, P, BP):
            spots = p + tl.arange(0, BP)
            total += tl.load(x + (at * P)[:, None] * ldx + spots[:, None] * ldx + channels[None, :],
                             mask=(spots < P)[:, None] & there[None, :], other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / P
        w = tl.load(b + cols[:, None] * ldb + channels[None, :], mask=(cols < N)[:, None] & there[None, :], other=0.0)
        acc += tl.sum(w.to(tl.float32) * mean[None, :], 1)
    y = finish(acc[None, :], at, cols, (image < M)[:, None], bias, scale, residual, ldr, N, LAST, ACT, P0, P1, P2)
    tl.store(c + at[:, None] * ldc + cols[None, :], y.to(c.dtype.element_ty), mask=(cols < NP)[None, :])


@triton.jit
def mean_kernel(x, c, P, C, NP, ldx, ldc, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """c [images, NP] = mean over P positions of x [images, P, C], zeros from C on."""
    image = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    there = (channels < C)[None, :]
    total = tl.zeros((BP, BC), tl.float32)
    for p in range(0, P, BP):
        spots = p + tl.arange(0, BP)
        total += tl.load(x + (image * P + spots)[:, None] * ldx + channels[None, :], mask=(spots < P)[:, None] & there,
                         other=0.0).to(tl.float32)
    tl.store(c + image * ldc + channels, (tl.sum(total, 0) / P).to(c.dtype.element_ty), mask=channels < NP)


def mean_launches(x: Tensor, c: Tensor, n: int, images: int) -> tuple[Launch, ...]:
    """The launch for ``x [images * positions, >= n]``; c ``[images, >= n]``, zeros from n on."""
    positions, width = x.shape[0] // images, c.shape[1]
    high, across = (1024, 256) if INTERPRETED else (32, 32)
    high, across = power(min(positions, high)), power(min(width, across))
    args = {"x": x, "c": c, "P": positions, "C": n, "NP": width, "ldx": x.stride(0), "ldc": c.stride(0)}
    return (Launch(mean_kernel, (images, tiles(width, across)), args, {
        "WIDE": is_wide(x, c), "BP": high, "BC": across}, 4, 2),)


def mean(x: Tensor) -> Tensor:
    """``[images, C]`` from ``[images, positions, C]``; see ``mean_launches``."""
    c = torch.empty(x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)
    for launch in mean_launches(x.flatten(0, 1), c, x.shape[2], x.shape[0]):
        launch()
    return c


def mean_ref(x: Tensor) -> Tensor:
    """``mean`` in plain torch."""
    return x.mean(1)


def head_launches(x: Tensor, b: Tensor, c: Tensor, n: int, images: int, channels: int,
                  epilogue: Epilogue = NO_EPILOGUE) -> tuple[Launch, ...]:
    """The launch for ``x [images * positions, >= channels]`` and ``b`` packed ``[>= n, >= channels]``; c ``[images, >=
    n]``, zeros from n on."""
    positions, width, residual = x.shape[0] // images, c.shape[1], epilogue.residual
    across, deep = (128, 512) if INTERPRETED else (8, 64)
    across, deep = power(min(across, width), 1), power(min(deep, channels), 16)
    args = {"x": x, "b": b, "c": c, "bias": epilogue.bias, "scale": epilogue.scale, "residual": residual, "M": images,
            "N": n, "NP": width, "P": positions, "C": channels, "ldx": x.stride(0), "ldb": b.stride(0),
            "ldc": c.stride(0), "ldr": 0 if residual is None else residual.stride(0)}
    return (Launch(head_kernel, (images, tiles(width, across)), args, {
        "WIDE": is_wide(x, c), **epilogue.numbers(), "BP": power(min(positions, 16)), "BC": deep, "BN": across}, 4, 2),)


def head(x: Tensor, b: Tensor, n: int, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """``[images, n]`` from ``[images, positions, C]``; see ``head_launches``."""
    c = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    for launch in head_launches(x.flatten(0, 1), b, c, n, x.shape[0], x.shape[2], epilogue):
        launch()
    return c


def head_ref(x: Tensor, b: Tensor, n: int, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """``head`` in plain torch, in the dtype of ``x``."""
    return epilogue.apply(x.mean(1) @ b[:n, :x.shape[2]].to(x).t())
