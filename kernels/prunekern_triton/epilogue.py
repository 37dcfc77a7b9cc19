"""What is done to a tile of results before it is stored: scale, bias, residual, activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from prunekern_triton.activations import REFERENCES, activate


@dataclass(frozen=True)
class Epilogue:
    """``activation(scale * y + bias + residual)``, or the residual last where ``residual_last``.

    scale, bias: fp32 ``[at least N]``. residual: rows ``[M, N]`` (any pitch) in the dtype of the result. activation:
    a kind of ``activations.KINDS``, or ''.
    """

    bias: Tensor | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None
    residual_last: bool = False
    activation: str = ""
    constants: tuple[float, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """Compiled in."""
        p = (*self.constants, 0.0, 0.0, 0.0)
        return {"LAST": self.residual_last, "ACT": self.activation, "P0": p[0], "P1": p[1], "P2": p[2]}

    def apply(self, y: Tensor) -> Tensor:
        """The same in plain torch, on ``[M, N]`` in fp32 or more."""
        n = y.shape[-1]
        if self.scale is not None:
            y = y * self.scale[:n].to(y)
        if self.bias is not None:
            y = y + self.bias[:n].to(y)
        if self.residual is not None and not self.residual_last:
            y = y + self.residual.to(y)
        if self.activation:
            y = REFERENCES[self.activation](y, *self.constants)
        if self.residual is not None and self.residual_last:
            y = y + self.residual.to(y)
        return y


NO_EPILOGUE = Epilogue()


@triton.jit
def finish(acc, rows, cols, live, bias, scale, residual, ldr, N, LAST: tl.constexpr, ACT: tl.constexpr,
           P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """The epilogue of ``acc`` [rows, cols]; ``live`` [rows, 1]: rows that exist. Columns from N on give 0."""
    inside = cols < N
    if scale is not None:
        acc = acc * tl.load(scale + cols, mask=inside, other=0.0)[None, :]
    if bias is not None:
        acc = acc + tl.load(bias + cols, mask=inside, other=0.0)[None, :]
    if residual is not None and not LAST:
        acc = acc + tl.load(residual + rows[:, None] * ldr + cols[None, :], mask=live & inside[None, :],
                            other=0.0).to(tl.float32)
    acc = activate(acc, ACT, P0, P1, P2)
    if residual is not None and LAST:
        acc = acc + tl.load(residual + rows[:, None] * ldr + cols[None, :], mask=live & inside[None, :],
                            other=0.0).to(tl.float32)
    return tl.where(inside[None, :], acc, 0.0)


@triton.jit
def put(c, at, cols, ldc, acc, live, NP):
    """Stores a tile: rows at a pitch of ldc, columns up to NP."""
    tl.store(c + at[:, None] * ldc + cols[None, :], acc.to(c.dtype.element_ty), mask=live & (cols < NP)[None, :])
