"""The matrix product for Hopper and later: a persistent grid, operands brought by the tensor copy engine (TMA).

One program for each multiprocessor goes through tiles of the result; copies of the next tile's operands run while the
matrix unit is at work on this one.

Source: NVIDIA, "CUDA C++ Programming Guide", 12.9, section 10.29 (tensor copies); V. Thakkar et al., CUTLASS 3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prunekern_triton.configs import multiprocessors
from prunekern_triton.epilogue import NO_EPILOGUE, Epilogue, finish, put
from prunekern_triton.gemm import PRECISIONS, gemm_ref, place_of, unit
from prunekern_triton.launch import Config, Launch, is_wide, tiles
from prunekern_triton.pack import align

__all__ = ["CONFIGS", "gemm_ref", "gemm_tma", "gemm_tma_launches", "takes"]

CONFIGS = {"half": (Config(128, 128, 64, 8, 4), Config(128, 64, 64, 4, 4), Config(64, 128, 64, 4, 4)),
           "tf32": (Config(128, 128, 32, 8, 4), Config(128, 64, 32, 4, 4))}


@triton.jit
def gemm_tma_kernel(a, b, c, bias, scale, residual, M, N, NP, K, ldc, ldr, OUT: tl.constexpr, WIDE: tl.constexpr,
                    PRECISION: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, P0: tl.constexpr,
                    P1: tl.constexpr, P2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    GROUP: tl.constexpr, PROGRAMS: tl.constexpr):
    """c [M, NP] = epilogue(a [M, K] @ b [N, K]^T); a and b are tensor descriptors, which give zeros beyond."""
    NP, ldc, ldr = NP * OUT, ldc * OUT, ldr * OUT
    high, wide = tl.cdiv(M, BM), tl.cdiv(NP, BN)
    for tile in tl.range(tl.program_id(0), high * wide, PROGRAMS):
        row, col = place_of(tile, high, wide, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(a.load([row * BM, k]), b.load([col * BN, k]).T, acc, input_precision=PRECISION)
        rows, cols = row * BM + tl.arange(0, BM), col * BN + tl.arange(0, BN)
        at = rows.to(tl.int64) if WIDE else rows
        live = (rows < M)[:, None]
        acc = finish(acc, at, cols, live, bias, scale, residual, ldr, N, LAST, ACT, P0, P1, P2)
        put(c, at, cols, ldc, acc, live, NP)


def takes(a: Tensor, precision: str = "ieee") -> bool:
    """Whether the copy engine can read it: whole vectors, and something for the matrix unit."""
    whole = align(a.dtype)
    return (a.stride(0) % whole == 0 and a.shape[1] > 0 and a.data_ptr() % 16 == 0
            and (a.dtype.itemsize == 2 or precision == "tf32"))


def gemm_tma_launches(a: Tensor, b: Tensor, c: Tensor, n: int, epilogue: Epilogue = NO_EPILOGUE, *,
                      precision: str = "ieee", config: Config | None = None, programs: int | None = None,
                      ) -> tuple[Launch, ...]:
    """The launch of a persistent product; arguments as for ``gemm.gemm_launches``. programs: multiprocessors to use."""
    (m, k), width, residual = a.shape, c.shape[1], epilogue.residual
    config = config or CONFIGS["half" if a.dtype.itemsize == 2 else "tf32"][0]
    programs = programs or multiprocessors(a.device.index if a.is_cuda else None)
    out = unit(c.dtype, width, c.stride(0), *(() if residual is None else (residual.stride(0),)))
    count = tiles(m, config.m) * tiles(width, config.n)
    args: dict[str, Any] = {
        "a": TensorDescriptor(a, [m, k], [a.stride(0), 1], [config.m, config.k]),
        "b": TensorDescriptor(b, [b.shape[0], k], [b.stride(0), 1], [config.n, config.k]), "c": c,
        "bias": epilogue.bias, "scale": epilogue.scale, "residual": residual, "M": m, "N": n, "NP": width // out,
        "K": k, "ldc": c.stride(0) // out, "ldr": 0 if residual is None else residual.stride(0) // out}
    return (Launch(gemm_tma_kernel, (min(programs, count),), args, {
        "OUT": out, "WIDE": is_wide(c, residual), "PRECISION": PRECISIONS[precision], **epilogue.numbers(),
        "BM": config.m, "BN": config.n, "BK": config.k, "GROUP": config.group, "PROGRAMS": min(programs, count)},
        config.warps, config.stages),)


def gemm_tma(a: Tensor, b: Tensor, n: int, epilogue: Epilogue = NO_EPILOGUE, *, precision: str = "ieee",
             config: Config | None = None, programs: int | None = None) -> Tensor:
    """``[M, n]`` in the dtype of ``a``; see ``gemm_tma_launches``."""
    c = torch.empty(a.shape[0], n, dtype=a.dtype, device=a.device)
    for launch in gemm_tma_launches(a, b, c, n, epilogue, precision=precision, config=config, programs=programs):
        launch()
    return c
