"""The latency benchmark: nothing unverified is timed, and what it writes can be read."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import latency
from bench.contenders import Contender, OutOfTime, Runner, Setting, contenders, time_limit
from tests.models import make

SETTING = Setting(torch.device("cpu"), threads=1)


def network() -> tuple[latency.Network, tuple[Tensor, ...]]:
    model, (x,) = make("mlp", batch=3)
    return latency.Network("dense", model, 1, 1), (x, x.flip(0) * 2)


def contender(make: object, **options: object) -> Contender:
    return Contender("some", make, **options)  # type: ignore[arg-type]


def test_a_right_contender_is_ready_to_be_timed() -> None:
    right = contender(lambda model, x, _: Runner(lambda x: lambda: model(x)))
    entry, call = latency.prepare(right, *network(), SETTING)
    assert entry.state == "timed"
    assert entry.checked is not None
    assert entry.checked.error == entry.checked.torch_error <= entry.checked.limit
    assert call is not None


def wrong(model: nn.Module, x: Tensor, _: Setting) -> Runner:
    return Runner(lambda x: lambda: model(x) * (1 + 1e-4))


def constant(model: nn.Module, x: Tensor, _: Setting) -> Runner:
    """Right on the example only, as a graph with its input baked in would be."""
    y = model(x)
    return Runner(lambda x: lambda: y)


def lost(model: nn.Module, x: Tensor, _: Setting) -> Runner:
    return Runner(lambda x: lambda: model(x)[:1])


@pytest.mark.parametrize("make", [wrong, constant, lost], ids=lambda make: make.__name__)
def test_a_wrong_contender_is_failed_and_not_timed(make: object) -> None:
    entry, call = latency.prepare(contender(make), *network(), SETTING)
    assert (entry.state, call, entry.row) == ("failed", None, None)
    assert "of max|output|" in entry.reason
    assert "limit" in entry.reason


def test_a_contender_that_raises_is_failed_with_its_reason() -> None:
    def broken(model: nn.Module, x: Tensor, _: Setting) -> Runner:
        raise RuntimeError("no such kernel\nand a page of details")
    entry, call = latency.prepare(contender(broken), *network(), SETTING)
    assert (entry.state, entry.reason, call) == ("failed", "RuntimeError: no such kernel", None)


def test_a_missing_contender_is_skipped_with_its_reason() -> None:
    entry, call = latency.prepare(contender(wrong, unavailable=lambda _: "not installed: x"), *network(), SETTING)
    assert (entry.state, entry.reason, call) == ("skipped", "not installed: x", None)


def test_who_takes_part() -> None:
    on_cpu = [c.name for c in contenders(SETTING)]
    on_gpu = [c.name for c in contenders(Setting(torch.device("cuda"), 1))]
    assert on_cpu[0] == on_gpu[0] == "eager"
    assert {"channels_last", "torch.compile, freezing", "ONNX Runtime", "OpenVINO f32"} <= set(on_cpu)
    assert {"channels_last", "eager, CUDA graph", "torch.compile, max-autotune"} <= set(on_gpu)
    assert "lowered, reference" in set(on_cpu) & set(on_gpu)
    assert not [c.name for c in contenders(SETTING, compile=False) if "compile" in c.name]


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    argv = ["--models", "mlp", "--batch", "1,2", "--macs", "0.5", "0.25", "--threads", "1", "--seconds", "0.01",
            "--no-compile", "--out", str(out)]
    assert latency.main(argv) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert found["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "device", "load_average_before"} <= set(found)
    assert [(case["model"], case["batch"]) for case in found["cases"]] == [("mlp", 1), ("mlp", 2)]
    for case in found["cases"]:
        dense, half, quarter = case["networks"].values()
        assert quarter["macs"] <= dense["macs"] / 4 <= half["macs"] <= dense["macs"] / 2
        timed = [e for e in case["entries"] if e["state"] == "timed"]
        assert {(e["contender"], e["network"]) for e in timed} >= {
            (who, what) for who in ("eager", "channels_last", "lowered, reference") for what in case["networks"]}
        for entry in timed:
            assert 0 < entry["min_us"] <= entry["p20_us"] <= entry["p50_us"] <= entry["p80_us"] < math.inf
            assert entry["error"] <= entry["limit"]
        assert all(entry["reason"] for entry in case["entries"] if entry["state"] != "timed")
    assert "mlp, batch 2" in shown
    assert any(line.startswith("eager ") and "1.00" in line for line in shown.splitlines())


def test_no_device_is_an_exit_status_of_its_own(monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        latency.main(["--device", "cuda"])
    assert stop.value.code == 3
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--models", "ghost"], ["--batch", "0"], ["--seconds", "-1"]], ids=str)
def test_wrong_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        latency.main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


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
