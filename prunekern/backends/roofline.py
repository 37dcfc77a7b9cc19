"""What this machine can do at most: the roof that ``explain`` measures steps against.

Source: S. Williams, A. Waterman, D. Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", CACM 52(4), 2009; with one bandwidth per size of what is touched, since caches are part of the
machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

SIZES = (1 << 15, 1 << 18, 1 << 21, 1 << 26)       # bytes that a copy touches: L1, L2, L3, memory
REPEATS = 20


@dataclass(frozen=True)
class Roof:
    """Measured, not quoted: multiply-accumulates a second of torch's own GEMM, bytes a second of its copy.

    bandwidth: (bytes touched, bytes a second), smallest first.
    """

    macs: float
    bandwidth: tuple[tuple[int, float], ...]

    def seconds(self, macs: int, bytes_moved: int) -> float:
        """The least time for this much work."""
        speed = next((speed for size, speed in self.bandwidth if bytes_moved <= size), self.bandwidth[-1][1])
        return max(macs / self.macs, bytes_moved / speed)

    def __str__(self) -> str:
        return f"roof {self.macs / 1e9:.0f} GMAC/s, {self.bandwidth[-1][1] / 1e9:.0f} GB/s from memory"


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """The roof of a device with the present number of threads; measured once (a fraction of a second)."""
    return _measure(str(device), dtype, torch.get_num_threads())


@lru_cache
def _measure(device: str, dtype: torch.dtype, threads: int) -> Roof:
    wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    size = 4096 if device.startswith("cuda") else 512
    with torch.inference_mode():
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        out = torch.empty_like(left)
        gemm = _best(lambda: torch.mm(left, right, out=out), wait)
        bandwidth = tuple((count, _copy_speed(count, device, dtype, wait)) for count in SIZES)
    return Roof(size ** 3 / gemm, bandwidth)


def _copy_speed(count: int, device: str, dtype: torch.dtype, wait: Callable[[], Any]) -> float:
    source = torch.zeros(count // 2 // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return count / _best(lambda: target.copy_(source), wait)


def _best(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        wait()
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
