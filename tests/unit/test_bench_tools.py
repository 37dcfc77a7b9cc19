"""What the benchmark stands on: the sweep over channels, signals and their stacks, facts about the machine."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import machine, smooth
from bench.contenders import PEERS, Setting
from bench.isolation import OutOfTime, own_signal_stack, signal_stack, time_limit
from prunekern.backends import BACKENDS
from tests.models import make

SETTING = Setting(torch.device("cpu"), threads=1)
OURS = next(backend.name for backend in BACKENDS if backend.unavailable() is None)


# ---- cost against channels -----------------------------------------------------------------------------------------


def test_steps_are_beyond_the_added_multiply_accumulates() -> None:
    assert smooth.steps({8: 64.0, 16: 256.0, 17: 289.0 * 1.2}) == pytest.approx({16: 0.0, 17: 0.2})
    assert smooth.steps({8: 1.0}) == {}


def test_smooth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "s.json", torch.get_num_threads()
    try:
        assert smooth.main(["--channels", "3,5", "--peers", "eager", "--seconds", "0.01", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(before)
    found = json.loads(out.read_text())
    assert list(found["points"]) == ["3", "5"]
    times = smooth.by_contender(found["points"])
    assert set(times) == {"eager", f"lowered, {OURS}"}
    assert all(time > 0 for each in times.values() for time in each.values())
    assert "largest step" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        out.with_suffix(".png").unlink()
        assert smooth.main(["--plot", str(out)]) == 0
        assert out.with_suffix(".png").is_file()


def test_a_convolution_of_the_sweep() -> None:
    net = smooth.convolution(5)
    assert net.macs == 28 * 28 * 9 * 5 * 5
    assert net.module(torch.zeros(1, 5, 28, 28)).shape == (1, 5, 28, 28)
    args = argparse.Namespace(batch=2, peers=["eager"], backends=None, seconds=0.0)
    assert [e.state for e in smooth.run_point(4, SETTING, args)] == ["timed", "timed"]


# ---- order ---------------------------------------------------------------------------------------------------------


def test_time_limit() -> None:
    number = getattr(signal, "SIGALRM", signal.SIGINT)
    before, start = signal.getsignal(number), time.monotonic()
    with pytest.raises(OutOfTime), time_limit(0.05):
        sum(time.monotonic() > start + 5 for _ in range(10**9))
    assert time.monotonic() < start + 5
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signal stacks are looked at on Linux only")
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_leaves_the_signal_stack_as_it_was() -> None:
    make_runner = PEERS["cpu"][4].make
    before = signal_stack()
    model, (x,) = make("mlp")
    first = make_runner(model, x, SETTING)
    second = make_runner(model, x, SETTING)
    first.bind(x)()
    assert signal_stack() == before
    del first
    gc.collect()
    del second
    gc.collect()
    assert signal_stack() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signal stacks are looked at on Linux only")
def test_own_signal_stack_restores_what_was_there() -> None:
    import ctypes

    from bench.isolation import _Stack
    before, memory = signal_stack(), ctypes.create_string_buffer(1 << 16)
    with own_signal_stack():
        other = _Stack(ctypes.addressof(memory), 0, len(memory))
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(other), None) == 0
        assert signal_stack() != before
    assert signal_stack() == before


def test_sources_are_known_by_their_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = b"a.py\0b.py\0"
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "_git", lambda *arguments: names)
    (tmp_path / "a.py").write_text("1")
    first = machine.sources()
    assert first == machine.sources()
    (tmp_path / "b.py").write_text("")
    (tmp_path / "a.py").write_text("2")
    assert machine.sources() != first


def test_caches(tmp_path: Path) -> None:
    for number, (level, kind, size) in enumerate([(1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "1M")]):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert machine.caches(tmp_path) == {"L1d": "32K", "L2": "1M"}
    assert machine.caches(tmp_path / "none") == {}
