"""Depthwise convolution and pooling: every channel on its own, taps one after the other, sums in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekern_triton.epilogue import NO_EPILOGUE, Epilogue, finish, put
from prunekern_triton.gemm import unit
from prunekern_triton.geometry import Window, rows
from prunekern_triton.launch import INTERPRETED, Launch, is_wide, power, tiles


@triton.jit
def depthwise_kernel(x, b, c, bias, scale, residual, M, N, NP, H, W, OH, OW, ldx, ldb, ldc, ldr,
                     IN: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                     SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr,
                     DW: tl.constexpr, TIMES: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, P0: tl.constexpr,
                     P1: tl.constexpr, P2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """c [M = images x OH x OW, N] = epilogue(sum over taps of x * b [taps, N]); TIMES outputs in a row read one
    input channel."""
    ldx, ldb, NP, ldc, ldr = ldx * IN, ldb * IN, NP * OUT, ldc * OUT, ldr * OUT
    at, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    live, inside = at < M, (cols < N)[None, :]
    y, z = at // OW % OH * SH - PH, at % OW * SW - PW
    if WIDE:
        at = at.to(tl.int64)
    first = x + (at // (OH * OW) * H * W)[:, None] * ldx + (cols // TIMES)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for tap in range(KH * KW):
        h, w = y + tap // KW * DH, z + tap % KW * DW
        seen = (live & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & inside
        u = tl.load(first + (h * W + w)[:, None] * ldx, mask=seen, other=0.0).to(tl.float32)
        acc += u * tl.load(b + tap * ldb + cols, mask=cols < N, other=0.0)[None, :]
    acc = finish(acc, at, cols, live[:, None], bias, scale, residual, ldr, N, LAST, ACT, P0, P1, P2)
    put(c, at, cols, ldc, acc, live[:, None], NP)


@triton.jit
def pool_kernel(x, c, M, N, NP, H, W, HP, WP, OH, OW, ldx, ldc, IN: tl.constexpr, OUT: tl.constexpr,
                WIDE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, MAX: tl.constexpr,
                DIVISOR: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Maximum (NaN where one is) or mean over windows. DIVISOR: fixed, or 0 for the positions in the image, padding
    (up to HP, WP) included where PADDED."""
    ldx, NP, ldc = ldx * IN, NP * OUT, ldc * OUT
    at, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    live, inside = at < M, (cols < N)[None, :]
    y, z = at // OW % OH * SH - PH, at % OW * SW - PW
    if WIDE:
        at = at.to(tl.int64)
    first = x + (at // (OH * OW) * H * W)[:, None] * ldx + cols[None, :]
    acc = tl.full((BM, BN), float("-inf"), tl.float32) if MAX else tl.zeros((BM, BN), tl.float32)
    for tap in range(KH * KW):
        h, w = y + tap // KW * DH, z + tap % KW * DW
        seen = (live & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & inside
        if MAX:
            u = tl.load(first + (h * W + w)[:, None] * ldx, mask=seen, other=float("-inf")).to(tl.float32)
            acc = tl.where((u > acc) | (u != u), u, acc)
        else:
            acc += tl.load(first + (h * W + w)[:, None] * ldx, mask=seen, other=0.0).to(tl.float32)
    if not MAX:
        if DIVISOR:
            acc = acc / DIVISOR
        else:
            if PADDED:
                high, wide = tl.minimum(y + KH, HP) - y, tl.minimum(z + KW, WP) - z
            else:
                high = tl.minimum(y + KH, H) - tl.maximum(y, 0)
                wide = tl.minimum(z + KW, W) - tl.maximum(z, 0)
            acc = acc / (high * wide).to(tl.float32)[:, None]
    acc = tl.where(inside, acc, 0.0)
    put(c, at, cols, ldc, acc, live[:, None], NP)


def blocks(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Positions and channels of a program: 16 bytes a thread and tap, 4 warps."""
    if INTERPRETED:
        return 512, power(min(width, 128), 16)
    across = power(min(width, 64), 16)
    return max(4, 4 * 32 * (16 // dtype.itemsize) // across), across


def depthwise_launches(x: Tensor, b: Tensor, c: Tensor, n: int, window: Window, epilogue: Epilogue = NO_EPILOGUE,
                       times: int = 1) -> tuple[Launch, ...]:
    """The launch of a depthwise convolution. x: ``[images, H, W, n / times]`` at one pitch; b:
    ``pack.pack_depthwise(weight, columns)``; c: ``[images * OH * OW, >= n]``, zeros from n on."""
    (m, width), residual, pitch = c.shape, epilogue.residual, rows(x).stride(0)
    step = unit(x.dtype, pitch, b.shape[1])
    out = unit(c.dtype, width, c.stride(0), *(() if residual is None else (residual.stride(0),)))
    tall, across = blocks(width, x.dtype)
    args: dict[str, Any] = {
        "x": x, "b": b, "c": c, "bias": epilogue.bias, "scale": epilogue.scale, "residual": residual, "M": m, "N": n,
        "NP": width // out, "H": x.shape[1], "W": x.shape[2], "OH": window.out[0], "OW": window.out[1],
        "ldx": pitch // step, "ldb": b.shape[1] // step, "ldc": c.stride(0) // out,
        "ldr": 0 if residual is None else residual.stride(0) // out}
    return (Launch(depthwise_kernel, (tiles(m, tall), tiles(width, across)), args, {
        "IN": step, "OUT": out, "WIDE": is_wide(x, c, residual), **window.numbers(), "TIMES": times,
        **epilogue.numbers(), "BM": tall, "BN": across}, 4, 2),)


def pool_launches(x: Tensor, c: Tensor, n: int, window: Window, kind: str, *, divisor: int = 0,
                  include: bool = True, high: tuple[int, int] = (0, 0)) -> tuple[Launch, ...]:
    """The launch of a pooling. kind: "max" or "avg". divisor: of a mean, 0 for the size of the window, cut at the
    image's padding (``include``; ``high``: what there is of it at the ends) or at the image itself."""
    (m, width), pitch = c.shape, rows(x).stride(0)
    step, out = unit(x.dtype, pitch), unit(c.dtype, width, c.stride(0))
    tall, across = blocks(width, x.dtype)
    args = {"x": x, "c": c, "M": m, "N": n, "NP": width // out, "H": x.shape[1], "W": x.shape[2],
            "HP": x.shape[1] + high[0], "WP": x.shape[2] + high[1], "OH": window.out[0], "OW": window.out[1],
            "ldx": pitch // step, "ldc": c.stride(0) // out}
    return (Launch(pool_kernel, (tiles(m, tall), tiles(width, across)), args, {
        "IN": step, "OUT": out, "WIDE": is_wide(x, c), **window.numbers(), "MAX": kind == "max", "DIVISOR": divisor,
        "PADDED": include, "BM": tall, "BN": across}, 4, 2),)


def depthwise(x: Tensor, b: Tensor, window: Window, epilogue: Epilogue = NO_EPILOGUE, times: int = 1) -> Tensor:
    """``[images, OH, OW, C * times]``; see ``depthwise_launches``."""
    c = torch.empty(x.shape[0], *window.out, x.shape[3] * times, dtype=x.dtype, device=x.device)
    for launch in depthwise_launches(x, b, rows(c), c.shape[3], window, epilogue, times):
        launch()
    return c


def depthwise_ref(x: Tensor, b: Tensor, window: Window, epilogue: Epilogue = NO_EPILOGUE, times: int = 1) -> Tensor:
    """``depthwise`` in plain torch, in the dtype of ``x``."""
    x = x.repeat_interleave(times, 3)
    taps = b[:, :x.shape[3]].to(x).view(*window.kernel, -1)
    y = (window.taps_of(x) * taps).sum((3, 4))
    return epilogue.apply(y.flatten(0, 2)).view(y.shape)


def pool(x: Tensor, window: Window, kind: str, **options: Any) -> Tensor:
    """``[images, OH, OW, C]``; see ``pool_launches``."""
    c = torch.empty(x.shape[0], *window.out, x.shape[3], dtype=x.dtype, device=x.device)
    for launch in pool_launches(x, rows(c), x.shape[3], window, kind, **options):
        launch()
    return c


def pool_ref(x: Tensor, window: Window, kind: str, *, divisor: int = 0, include: bool = True,
             high: tuple[int, int] = (0, 0)) -> Tensor:
    """``pool`` in plain torch."""
    if kind == "max":
        return window.taps_of(x, -torch.inf).amax((3, 4))
    total = window.taps_of(x).sum((3, 4))
    if divisor:
        return total / divisor
    there = torch.ones_like(x[..., :1])
    if include:                                     # padding counts, what a rounded-up output reaches beyond does not
        (top, left), (bottom, right) = window.padding, high
        there = torch.nn.functional.pad(there, (0, 0, left, right, top, bottom), value=1.0)
        inner = Window(window.kernel, window.stride, (0, 0), window.dilation, window.out)
        return total / inner.taps_of(there).sum((3, 4))
    return total / window.taps_of(there).sum((3, 4))
