"""The latency benchmark: nothing unverified is timed, what it writes can be read, tables say what was measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import latency, table
from bench.cases import SCHEMA, Case, Entry, Results
from bench.contenders import PEERS, Contender, Runner, Setting, Truth, contenders
from bench.networks import TARGETS, Network, networks, odd, wanted
from prunekern.analysis.latency import Row
from prunekern.backends import BACKENDS
from prunekern.kernels import unavailable
from tests.models import make

SETTING = Setting(torch.device("cpu"), threads=1)
OURS = next(backend.name for backend in BACKENDS if backend.unavailable() is None)


def network() -> tuple[Network, Truth]:
    model, (x,) = make("mlp", batch=3)
    return Network("dense", model, 1, 1), Truth.of(model, (x, x.flip(0) * 2), 1)


def contender(make: Any, **options: Any) -> Contender:
    return Contender("some", "some", make, **options)


# ---- verification --------------------------------------------------------------------------------------------------


def test_a_right_contender_is_ready_to_be_timed() -> None:
    right = contender(lambda model, x, _: Runner(lambda x: lambda: model(x)))
    entry, call = latency.prepare(right, *network(), SETTING)
    assert entry.state == "timed"
    assert entry.checked is not None
    assert entry.checked.error == entry.checked.torch_error <= entry.checked.limit
    assert entry.checked.samples == 3
    assert call is not None


def wrong(model: nn.Module, x: Tensor, _: Setting) -> Runner:
    return Runner(lambda x: lambda: model(x) * (1 + 1e-4))


def constant(model: nn.Module, x: Tensor, _: Setting) -> Runner:
    """Right on the example only, as a graph with its input baked in would be."""
    y = model(x)
    return Runner(lambda x: lambda: y)


def lost(model: nn.Module, x: Tensor, _: Setting) -> Runner:
    return Runner(lambda x: lambda: model(x)[:1])


def last_one(model: nn.Module, x: Tensor, _: Setting) -> Runner:
    """Wrong in the last sample of a batch, as a tail that is not handled would be."""
    def bind(x: Tensor) -> Any:
        scale = torch.ones(len(x), 1)
        scale[-1] = 2
        return lambda: model(x) * scale
    return Runner(bind)


@pytest.mark.parametrize("make", [wrong, constant, lost, last_one], ids=lambda make: make.__name__)
def test_a_wrong_contender_is_failed_and_not_timed(make: object) -> None:
    entry, call = latency.prepare(contender(make), *network(), SETTING)
    assert (entry.state, call, entry.row) == ("failed", None, None)
    assert "of max|output|" in entry.reason
    assert "limit" in entry.reason


def test_large_networks_are_verified_on_some_samples_the_last_one_among_them() -> None:
    model, (x,) = make("mlp", batch=9)
    truth = Truth.of(model, (x, x.flip(0)), macs=10**12)
    assert truth.picked.tolist() == [0, 8]
    net = Network("dense", model, 10**12, 1)
    right = contender(lambda model, x, _: Runner(lambda x: lambda: model(x)))
    entry, call = latency.prepare(right, net, truth, SETTING)
    assert (entry.state, entry.checked and entry.checked.samples) == ("timed", 2)
    assert call is not None
    assert latency.prepare(contender(last_one), net, truth, SETTING)[0].state == "failed"


def test_ours_is_held_to_less_than_peers_are() -> None:
    def near(model: nn.Module, x: Tensor, _: Setting) -> Runner:
        return Runner(lambda x: lambda: model(x) * (1 + 2e-5))
    assert latency.prepare(contender(near), *network(), SETTING)[0].state == "timed"
    assert latency.prepare(contender(near, ours=True), *network(), SETTING)[0].state == "failed"


def test_lower_precision_has_its_own_limit() -> None:
    model, (x,) = make("mlp", batch=2)
    truth = Truth.of(model, (x,), 1, ("fp32", "bf16"))

    def rounded(model: nn.Module, x: Tensor, _: Setting) -> Runner:
        return Runner(lambda x: lambda: model(x).bfloat16().float())
    net = Network("dense", model, 1, 1)
    entry, _ = latency.prepare(contender(rounded, precision="bf16"), net, truth, SETTING)
    assert entry.state == "timed"
    assert entry.checked is not None
    assert entry.checked.torch_error > 1e-4         # eager's in bf16
    assert latency.prepare(contender(rounded), net, truth, SETTING)[0].state == "failed"


def test_a_contender_that_raises_is_failed_with_its_reason() -> None:
    def broken(model: nn.Module, x: Tensor, _: Setting) -> Runner:
        raise RuntimeError("no such kernel\nand a page of details")
    entry, call = latency.prepare(contender(broken), *network(), SETTING)
    assert (entry.state, entry.reason, call) == ("failed", "RuntimeError: no such kernel", None)


def test_a_missing_or_too_slow_contender_is_skipped_with_its_reason() -> None:
    entry, call = latency.prepare(contender(wrong, unavailable=lambda _: "not installed: x"), *network(), SETTING)
    assert (entry.state, entry.reason, call) == ("skipped", "not installed: x", None)

    def slow(model: nn.Module, x: Tensor, _: Setting) -> Runner:
        return Runner(lambda x: lambda: (time.sleep(0.05), model(x))[1])
    entry, call = latency.prepare(contender(slow), *network(), SETTING, cap=0.1)
    assert (entry.state, call) == ("skipped", None)
    assert "--cap" in entry.reason
    assert latency.prepare(contender(slow), *network(), SETTING, cap=10)[0].state == "timed"


def test_who_takes_part() -> None:
    on_cpu = [c.name for c in contenders(SETTING)]
    on_gpu = [c.name for c in contenders(Setting(torch.device("cuda"), 1), backends=[b.name for b in BACKENDS])]
    assert on_cpu[0] == on_gpu[0] == "eager"
    assert {"channels_last", "torch.compile, freezing", "ONNX Runtime", "OpenVINO f32", "OpenVINO bf16"} <= set(on_cpu)
    assert {"channels_last", "eager, CUDA graph", "torch.compile, max-autotune"} <= set(on_gpu)
    assert {"lowered, reference", "lowered, triton", "lowered, triton, tf32", "lowered, triton, fp16"} <= set(on_gpu)
    gpu = Setting(torch.device("cuda"), 1)
    for precision in ("tf32", "fp16"):          # each with peers of its own
        some = contenders(gpu, ["channels_last", "compile"], ["triton"], [precision])
        assert [c.name for c in some] == ["eager", f"channels_last, {precision}", f"torch.compile, max-autotune, "
                                          f"{precision}", f"lowered, triton, {precision}"]
        assert {c.league for c in some[1:]} == {precision}
        assert [c.held_to for c in some[1:]] == [precision] * 2 + ["fp16" if precision == "fp16" else "fp32"]
    assert f"lowered, {OURS}" in on_cpu
    if OURS == "cpu":
        assert on_cpu[-2:] == ["lowered, cpu, fp16 weights", "lowered, cpu, bf16"]
    assert [c.name for c in contenders(SETTING, ["onnxruntime"])] == ["eager", "ONNX Runtime", f"lowered, {OURS}"]
    assert [c.name for c in contenders(SETTING, [], ["reference"])] == ["eager", "lowered, reference"]
    assert {c.precision for c in contenders(SETTING) if c.league == "fp32"} == {"fp32"}
    assert {c.held_to for c in contenders(SETTING) if c.ours} == {"fp32"}


# ---- networks ------------------------------------------------------------------------------------------------------


def test_networks_of_the_table() -> None:
    model, (x,) = make("fashion")
    dense, half = networks("fashion", model, x)
    assert (dense.name, half.name) == ("dense", "half")
    assert [m.out_channels for m in half.module.modules() if isinstance(m, nn.Conv2d)] == [8, 8]
    assert [m.out_features for m in half.module.modules() if isinstance(m, nn.Linear)] == [50, 10]
    assert half.macs == 8 * 9 * 784 + 8 * 8 * 9 * 196 + 392 * 50 + 500
    named = [n.name for n in networks("fashion", model, x, [0.5])]
    assert named == ["dense", "50% MACs"]


def test_odd_widths() -> None:
    assert [odd(n) for n in (1, 2, 16, 64, 128, 256, 512)] == [1, 1, 9, 39, 77, 153, 307]
    assert all(odd(n) % 2 == 1 and abs(odd(n) - 0.6 * n) <= 1 for n in range(2, 600))


def test_targets() -> None:
    assert len(TARGETS) == len({(row.model, row.network) for row in TARGETS}) == 13
    row = wanted("vgg16_cifar", "odd")
    assert row is not None
    assert [row.limit(batch, threads) for batch, threads in ((1, 1), (64, 1), (8, 1), (1, 2))] == [0.65, 0.48, 1, 1]
    assert wanted("vgg16_cifar", "50% MACs") is None


# ---- cases and their file ------------------------------------------------------------------------------------------


def case(ours: float, peer: float = 100.0, *, model: str = "fashion", batch: int = 1, threads: int = 1) -> Case:
    """eager takes 500 µs, another peer ``peer``, one in bf16 10, this library ``ours``."""
    def entry(who: Contender, time: float) -> Entry:
        return Entry(who, "dense", row=Row(who.name, time, time, time, time, 10, 1))
    eager, fast, narrow = PEERS["cpu"][0], PEERS["cpu"][3], PEERS["cpu"][5]
    mine = Contender("cpu", "lowered, cpu", wrong, ours=True)
    entries = (entry(eager, 500), entry(fast, peer), entry(narrow, 10), entry(mine, ours),
               Entry(PEERS["cpu"][1], "dense", "failed", "for a reason"))
    return Case(model, batch, threads, (Network("dense", nn.Identity(), 10**6, 1),), entries, peak=100.0)


def test_ratio_is_to_the_fastest_fp32_peer() -> None:
    ratio = case(50).ratio("dense")
    assert ratio is not None
    assert (ratio.value, ratio.peer, ratio.target) == (0.5, "ONNX Runtime", 0.80)
    assert "MISSED" not in str(ratio)
    assert "MISSED" in str(case(90).ratio("dense"))
    assert "MISSED" not in str(case(90, threads=2).ratio("dense"))
    assert case(50).ratio("dense", "opt-in") is None
    half = Contender("cpu", "lowered, cpu, fp16 weights", wrong, precision="fp16 weights", ours=True)
    more = case(50)
    more = replace(more, entries=(*more.entries, Entry(half, "dense", row=Row("", 5, 5, 5, 5, 10, 1))))
    opt_in, same = more.ratio("dense", "opt-in"), more.ratio("dense")
    assert opt_in is not None
    assert (opt_in.value, opt_in.peer, opt_in.target) == (0.5, "OpenVINO bf16", None)
    assert same == ratio
    assert set(more.to_json()["networks"]["dense"]["ratios"]) == {"fp32", "opt-in"}
    alone = case(50)
    assert replace(alone, entries=alone.entries[-2:]).ratio("dense") is None


def test_share_of_the_peak() -> None:
    """A million multiply-accumulates in 50 µs are 40 GFLOP/s."""
    entry = next(e for e in case(50).entries if e.contender.ours)
    assert case(50).share(entry) == pytest.approx(0.4)
    assert replace(case(50), batch=2).share(entry) == pytest.approx(0.8)
    assert replace(case(50), peak=None).share(entry) is None


FACTS = {"schema": SCHEMA, "sources": "a", "commit": "c", "device": "some", "cpus": 2, "versions": {"torch": "2"},
         "settings": {"seconds": 1.0}, "cpu_capability": "AVX2", "date": "2026-01-31T00:00:00+00:00",
         "peaks": {"1": {"gflops": 100.0, "by": "x"}}}


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first = Results(path, FACTS)
    first.add(case(50))
    again = Results(path, {**FACTS, "commit": "d", "date": "later"}, resume=True)
    assert ("fashion", 1, 1) in again
    assert ("fashion", 1, 2) not in again
    assert again.facts["date"] == FACTS["date"]
    again.add(case(50, threads=2))
    assert [c["threads"] for c in json.loads(path.read_text())["cases"]] == [1, 2]
    assert ("fashion", 1, 1) not in Results(path, FACTS)
    for key, value in {"sources": "b", "extension": "e", "settings": {"seconds": 2.0}, "versions": {}}.items():
        with pytest.raises(ValueError, match=f"another {key}"):
            Results(path, {**FACTS, key: value}, resume=True)


# ---- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    found = Results(tmp_path / "r.json", FACTS)
    for each in (case(50), case(80, batch=64), case(90, threads=2), case(130, threads=2, batch=64),
                 case(20, model="lenet")):
        found.add(each)
    return found.path


def test_table(results: Path) -> None:
    text = table.markdown(table.Results(results))
    head, _, fashion, lenet, *_ = [line for line in text.splitlines() if line.startswith("|")]
    columns = ["1 thread, batch 1", "1 thread, batch 64", "2 threads, batch 1", "2 threads, batch 64"]
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["network", *columns]
    assert [cell.strip() for cell in fashion.strip("|").split("|")] == [
        "Fashion-MNIST network", "0.50 (0.80)", "**0.80** (0.70) ✗", "0.90 (1.00)", "**1.30** (1.00) ✗"]
    assert [cell.strip() for cell in lenet.strip("|").split("|")] == ["LeNet", "0.20 (0.50)", "–", "–", "–"]
    assert f"**{(0.5 * 0.8 * 0.2) ** (1 / 3):.2f}** (wanted 0.65), over 3 of the 26 entries; 2 targets missed" in text
    assert "50.0 / 100 ONNX Runtime" in text


def test_opt_in_precisions_have_a_table_of_their_own(results: Path) -> None:
    assert "Opt-in" not in table.markdown(table.Results(results))
    found = json.loads(results.read_text())
    found["cases"][0]["networks"]["dense"]["ratios"]["opt-in"] = {
        "ours": "lowered, cpu, fp16 weights", "peer": "OpenVINO bf16", "ratio": 1.234}
    results.write_text(json.dumps(found))
    text = table.markdown(table.Results(results))
    assert "1.23 (fp16 weights / OpenVINO bf16)" in text
    assert "2 targets missed" in text


def test_the_benchmark_needs_no_pytest() -> None:
    """`make gpu-check` measures with a machine's own Python."""
    code = "import sys; sys.modules['pytest'] = None; import bench.latency"
    done = subprocess.run([sys.executable, "-c", code], cwd=latency.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_network_of_ours_that_failed_is_a_miss(tmp_path: Path) -> None:
    found = Results(tmp_path / "r.json", FACTS)
    whole = case(50)
    found.add(replace(whole, entries=tuple(e for e in whole.entries if not e.contender.ours)))
    assert "**none** (0.80) ✗" in table.markdown(table.Results(found.path))


def test_readme_is_written_between_its_markers(results: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN} -->\nold\n{table.END}\nafter\n")
    assert latency.main(["--table", str(results), "--readme", str(readme)]) == 0
    once = readme.read_text()
    assert once.startswith("before\n" + table.BEGIN)
    assert once.endswith(f"\n{table.END}\nafter\n")
    assert "old" not in once
    assert "Fashion-MNIST network" in once
    assert "missed: Fashion-MNIST network, batch 64, 1 thread: 0.80 of ONNX Runtime, wanted 0.70" \
        in capsys.readouterr().err
    assert latency.main(["--table", str(results), "--readme", str(readme)]) == 0
    assert readme.read_text() == once
    readme.write_text("no markers\n")
    assert latency.main(["--table", str(results), "--readme", str(readme)]) == 2
    assert readme.read_text() == "no markers\n"


def test_the_readme_has_its_markers() -> None:
    text = (latency.ROOT / "README.md").read_text(encoding="utf-8")
    assert "new" in table.insert(text, "new", "source")


def test_tables_of_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"schema": 1, "cases": []}))
    assert latency.main(["--table", str(old)]) == 2
    assert "schema 1" in capsys.readouterr().err


# ---- whole runs ----------------------------------------------------------------------------------------------------


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.sources", lambda: "these")       # files may be edited while this runs
    out = tmp_path / "figures.json"
    before = torch.get_num_threads()
    argv = ["--models", "mlp", "--batches", "1,2", "--macs", "0.5", "0.25", "--threads", "1", "--seconds", "0.01",
            "--peers", "channels_last,onnxruntime,openvino-bf16", "--out", str(out)]
    try:
        assert latency.main(argv) == 0
        shown, found = capsys.readouterr().out, json.loads(out.read_text())
        stamp = out.stat().st_mtime_ns
        assert latency.main([*argv, "--resume"]) == 0
        assert out.stat().st_mtime_ns == stamp
    finally:
        torch.set_num_threads(before)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert found["versions"]["torch"] == torch.__version__
    assert (found["extension"] is None) == (unavailable() is not None)
    assert {"date", "commit", "sources", "device", "flags", "caches", "load_average_before"} <= set(found)
    assert found["peaks"]["1"]["gflops"] > 1
    assert [(c["model"], c["batch"], c["threads"]) for c in found["cases"]] == [("mlp", 1, 1), ("mlp", 2, 1)]
    for each in found["cases"]:
        dense, half, quarter = each["networks"].values()
        assert quarter["macs"] <= dense["macs"] / 4 <= half["macs"] <= dense["macs"] / 2
        timed = [e for e in each["entries"] if e["state"] == "timed"]
        assert {(e["contender"], e["network"]) for e in timed} >= {
            (who, what) for who in ("eager", "channels_last", f"lowered, {OURS}") for what in each["networks"]}
        for entry in timed:
            assert 0 < entry["min_us"] <= entry["p20_us"] <= entry["p50_us"] <= entry["p80_us"] < math.inf
            assert entry["error"] <= entry["limit"]
            assert 0 < entry["share_of_peak"] < 3
        assert all(entry["reason"] for entry in each["entries"] if entry["state"] != "timed")
        best = min(e["p50_us"] for e in timed if e["network"] == "dense" and not e["ours"] and e["league"] == "fp32")
        ours = next(e["p50_us"] for e in timed if e["network"] == "dense" and e["ours"] and e["league"] == "fp32")
        assert dense["ratios"]["fp32"]["ratio"] == pytest.approx(ours / best, rel=1e-3)
    assert "mlp, batch 2, 1 thread" in shown
    assert any(line.startswith("eager ") and "1.00" in line for line in shown.splitlines())


def test_no_device_is_an_exit_status_of_its_own(monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        latency.main(["--device", "cuda"])
    assert stop.value.code == 3
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--models", "ghost"], ["--batch", "0"], ["--seconds", "-1"], ["--peers", "ghost"],
                                  ["--device", "cpu", "--peers", "cuda-graph"], ["--backends", "ghost"],
                                  ["--threads", "0"], ["--cap", "0"], ["--readme", "x"], ["--batches", "one"]], ids=str)
def test_wrong_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        latency.main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_defaults() -> None:
    cpu, cuda = latency.parse([]), latency.parse(["--device", "cuda"])
    assert set(cpu.models) == {row.model for row in TARGETS}
    assert (cpu.macs, cuda.macs, cuda.models) == (None, (0.5,), ("fashion", "lenet", "mlp", "resnet20"))
