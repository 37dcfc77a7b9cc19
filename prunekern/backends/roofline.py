"""What this machine can do at most: the roof that ``explain`` measures steps against.

Source: S. Williams, A. Waterman, D. Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Roof:
    """Measured, not quoted: multiply-accumulates and bytes per second of torch's own GEMM and copy."""

    macs: float
    bytes: float

    def seconds(self, macs: int, bytes_moved: int) -> float:
        """The least time for this much work."""
        return max(macs / self.macs, bytes_moved / self.bytes)

    def __str__(self) -> str:
        return f"roof {self.macs / 1e9:.0f} GMAC/s, {self.bytes / 1e9:.0f} GB/s"


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """The roof of a device with the present number of threads; measured once (about 0.2 s)."""
    return _measure(str(device), dtype, torch.get_num_threads())


@lru_cache
def _measure(device: str, dtype: torch.dtype, threads: int) -> Roof:
    size = 4096 if device.startswith("cuda") else 768
    count = (1 << 28 if device.startswith("cuda") else 1 << 25) // dtype.itemsize
    with torch.inference_mode():
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        gemm = _best(lambda: torch.mm(left, right), device)
        source = torch.zeros(count, dtype=dtype, device=device)
        target = torch.empty_like(source)
        copy = _best(lambda: target.copy_(source), device)
    return Roof(size ** 3 / gemm, 2 * source.nbytes / copy)


def _best(call: Callable[[], Any], device: str) -> float:
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best = float("inf")
    for _ in range(5):
        sync()
        start = time.perf_counter()
        call()
        sync()
        best = min(best, time.perf_counter() - start)
    return best
