"""How long calls take, measured side by side: contenders take turns in one process.

Times measured one contender after the other drift with the machine's clock and its other load. Here every round
times each contender once, in an order that changes from round to round, so whatever disturbs one disturbs all.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from prunekern.errors import InputError

Call = Callable[[], object]
QUANTILES = (0.2, 0.5, 0.8)
SAMPLE = 2e-3           # seconds that a sample lasts at least: far above the clock's resolution and a device's sync
PAUSE = 1e-3            # seconds in which a thread that works shows
LONG = 0.25             # seconds of a call beside which refilling the caches (some ms) does not show


@dataclass(frozen=True)
class Row:
    """Time of one call in µs: quantiles and minimum over ``count`` samples, each the mean of ``inner`` calls."""

    name: str
    p20: float
    p50: float
    p80: float
    min: float
    count: int
    inner: int

    def __str__(self) -> str:
        return f"{self.name}: {self.p50:.4g} µs ({self.p20:.4g} to {self.p80:.4g}, {self.count} samples)"


def measure(contenders: Mapping[str, Call], *, seconds: float = 2.0, warmup: float = 0.2, min_rounds: int = 10,
            synchronise: Call | None = None, settle: Call | None = None,
            clock: Callable[[], float] = time.perf_counter) -> tuple[Row, ...]:
    """Time several calls against each other; one Row each, in the given order.

    contenders: name -> a call without arguments. seconds: what each contender gets on average, warm-up apart.
    warmup: seconds of calls to each before anything counts (at least two). min_rounds: samples of each however
    long they take. synchronise: waits until a device is done (see ``synchroniser``); it is called around every
    sample, so calls within one queue behind each other as they do when a network serves.
    settle: called before every sample, and before its untimed call; by default ``rest`` where torch may use more than
    one thread. clock: seconds, monotonic.

    A sample is as many calls as last ``SAMPLE`` seconds, after one untimed call that brings the contender's own
    data back into the caches (none before calls of more than ``LONG`` seconds): the figures are those of a network
    that is called again and again.

    Raises InputError where there is nothing to measure; what a contender raises, with its name noted.
    """
    if not contenders or seconds < 0 or min_rounds < 1:
        raise InputError(f"nothing to measure: {len(contenders)} contenders, seconds={seconds}, "
                         f"min_rounds={min_rounds}; pass at least one call, seconds >= 0 and min_rounds >= 1.")
    names = list(contenders)
    timers = [_Timer(name, call, synchronise or _nothing, clock) for name, call in contenders.items()]
    settle = settle or (rest if torch.get_num_threads() > 1 else _nothing)
    times: list[list[float]] = [[] for _ in names]
    with torch.inference_mode(), _without_collections():
        calls = [timer.calibrate(warmup) for timer in timers]
        start, done = clock(), 0
        while done < min_rounds or clock() - start < seconds * len(names):
            for index in order(len(names), done):
                settle()
                times[index].append(timers[index].sample(*calls[index]))
            done += 1
    return tuple(_row(name, each, inner) for name, each, (inner, _) in zip(names, times, calls, strict=True))


def rest(limit: float = 0.2) -> None:
    """Wait until no other thread of this process works, for ``limit`` seconds at most.

    Threads of a pool go on looking for work for a while after a call (measured: 35 ms in ONNX Runtime, 8 ms in
    libgomp), and with as many threads as cores would slow down whoever is next.
    """
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < 0.2 * PAUSE:
            return


def order(count: int, done: int) -> Sequence[int]:
    """Who goes when in round number ``done``: everyone once, another one first each time, and every second round
    backwards, so that nobody always follows the same one."""
    first = done // 2 % count
    turn = [*range(first, count), *range(first)]
    return turn[::-1] if done % 2 else turn


def synchroniser(device: torch.device | str) -> Call | None:
    """What ``measure`` needs as ``synchronise`` on a device: None where calls return when they are done."""
    kind = torch.device(device).type
    if kind == "cpu":
        return None
    wait: Call = getattr(torch, kind).synchronize
    return wait


def table(rows: Sequence[Row], baseline: str | None = None) -> str:
    """The rows side by side; with ``baseline``, each median relative to that contender's (below 1 is faster)."""
    by_name = {row.name: row for row in rows}
    if baseline is not None and baseline not in by_name:
        raise InputError(f"baseline {baseline!r} is not among the contenders: {', '.join(by_name)}.")
    head = ["", "p20 µs", "p50 µs", "p80 µs", *([f"÷ {baseline}"] if baseline else [])]
    lines = [head] + [[row.name, *(f"{value:.1f}" for value in (row.p20, row.p50, row.p80)),
                       *([f"{row.p50 / by_name[baseline].p50:.2f}"] if baseline else [])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines)


@dataclass(frozen=True)
class _Timer:
    """Times runs of one contender's calls."""

    name: str
    call: Call
    synchronise: Call
    clock: Callable[[], float]

    def run(self, calls: int) -> float:
        """Seconds for so many calls in a row."""
        call, repeats = self.call, range(calls)
        try:
            self.synchronise()
            start = self.clock()
            for _ in repeats:
                call()
            self.synchronise()
            return self.clock() - start
        except Exception as error:
            error.add_note(f"raised by the contender {self.name!r} while it was timed")
            raise

    def sample(self, calls: int, refill: bool) -> float:
        """Seconds a call; ``refill``: after an untimed one."""
        if refill:
            self.call()
        return self.run(calls) / calls

    def calibrate(self, warmup: float) -> tuple[int, bool]:
        """Warm up, and find how many calls make a sample, and whether an untimed one goes before."""
        start, calls, best, runs = self.clock(), 1, math.inf, 0
        while runs < 2 or self.clock() - start < warmup:
            best = min(best, self.run(calls) / calls)
            calls, runs = (calls * 2 if best * calls < SAMPLE else calls), runs + 1
        return (max(1, math.ceil(SAMPLE / best)) if best > 0 else calls), best <= LONG


def _row(name: str, times: Sequence[float], inner: int) -> Row:
    micro = np.asarray(times) * 1e6
    p20, p50, p80 = (float(q) for q in np.quantile(micro, QUANTILES))
    return Row(name, p20, p50, p80, float(micro.min()), len(times), inner)


def _nothing() -> None:
    return None


@contextmanager
def _without_collections() -> Iterator[None]:
    """Reference counting still frees; only the search for cycles, which strikes at random, waits."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
