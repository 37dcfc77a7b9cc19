"""Latency measurement, on a clock that the tests control."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch

from prunekern.analysis.latency import PAUSE, SAMPLE, Row, measure, order, rest, synchroniser, table
from prunekern.errors import InputError


class Clock:
    """Time passes only where a contender says so; who was called is on record."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float):
        """A contender that takes these seconds, call by call, over and over."""
        def call() -> None:
            self.now += seconds[self.calls.count(name) % len(seconds)]
            self.calls.append(name)
        return call

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


def test_times_are_those_of_a_call_in_microseconds():
    clock = Clock()
    slow, fast = measure({"slow": clock.work("slow", 3e-3), "fast": clock.work("fast", 2e-5)},
                         seconds=0.05, warmup=0.01, clock=clock)
    assert (slow.name, fast.name) == ("slow", "fast")
    for row, expected in ((slow, 3000), (fast, 20)):
        assert [row.p20, row.p50, row.p80, row.min] == pytest.approx([expected] * 4)


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    clock = Clock()
    rows = measure({"slow": clock.work("slow", 1.5 * SAMPLE), "fast": clock.work("fast", SAMPLE / 40)},
                   seconds=0.05, warmup=0.0, clock=clock)
    assert rows[0].inner == 1
    assert rows[1].inner in (40, 41)


def test_quantiles_are_over_samples():
    clock = Clock()
    steps = [s * 1e-2 for s in range(1, 12)]        # 10 to 110 ms, in turn; each sample follows an untimed call
    (row,) = measure({"a": clock.work("a", *steps)}, seconds=0, warmup=0, min_rounds=11, clock=clock)
    # 2 warm-up calls, then pairs of which the second counts: as 11 is odd, every step counts once.
    assert row.count == 11
    assert [row.min, row.p20, row.p50, row.p80] == pytest.approx([1e4, 3e4, 6e4, 9e4])


def test_an_outlier_moves_no_quantile():
    clock = Clock()
    (row,) = measure({"a": clock.work("a", *[1e-2] * 20, 5.0)}, seconds=0, warmup=0, min_rounds=21, clock=clock)
    assert row.p80 == pytest.approx(1e4)
    assert row.count == 21


def test_contenders_take_turns():
    clock = Clock()
    names = ["a", "b", "c"]
    rows = measure({n: clock.work(n, 2 * SAMPLE) for n in names}, seconds=0, warmup=0, min_rounds=12, clock=clock)
    samples = clock.calls[2 * len(names):]          # after two warm-up calls each
    assert samples[0::2] == samples[1::2]           # an untimed call, then the sample
    rounds = [samples[i:i + 6:2] for i in range(0, len(samples), 6)]
    assert len(rounds) == 12
    assert all(sorted(turn) == names for turn in rounds)
    assert Counter(turn[0] for turn in rounds) == dict.fromkeys(names, 4)
    assert [row.count for row in rows] == [12, 12, 12]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_order_is_fair(count: int):
    turns = [list(order(count, done)) for done in range(2 * count)]
    assert all(sorted(turn) == list(range(count)) for turn in turns)
    for place in range(count):
        assert Counter(turn[place] for turn in turns) == dict.fromkeys(range(count), 2)
    follows = Counter(pair for turn in turns for pair in pairwise(turn))
    assert all(follows[a, b] == follows[b, a] for a, b in follows)


def test_the_time_limit_is_shared_and_min_rounds_overrules_it():
    clock = Clock()
    rows = measure({n: clock.work(n, 1e-2) for n in "ab"}, seconds=1.0, warmup=0, clock=clock)
    assert {row.count for row in rows} == {50}      # 2 s in rounds of 2 x (one untimed call + one sample)
    clock = Clock()
    (row,) = measure({"a": clock.work("a", 100.0)}, seconds=1.0, warmup=0, min_rounds=7, clock=clock)
    assert row.count == 7


def test_warm_up_does_not_count():
    clock = Clock()
    calls = [5.0, 1.0] + [1e-2] * 10_000
    (row,) = measure({"a": clock.work("a", *calls)}, seconds=0.5, warmup=2.0, clock=clock)
    assert row.p80 == pytest.approx(1e4)
    assert row.inner == 1


def test_long_calls_are_not_made_twice():
    clock = Clock()
    rows = measure({"long": clock.work("long", 0.3), "short": clock.work("short", 0.2)}, seconds=0, warmup=0,
                   min_rounds=5, clock=clock)
    assert {row.count for row in rows} == {5}
    assert Counter(clock.calls) == {"long": 2 + 5, "short": 2 + 10}     # two to warm up


def test_everybody_waits_for_rest_before_a_sample():
    clock, seen = Clock(), []
    call = clock.work("a", 1e-2)
    measure({"a": call}, seconds=0, warmup=0, min_rounds=3, settle=lambda: seen.append(len(clock.calls)), clock=clock)
    assert seen == [2, 4, 6]


class Machine:
    """A process whose other threads work until a moment; stands in for the module ``time``."""

    def __init__(self, busy: float) -> None:
        self.now, self.busy = 100.0, 100.0 + busy

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        """Of one thread that works half of the time it has, and of our own's waking up."""
        return 0.5 * min(self.now, self.busy) + 0.05 * self.now


@pytest.mark.parametrize(("busy", "waited"), [(0.0, PAUSE), (0.035, 0.035 + PAUSE), (10.0, 0.2)])
def test_rest_waits_for_threads_that_work_but_not_forever(monkeypatch, busy: float, waited: float):
    machine = Machine(busy)
    monkeypatch.setattr("prunekern.analysis.latency.time", machine)
    rest(0.2)
    assert machine.now - 100 == pytest.approx(waited, abs=1.01 * PAUSE)


def test_the_device_is_waited_for():
    """Calls of an asynchronous device return at once; the time shows when it is waited for."""
    clock, queue = Clock(), []

    def synchronise() -> None:
        clock.pass_time(sum(queue))
        queue.clear()
    (row,) = measure({"a": lambda: queue.append(4e-3)}, seconds=0, warmup=0, synchronise=synchronise, clock=clock)
    assert [row.min, row.p80] == pytest.approx([4000, 4000])


def test_real_sleeps_have_their_ratio():
    rows = measure({"two": lambda: time.sleep(2e-3), "six": lambda: time.sleep(6e-3)}, seconds=0.1, warmup=0)
    two, six = (row.min for row in rows)
    assert 2000 <= two < 6000 <= six
    assert 1.5 < six / two < 3.5


def test_runs_in_inference_mode_and_leaves_the_collector_as_it_was():
    seen = []
    measure({"a": lambda: seen.append((torch.is_inference_mode_enabled(), gc.isenabled()))}, seconds=0, warmup=0,
            min_rounds=1)
    assert set(seen) == {(True, False)}
    assert gc.isenabled()


def test_a_failing_contender_is_named_and_the_collector_restored():
    def broken() -> None:
        raise ZeroDivisionError("inside")
    with pytest.raises(ZeroDivisionError, match="inside") as caught:
        measure({"fine": lambda: None, "broken one": broken}, seconds=0, warmup=0)
    assert any("broken one" in note for note in caught.value.__notes__)
    assert gc.isenabled()


@pytest.mark.parametrize("options", [{"contenders": {}}, {"seconds": -1.0}, {"min_rounds": 0}], ids=str)
def test_nothing_to_measure(options: dict):
    with pytest.raises(InputError, match="nothing to measure"):
        measure(**{"contenders": {"a": lambda: None}, **options})


def test_rows_are_frozen():
    row = Row("a", 1.0, 2.0, 3.0, 0.5, 10, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.p50 = 0.0  # type: ignore[misc]
    assert str(row) == "a: 2 µs (1 to 3, 10 samples)"


def test_table():
    rows = (Row("eager", 90.0, 100.0, 120.0, 80.0, 10, 1), Row("lowered", 20.0, 25.0, 30.0, 19.0, 10, 1))
    lines = table(rows, "eager").splitlines()
    assert lines[0].split("  ")[-1].strip() == "÷ eager"
    assert lines[1].split() == ["eager", "90.0", "100.0", "120.0", "1.00"]
    assert lines[2].split() == ["lowered", "20.0", "25.0", "30.0", "0.25"]
    assert len({len(line) for line in lines}) == 1
    assert "÷" not in table(rows)
    with pytest.raises(InputError, match="not among the contenders: eager, lowered"):
        table(rows, "ghost")


def test_synchroniser():
    assert synchroniser("cpu") is None
    assert synchroniser("cuda:0") is torch.cuda.synchronize
