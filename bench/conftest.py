"""What the pytest-benchmark suites run under: one thread, inference mode, quantiles beside every figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.machine import commit, load_average, processor

THREADS = int(os.environ.get("BENCH_THREADS", "1"))
Timed = Callable[..., None]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """``timed(call, group=..., rounds=None, **facts)``: time a call that was verified before.

    group: what it is shown with. rounds: that many single calls after one to warm up, for slow calls; else
    pytest-benchmark chooses. facts: kept in the JSON; ``flops`` and ``moved`` (bytes) a call become rates.
    """
    def run(call: Callable[[], object], *, group: str, rounds: int | None = None, flops: float = 0.0,
            moved: float = 0.0, **facts: Any) -> None:
        benchmark.group = group
        with torch.no_grad():
            if rounds is None:
                benchmark(call)
            else:
                benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:                 # --benchmark-disable
            return
        p20, p50, p80 = (float(q) for q in np.quantile(benchmark.stats.stats.data, (0.2, 0.5, 0.8)))
        rates = {"gflops": flops / p50 / 1e9} if flops else {}
        rates |= {"gbytes_per_s": moved / p50 / 1e9} if moved else {}
        benchmark.extra_info.update(facts, p20_us=p20 * 1e6, p50_us=p50 * 1e6, p80_us=p80 * 1e6, **rates)
    return run


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(torch=torch.__version__, threads=THREADS, processor=processor(), load_average=load_average(),
                        cpu_capability=torch.backends.cpu.get_cpu_capability(), revision=commit())
