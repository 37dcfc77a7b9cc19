"""A kernel with everything it is launched with, so that running, tuning and compiling ahead see the very same thing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
LIMIT = 1 << 31             # offsets of that many elements no longer fit 32 bits

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32",
         torch.float8_e4m3fn: "fp8e4nv"}


@dataclass(frozen=True)
class Config:
    """How a matrix kernel is cut: rows, columns and depth of a tile; warps; stages of the software pipeline; rows of
    tiles that share columns in the second-level cache; parts that the depth is split into."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    split: int = 1

    def __str__(self) -> str:
        tail = f" split {self.split}" if self.split > 1 else ""
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{tail}"


@dataclass(frozen=True)
class Launch:
    """One launch. ``args``: by the kernel's parameter names, in its order: tensors, tensor descriptors and numbers;
    None for what is left out. ``constants`` are compiled in."""

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3

    def __call__(self) -> None:
        """Launch on the current stream of the current device; does not wait."""
        if 0 not in self.grid:
            self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, num_stages=self.stages)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


def up(number: int, multiple: int) -> int:
    """Rounded up to a multiple."""
    return -(-number // multiple) * multiple


def power(number: int, least: int = 1) -> int:
    """The power of two at or above a number."""
    return max(least, 1 << max(0, number - 1).bit_length())


def tiles(number: int, size: int) -> int:
    return -(-number // size)


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into one of these need 64 bits."""
    return any(t is not None and t.numel() and
               sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= LIMIT for t in tensors)
