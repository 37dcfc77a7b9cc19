"""Two or three linear layers in one launch; what lies between them stays in registers and shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekern_triton.activations import REFERENCES, activate
from prunekern_triton.configs import arithmetic
from prunekern_triton.gemm import PRECISIONS, unit
from prunekern_triton.launch import INTERPRETED, Launch, is_wide, power, tiles

WIDEST = 128            # outputs of a layer


@triton.jit
def mlp_kernel(x, w0, b0, w1, b1, w2, b2, c, M, K, N0, N1, N2, NP, ldx, ld0, ldc, IN: tl.constexpr,
               WIDE: tl.constexpr, THREE: tl.constexpr, PRECISION: tl.constexpr, ACT0: tl.constexpr, ACT1: tl.constexpr,
               ACT2: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
               B2: tl.constexpr):
    """c [M, NP] = the layers (w0 [B0, K], b0 [B0]), (w1 [B1, B0], b1) and, where THREE, (w2 [B2, B1], b2) of x [M, K].
    What is beyond N0, N1 and N2 of them is zero, so that only what is between layers needs masks."""
    K, ldx, ld0 = K * IN, ldx * IN, ld0 * IN
    rows, deep = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BK)
    if WIDE:
        rows = rows.to(tl.int64)
    live, n0, n1 = (rows < M)[:, None], tl.arange(0, B0), tl.arange(0, B1)
    h = tl.zeros((BM, B0), tl.float32)
    for k in range(0, K, BK):
        there = (k + deep < K)[None, :]
        u = tl.load(x + rows[:, None] * ldx + k + deep[None, :], mask=live & there, other=0.0)
        v = tl.load(w0 + n0[:, None] * ld0 + k + deep[None, :], mask=there, other=0.0)
        h = tl.dot(u, tl.trans(v), h, input_precision=PRECISION)
    h = tl.where((n0 < N0)[None, :], activate(h + tl.load(b0 + n0)[None, :], ACT0, 0.0, 0.0, 0.0), 0.0)
    v = tl.load(w1 + n1[:, None] * B0 + n0[None, :])
    y = tl.dot(h.to(v.dtype), tl.trans(v), input_precision=PRECISION)
    y = tl.where((n1 < N1)[None, :], activate(y + tl.load(b1 + n1)[None, :], ACT1, 0.0, 0.0, 0.0), 0.0)
    if THREE:
        n2 = tl.arange(0, B2)
        v = tl.load(w2 + n2[:, None] * B1 + n1[None, :])
        z = tl.dot(y.to(v.dtype), tl.trans(v), input_precision=PRECISION)
        z = tl.where((n2 < N2)[None, :], activate(z + tl.load(b2 + n2)[None, :], ACT2, 0.0, 0.0, 0.0), 0.0)
        tl.store(c + rows[:, None] * ldc + n2[None, :], z.to(c.dtype.element_ty), mask=live & (n2 < NP)[None, :])
    else:
        tl.store(c + rows[:, None] * ldc + n1[None, :], y.to(c.dtype.element_ty), mask=live & (n1 < NP)[None, :])


Layer = tuple[Tensor, Tensor, int, str]         # packed weight and bias, outputs, activation without constants


def rounded(outputs: int) -> int:
    """Rows that a layer's weight is packed to. Fewer than 64 columns between four warps take so many copies of the rows
    that registers spill."""
    return power(outputs, 64)


def pack_layer(weight: Tensor, bias: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
    """``[N, K]`` and ``[N]`` to ``[rounded(N), columns]`` and fp32 ``[rounded(N)]``, zeros beyond. columns: the pitch
    of the first layer's input; ``rounded`` outputs of the layer before for the others."""
    n = len(weight)
    packed, shift = weight.new_zeros(rounded(n), columns), torch.zeros(rounded(n), device=weight.device)
    packed[:n, :weight.shape[1]] = weight
    if bias is not None:
        shift[:n] = bias
    return packed, shift


def mlp_launches(x: Tensor, layers: Sequence[Layer], c: Tensor, *, precision: str = "ieee") -> tuple[Launch, ...]:
    """The launch of two or three layers of at most ``widest`` outputs each.

    x: ``[M, K]``, lanes of a pitch included. Weights and biases: ``pack_layer``. c: ``[M, >= outputs]``, zeros beyond.
    """
    (m, k), three = x.shape, len(layers) == 3
    (w0, b0, n0, a0), (w1, b1, n1, a1) = layers[:2]
    w2, b2, n2, a2 = layers[2] if three else (None, None, 0, "")
    step = unit(x.dtype, k, x.stride(0), w0.stride(0))
    tall = power(min(m, 256), 16) if INTERPRETED else 16
    args = {"x": x, "w0": w0, "b0": b0, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "c": c, "M": m, "K": k // step,
            "N0": n0, "N1": n1, "N2": n2, "NP": c.shape[1], "ldx": x.stride(0) // step, "ld0": w0.stride(0) // step,
            "ldc": c.stride(0)}
    return (Launch(mlp_kernel, (tiles(m, tall),), args, {
        "IN": step, "WIDE": is_wide(x, c), "THREE": three, "PRECISION": PRECISIONS[precision], "ACT0": a0, "ACT1": a1,
        "ACT2": a2, "BM": tall, "BK": 64 if x.dtype.itemsize == 2 else 32, "B0": len(w0), "B1": len(w1),
        "B2": 16 if w2 is None else len(w2)}, 8 if arithmetic(x.dtype, precision) == "ieee" else 4, 3),)


def mlp(x: Tensor, layers: Sequence[Layer], *, precision: str = "ieee") -> Tensor:
    """``[M, outputs of the last layer]``; see ``mlp_launches``."""
    c = torch.empty(x.shape[0], layers[-1][2], dtype=x.dtype, device=x.device)
    for launch in mlp_launches(x, layers, c, precision=precision):
        launch()
    return c


def mlp_ref(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """``mlp`` in plain torch, in the dtype of ``x``."""
    for weight, bias, n, activation in layers:
        x = x @ weight[:n, :x.shape[1]].to(x).t() + bias[:n].to(x)
        x = REFERENCES[activation](x) if activation else x
    return x


def widest(dtype: torch.dtype, precision: str = "ieee", arch: int = 80) -> int:
    """The most outputs that a layer may have."""
    return 64 if arch >= 100 and arithmetic(dtype, precision) == "ieee" else WIDEST     # more spill there
