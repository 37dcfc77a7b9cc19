"""Times of calls on a GPU by its own clock: side by side, each after the cache was emptied.

Every sample is one call between two events. Before it, a buffer larger than the second-level cache is written, so that
weights and inputs come from memory as they do in a service that runs more than one network; while the GPU does that,
the host has the time to queue the call, so that a call of one launch is not charged for the host's way to it. What a
call of many launches loses between them is in its figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from prunekern.analysis.latency import QUANTILES, Row, order

FLUSH = 256 << 20       # bytes; no GPU's second-level cache is as large
WARMUP = 5


def measure_on_gpu(contenders: Mapping[str, Callable[[], object]], *, seconds: float = 1.0, min_rounds: int = 10,
                   most_rounds: int = 500) -> tuple[Row, ...]:
    """One Row for each call, in µs; all take turns on the current stream. seconds: what each gets, about."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    names = list(contenders)
    with torch.inference_mode():
        longest = max(_once(contenders[name], flush, WARMUP) for name in names)
        rounds = max(min_rounds, min(most_rounds, int(seconds / max(longest, 1e-6))))
        marks = {name: [_pair() for _ in range(rounds)] for name in names}
        for number in range(rounds):
            for index in order(len(names), number):
                flush.zero_()
                start, end = marks[names[index]][number]
                start.record()
                contenders[names[index]]()
                end.record()
        torch.cuda.synchronize()
    return tuple(_row(name, [start.elapsed_time(end) * 1e3 for start, end in marks[name]]) for name in names)


def _pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _once(call: Callable[[], object], flush: torch.Tensor, times: int) -> float:
    """Seconds of a call, flush and all, after some that do not count."""
    start, end = _pair()
    for number in range(times + 1):
        if number == times:
            start.record()
        flush.zero_()
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def _row(name: str, micro: list[float]) -> Row:
    p20, p50, p80 = (float(q) for q in np.quantile(micro, QUANTILES))
    return Row(name, p20, p50, p80, min(micro), len(micro), 1)
