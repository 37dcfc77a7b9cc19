"""What is done to elements one by one: activations, two values together (broadcasting), scale and shift by channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekern_triton.activations import REFERENCES, activate
from prunekern_triton.launch import INTERPRETED, Launch, is_wide, power, tiles

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum}


@triton.jit
def elementwise_kernel(x, y, c, scale, shift, M, N, NP, P, xn, xp, xc, yn, yp, yc, ldc, KIND: tl.constexpr,
                       WIDE: tl.constexpr, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr):
    """c [M, NP] = activation(x KIND y) or activation(x * scale + shift), zeros from N on. Rows run over (image, P
    positions); the strides of x and y are by image, position and channel, 0 where they do not vary."""
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    if WIDE:
        rows = rows.to(tl.int64)
    live, inside = (rows < M)[:, None], (cols < N)[None, :]
    image, spot = (rows // P)[:, None], (rows % P)[:, None]
    u = tl.load(x + image * xn + spot * xp + cols[None, :] * xc, mask=live & inside, other=0.0).to(tl.float32)
    if y is not None:
        v = tl.load(y + image * yn + spot * yp + cols[None, :] * yc, mask=live & inside, other=1.0).to(tl.float32)
        if KIND == "add":
            u = u + v
        elif KIND == "sub":
            u = u - v
        elif KIND == "mul":
            u = u * v
        elif KIND == "div":
            u = u / v
        elif KIND == "maximum":
            u = tl.where((u > v) | (u != u), u, v)
        else:
            u = tl.where((u < v) | (u != u), u, v)
    if scale is not None:
        u = u * tl.load(scale + cols, mask=cols < N, other=0.0)[None, :]
    if shift is not None:
        u = u + tl.load(shift + cols, mask=cols < N, other=0.0)[None, :]
    u = tl.where(inside, activate(u, ACT, P0, P1, P2), 0.0)
    tl.store(c + rows[:, None] * ldc + cols[None, :], u.to(c.dtype.element_ty), mask=live & (cols < NP)[None, :])


Strides = tuple[int, ...]       # by image, position and channel


def elementwise_launches(x: Tensor, xs: Strides, c: Tensor, n: int, positions: int, *, y: Tensor | None = None,
                         ys: Strides = (0, 0, 0), kind: str = "", scale: Tensor | None = None,
                         shift: Tensor | None = None, activation: str = "", constants: Sequence[float] = (),
                         ) -> tuple[Launch, ...]:
    """The launch that writes ``c [images * positions, >= n]``. xs, ys: strides of x and y by (image, position,
    channel). scale, shift: fp32 ``[n]``."""
    m, width = c.shape
    across = power(min(width, 1024 if INTERPRETED else 128), 1)
    tall = power(min(m, max(1, (1 << 18 if INTERPRETED else 2048) // across)))
    p = (*constants, 0.0, 0.0, 0.0)
    args = {"x": x, "y": y, "c": c, "scale": scale, "shift": shift, "M": m, "N": n, "NP": width, "P": positions,
            **dict(zip(("xn", "xp", "xc", "yn", "yp", "yc"), (*xs, *ys), strict=True)), "ldc": c.stride(0)}
    return (Launch(elementwise_kernel, (tiles(m, tall), tiles(width, across)), args, {
        "KIND": kind, "WIDE": is_wide(x, y, c), "ACT": activation, "P0": p[0], "P1": p[1], "P2": p[2], "BM": tall,
        "BN": across}, 4, 2),)


def elementwise(x: Tensor, y: Tensor | None = None, kind: str = "", **options: object) -> Tensor:
    """``[images, positions, n]`` from x, and y which may be broadcast to it; see ``elementwise_launches``."""
    c = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    images, positions, n = x.shape
    ys = (0, 0, 0) if y is None else y.expand(images, positions, n).stride()
    for launch in elementwise_launches(x, x.stride(), c.view(-1, n), n, positions, y=y, ys=ys, kind=kind,
                                       **options):  # type: ignore[arg-type]
        launch()
    return c


def elementwise_ref(x: Tensor, y: Tensor | None = None, kind: str = "", *, scale: Tensor | None = None,
                    shift: Tensor | None = None, activation: str = "", constants: Sequence[float] = ()) -> Tensor:
    """``elementwise`` in plain torch, in the dtype of ``x``."""
    u = x if y is None else KINDS[kind](x, y)
    u = u if scale is None else u * scale.to(u)
    u = u if shift is None else u + shift.to(u)
    return REFERENCES[activation](u, *constants) if activation else u
