"""Predicted against realised speed-up: which layers are compared, what their difference is put down to, and where a
user sees it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern.backends import BACKENDS, explain_speedup, lower
from prunekern.backends.explain import Explanation, Row
from prunekern.backends.roofline import Roof
from prunekern.backends.speedup import Speedup, compare, quickest
from prunekern.cli.app import app
from prunekern.errors import InputError
from tests.models import make

USABLE = [b.name for b in BACKENDS if b.unavailable() is None and "cpu" in b.devices]
ROOF = Roof(50e9, ((32_000, 200e9), (1_000_000, 100e9), (100_000_000, 20e9)))


def row(step: str, macs: int, micro: float, **about: Any) -> Row:
    made = Row(step, "conv", 100, 64, 64, 1, "implicit GEMM", macs, 10_000, "", step)
    made = replace(made, seconds=micro / 1e6, **about)
    return replace(made, roofline=ROOF.seconds(made.macs, made.bytes) / (micro / 1e6) if micro else 0.0)


def explanation(*rows: Row, **about: Any) -> Explanation:
    total = sum(each.seconds or 0.0 for each in rows)
    return replace(Explanation(rows, "reference", 1, "", ROOF, (), 1.02 * total), **about)


def cause(before: Row, after: Row, backend: str = "reference", **about: Any) -> str:
    slow = row("slow", 100_000_000, 5000.0)            # so that nothing else counts as brief
    found = compare(explanation(before, slow), explanation(after, slow, backend=backend, **about))
    return found.layers[0].cause


def test_layers_that_gain_what_they_should() -> None:
    found = compare(explanation(row("a", 8_000_000, 200.0), row("b", 1_000_000, 30.0), row("relu", 0, 5.0)),
                    explanation(row("a", 2_000_000, 52.0), row("b", 500_000, 16.0), row("relu", 0, 2.0)))
    assert [(layer.name, layer.predicted, layer.cause) for layer in found.layers] == [("a", 4.0, ""), ("b", 2.0, "")]
    assert found.layers[0].realised == pytest.approx(200 / 52)
    assert found.others == pytest.approx((5e-6, 2e-6))
    assert found.predicted == pytest.approx(9 / 2.5)
    assert found.realised == pytest.approx(235 / 70)


def test_every_cause() -> None:
    base = row("a", 8_000_000, 200.0)
    half = row("a", 4_000_000, 180.0)
    assert cause(replace(base, algorithm="winograd 4x4"), half) == "winograd 4x4 -> implicit GEMM"
    assert cause(base, row("a", 4_000, 2.0)) == "overhead: 2 us in all"
    assert cause(base, row("a", 400_000, 120.0, bytes=2_000_000)) == "bandwidth: 2.0 MB at 17 GB/s"
    winograd = {"algorithm": "winograd 2x2"}
    assert "transforms" in cause(replace(base, **winograd), replace(half, **winograd))
    assert cause(row("a", 80_000, 20.0), row("a", 40_000, 20.0), threads=2) == "too little work for 2 threads"
    assert cause(base, half) == "44% of its roof, before 80%"
    assert cause(row("a", 8_000_000, 200.0, bytes=2_000_000), row("a", 4_000_000, 80.0, bytes=900_000)) == \
        "a nearer cache: 0.9 MB, before 2.0 MB"
    assert cause(replace(base, seconds=None), half) == "not measured"


@pytest.mark.skipif("cpu" not in USABLE, reason="the extension is not built")
def test_registers_that_are_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKERN_ISA", "portable")             # four lanes
    wide, narrow = row("a", 8_000_000, 200.0, N=8), row("a", 2_000_000, 100.0, N=2)
    assert cause(wide, narrow, "cpu") == "narrow GEMM: 2 of 4 lanes in use"
    assert cause(wide, replace(narrow, N=5), "cpu") == "tail: 5 columns in 2 registers of 4"
    assert cause(wide, replace(narrow, N=1, groups=5), "cpu") == "tail: 5 columns in 2 registers of 4"   # depthwise
    planar = {"algorithm": "planar"}
    assert cause(replace(wide, **planar), replace(narrow, **planar), "cpu").endswith("before 80%")
    assert cause(row("a", 8_000_000, 200.0, N=5), row("a", 4_000_000, 60.0, N=4), "cpu") == \
        "tail: 5 columns in 2 registers of 4"                   # it was there before, and has gone


def test_layers_that_are_done_as_one() -> None:
    """Steps within another one, in one of the networks, count with it in both."""
    before = explanation(row("expand", 4_000_000, 150.0, algorithm="in bands"),
                         row("middle", 1_000_000, 0.0, algorithm="within expand"),
                         row("project", 3_000_000, 0.0, algorithm="within expand"), row("b", 1_000_000, 30.0))
    after = explanation(row("expand", 2_000_000, 40.0), row("middle", 500_000, 10.0), row("project", 1_500_000, 25.0),
                        row("b", 1_000_000, 30.0))
    for one, other, predicted in ((before, after, 2.0), (after, before, 0.5)):
        first, second = compare(one, other).layers
        assert (first.name, first.predicted) == ("expand +2", predicted)
        assert first.realised == pytest.approx(2.0 if predicted == 2 else 0.5)
        assert second.name == "b"


def test_layers_are_found_by_name_or_by_module() -> None:
    shared = [row(step, 1_000_000, 30.0, source="fc") for step in ("linear", "linear_1")]
    renamed = [replace(each, step=f"other_{i}", macs=500_000 * (i + 1)) for i, each in enumerate(shared)]
    gone = row("gone", 1_000_000, 30.0)
    found = compare(explanation(*shared, gone), explanation(*renamed))
    assert [layer.after.macs for layer in found.layers] == [500_000, 1_000_000]
    assert [layer.before.step for layer in found.layers] == ["linear", "linear_1"]
    assert found.others[0] == pytest.approx(30e-6)              # what has no counterpart


def test_what_cannot_be_compared() -> None:
    timed = explanation(row("a", 1000, 1.0))
    for other in (replace(timed, roof=None), replace(timed, batch=2)):
        with pytest.raises(InputError, match="measured"):
            compare(timed, other)
    model, (x,) = make("mlp")
    lowered = lower(model, x, verify=False)
    with pytest.raises(InputError, match="rounds"):
        explain_speedup(lowered, lowered, x, rounds=0)


def test_the_least_of_several_explanations() -> None:
    first, second = explanation(row("a", 10, 5.0), row("b", 10, 7.0)), explanation(row("a", 10, 6.0), row("b", 10, 4.0))
    least = quickest([first, second])
    assert [each.seconds for each in least.rows] == [5e-6, 4e-6]
    assert least.call == min(first.call or 0, second.call or 0)


def assert_readable(found: Speedup) -> None:
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[:3] == ["layer", "MACs", "time"]
    assert len(lines) == len(found.layers) + 4
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("backend", USABLE)
def test_measured(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKERN_TUNE", "off")
    model, (x,) = make("fashion", batch=4)
    small = pk.compress(model, x, pk.Target(macs=0.3), lower=False).model
    dense, pruned = (lower(each, x, backend=backend, verify=False) for each in (model, small))
    found = pruned.against(dense, x, rounds=1)
    assert [layer.name for layer in found.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert found.predicted == pytest.approx(dense.program.macs(4) / pruned.program.macs(4))
    assert all(layer.realised > 0 for layer in found.layers)
    assert sum(layer.before.seconds or 0 for layer in found.layers) < found.call[0] * 1.5
    assert_readable(found)


def test_long_names_are_cut() -> None:
    name = "encoder.stages.3.blocks.11.attention.projection"
    one = explanation(row(name, 8_000_000, 20000.0, algorithm="in bands"))
    assert_readable(compare(one, explanation(row(name, 4_000_000, 18000.0, algorithm="1x1 GEMM, depthwise"))))


def test_in_the_report_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKERN_TUNE", "off")
    model, (x,) = make("fashion")
    result = pk.compress(model, x, pk.Target(macs=0.5), time=True)
    table = next(table for table in result.report.tables if table.title.startswith("Speed-up"))
    assert [cells[0] for cells in table.rows] == ["conv1", "conv2", "fc1", "fc2", "other steps", "a call"]
    figure = next(figure for figure in result.report.headline if figure.label == "Speed-up, batch 1")
    assert figure.value == table.rows[-1][2]
    assert not any(t.title.startswith("Speed-up") for t in pk.compress(model, x).report.tables)


@pytest.mark.usefixtures("models_module")
def test_on_the_command_line() -> None:
    from typer.testing import CliRunner
    found = CliRunner().invoke(app, ["lower", "speedup_models:small", "--against", "speedup_models:large", "--input",
                                     "2x12", "--json", "--backend", "reference"])
    assert found.exit_code == 0, found.output
    speedup = json.loads(found.stdout)["speedup"]
    assert [layer["name"] for layer in speedup["layers"]] == ["0", "2"]
    assert speedup["predicted"] == pytest.approx((12 * 40 + 40 * 3) / (12 * 10 + 10 * 3))


@pytest.fixture
def models_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "speedup_models.py").write_text(
        "from torch import nn\n"
        "def net(width): return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3)).eval()\n"
        "def small(): return net(10)\n"
        "def large(): return net(40)\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_times_of_steps_are_the_engines_own() -> None:
    if "cpu" not in USABLE:
        pytest.skip("the extension is not built")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    lowered = lower(model, torch.randn(8, 64), backend="cpu", verify=False, num_threads=1)
    found = lowered.explain(torch.randn(8, 64), time=True)
    assert found.threads == 1
    assert found.call is not None
    assert 0 < (found.seconds or 0) < found.call
    assert all(each.speed.endswith("GFLOP/s") for each in found.rows if each.macs)
