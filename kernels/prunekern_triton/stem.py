"""Convolution of few channels: taps and channels are one depth, so that images of 1 or 3 channels fill tiles too.

``im2col`` stores the same patches as a matrix, for a GEMM to read: worth it where every patch is read many times.

Source: K. Chellapilla, S. Puri, P. Simard, "High Performance Convolutional Neural Networks for Document Processing",
IWFHR 2006.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from prunekern_triton.configs import choose
from prunekern_triton.epilogue import NO_EPILOGUE, Epilogue, finish, put
from prunekern_triton.gemm import PRECISIONS, place_of, unit
from prunekern_triton.geometry import Window, rows
from prunekern_triton.launch import INTERPRETED, Config, Launch, is_wide, tiles, up
from prunekern_triton.pack import ROWS, pack_conv, pack_linear


@triton.jit
def patches(x, base, y, z, live, k, H, W, CP: tl.constexpr, K: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr,
            DW: tl.constexpr):
    """The im2col matrix at columns ``k``, of rows whose windows start at (y, z) of the image at ``base``."""
    tap, channel = k // CP, k % CP
    h, w = y[:, None] + (tap // KW * DH)[None, :], z[:, None] + (tap % KW * DW)[None, :]
    seen = live[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (k < K)[None, :]
    return tl.load(x + base[:, None] + (h * W + w) * CP + channel[None, :], mask=seen, other=0.0)


@triton.jit
def stem_kernel(x, b, c, bias, scale, residual, M, N, NP, H, W, OH, OW, ldb, ldc, ldr,
                OUT: tl.constexpr, WIDE: tl.constexpr, CP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr,
                DW: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, P0: tl.constexpr,
                P1: tl.constexpr, P2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                GROUP: tl.constexpr):
    """c [M = images x OH x OW, N] = epilogue(im2col(x) @ b^T); positions of x lie CP elements apart."""
    ldb, NP, ldc, ldr = ldb * 16, NP * OUT, ldc * OUT, ldr * OUT
    row, col = place_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(NP, BN), GROUP)
    at, cols, deep = row * BM + tl.arange(0, BM), col * BN + tl.arange(0, BN), tl.arange(0, BK)
    live, inside = at < M, (cols < N)[:, None]
    y, z = at // OW % OH * SH - PH, at % OW * SW - PW
    if WIDE:
        at = at.to(tl.int64)
    base = at // (OH * OW) * H * W * CP
    right = b + cols[:, None] * ldb + deep[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, KH * KW * CP, BK):
        u = patches(x, base, y, z, live, k + deep, H, W, CP, KH * KW * CP, KW, DH, DW)
        v = tl.load(right + k, mask=inside & (k + deep < ldb)[None, :], other=0.0)
        acc = tl.dot(u, tl.trans(v), acc, input_precision=PRECISION)
    acc = finish(acc, at, cols, live[:, None], bias, scale, residual, ldr, N, LAST, ACT, P0, P1, P2)
    put(c, at, cols, ldc, acc, live[:, None], NP)


@triton.jit
def im2col_kernel(x, c, M, H, W, OH, OW, ldc, WIDE: tl.constexpr, CP: tl.constexpr, KH: tl.constexpr,
                  KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                  DH: tl.constexpr, DW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """c [M, ldc] = im2col(x), columns over (tap, channel), zeros from there on."""
    ldc = ldc * 16
    at, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BK + tl.arange(0, BK)
    live = at < M
    y, z = at // OW % OH * SH - PH, at % OW * SW - PW
    if WIDE:
        at = at.to(tl.int64)
    u = patches(x, at // (OH * OW) * H * W * CP, y, z, live, k, H, W, CP, KH * KW * CP, KW, DH, DW)
    tl.store(c + at[:, None] * ldc + k[None, :], u, mask=live[:, None] & (k < ldc)[None, :])


def pack_stem(weight: Tensor, channels: int) -> Tensor:
    """``[O, I, *kernel]`` to ``[up(O, 16), up(taps * channels, 16)]``: a depth over (tap, channel)."""
    flat = pack_conv(weight, 1, channels)[0]
    return pack_linear(flat, up(flat.shape[1], ROWS))


def stem_launches(x: Tensor, b: Tensor, c: Tensor, n: int, window: Window, epilogue: Epilogue = NO_EPILOGUE, *,
                  precision: str = "ieee", config: Config | None = None) -> tuple[Launch, ...]:
    """The launch that computes a convolution without groups.

    x: ``[images, H, W, C]`` with positions at one pitch; lanes between C and the pitch hold zeros or are not there. b:
    ``pack_stem(weight, that pitch)``. c: ``[images * OH * OW, >= n]``; columns from n on get zeros.
    """
    (m, width), residual, pitch = c.shape, epilogue.residual, rows(x).stride(0)
    config = config or choose("stem", x.dtype, m, n, b.shape[1], precision)
    out = unit(c.dtype, width, c.stride(0), *(() if residual is None else (residual.stride(0),)))
    args: dict[str, Any] = {
        "x": x, "b": b, "c": c, "bias": epilogue.bias, "scale": epilogue.scale, "residual": residual, "M": m, "N": n,
        "NP": width // out, "H": x.shape[1], "W": x.shape[2], "OH": window.out[0], "OW": window.out[1],
        "ldb": b.shape[1] // 16, "ldc": c.stride(0) // out, "ldr": 0 if residual is None else residual.stride(0) // out}
    return (Launch(stem_kernel, (tiles(m, config.m) * tiles(width, config.n),), args, {
        "OUT": out, "WIDE": is_wide(x, c, residual), "CP": pitch, **window.numbers(),
        "PRECISION": PRECISIONS[precision], **epilogue.numbers(), "BM": config.m, "BN": config.n, "BK": config.k,
        "GROUP": config.group}, config.warps, config.stages),)


def im2col_launches(x: Tensor, c: Tensor, window: Window) -> tuple[Launch, ...]:
    """The launch that stores patches: x as in ``stem_launches``, c ``[images * OH * OW, up(taps * pitch, 16)]``."""
    m, pitch = c.shape[0], rows(x).stride(0)
    tall, deep = (512, 512) if INTERPRETED else (32, 64)
    args = {"x": x, "c": c, "M": m, "H": x.shape[1], "W": x.shape[2], "OH": window.out[0], "OW": window.out[1],
            "ldc": c.stride(0) // 16}
    return (Launch(im2col_kernel, (tiles(m, tall), tiles(c.shape[1], deep)), args, {
        "WIDE": is_wide(x, c), "CP": pitch, **window.numbers(), "BM": tall, "BK": deep}, 4, 2),)


def stem(x: Tensor, b: Tensor, n: int, window: Window, epilogue: Epilogue = NO_EPILOGUE, *, precision: str = "ieee",
         config: Config | None = None) -> Tensor:
    """``[images, OH, OW, n]``; see ``stem_launches``."""
    c = torch.empty(x.shape[0], *window.out, n, dtype=x.dtype, device=x.device)
    for launch in stem_launches(x, b, rows(c), n, window, epilogue, precision=precision, config=config):
        launch()
    return c


def stem_ref(x: Tensor, b: Tensor, n: int, window: Window, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """``stem`` in plain torch, in the dtype of ``x``."""
    y = im2col_ref(x, window) @ b[:n].to(x).t()
    return epilogue.apply(y).view(x.shape[0], *window.out, n)


def im2col(x: Tensor, window: Window) -> Tensor:
    """``[images * OH * OW, up(taps * pitch, 16)]``; see ``im2col_launches``."""
    pitch = rows(x).stride(0)
    c = torch.empty(x.shape[0] * window.out[0] * window.out[1], up(window.taps * pitch, 16), dtype=x.dtype,
                    device=x.device)
    for launch in im2col_launches(x, c, window):
        launch()
    return c


def im2col_ref(x: Tensor, window: Window) -> Tensor:
    """``im2col`` in plain torch."""
    pitch = rows(x).stride(0)
    whole = functional.pad(x, (0, pitch - x.shape[3]))
    flat = window.taps_of(whole).flatten(3).flatten(0, 2)
    return functional.pad(flat, (0, up(flat.shape[1], 16) - flat.shape[1]))
