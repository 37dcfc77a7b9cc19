"""The front of four costs against accuracy: figures, resuming, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern.cost import energy
from prunekern.errors import ArtefactError, InputError, LoweringError, TargetError
from prunekern.report import DENSE, ParetoPoint, Report, charts, html, on_front, pareto_front, plots
from prunekern.report.pareto import costs_of
from prunekern.search.probe import LoweredProbe, Timed

module = sys.modules["prunekern.pareto"]         # ``prunekern.pareto`` itself is the function


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(12 * 16, 4)).eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def accuracy(model: nn.Module) -> float:
    """More parameters are better, on a network that nobody trained."""
    return min(0.9, 0.5 + size(model) / 10_000)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Latency by formula: 1 ns for a parameter. What was timed is on record."""
    seen: list[int] = []

    def module(self: LoweredProbe, pruned: nn.Module) -> Timed:
        seen.append(size(pruned))
        return Timed(size(self.model) * 1e-9, size(pruned) * 1e-9)
    monkeypatch.setattr(LoweredProbe, "module", module)
    monkeypatch.setattr(LoweredProbe, "against", lambda self, _: Timed(size(self.model) * 1e-9, 1e-9))
    return seen


def test_points_carry_all_four_costs(model: nn.Module, inputs: Tensor, timed: list[int]):
    found = pk.pareto(model, inputs, (0.7, 0.4), validate=accuracy)
    original, *others = found.points()
    assert (original.stage, original.macs, original.params) == (DENSE, pk.profile(model, inputs, batch=1).macs,
                                                                size(model))
    assert original.latency == pytest.approx(size(model) * 1e-3)
    for point, result, share in zip(others, found.results, (0.7, 0.4), strict=True):
        counted = pk.profile(result.model, inputs, batch=1)
        assert (point.macs, point.params) == (counted.macs, size(result.model))
        assert point.macs <= share * original.macs
        assert point.latency == pytest.approx(size(result.model) * 1e-3)
        assert point.energy == pytest.approx(energy(counted))
        assert point.accuracy == accuracy(result.model)
    assert found.dense == (original.macs, accuracy(model))
    assert "latency" in found.report().title
    assert str(found).count("on the front in MACs, parameters, latency, energy") == 3


def test_energy_is_what_its_source_says(model: nn.Module, inputs: Tensor):
    total = pk.profile(model, inputs, batch=1).total
    moved = total.weight_bytes + total.read_bytes + total.written_bytes
    found = energy(pk.profile(model, inputs, batch=1))
    assert found == pytest.approx(1e-6 * ((3.7 + 0.9) * total.macs + 1300 / 8 * moved))
    assert energy(pk.profile(model, inputs, batch=8)) < found          # weights are read once for all


@pytest.mark.parametrize("by", ["params", "latency"])
def test_shares_of_other_costs(model: nn.Module, inputs: Tensor, by: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[pk.Target] = []

    def compress(model: nn.Module, example: Any, target: pk.Target, **options: Any) -> pk.Result:
        asked.append(target)
        return pk.compress(model, example, pk.Target(macs=0.5), **options)
    monkeypatch.setattr(module, "compress", compress)
    found = pk.pareto(model, inputs, (0.5,), validate=accuracy, by=by, latency=False)
    assert asked == [pk.Target(**{by: 0.5})]
    assert found.points()[1].name == f"50% of the {'parameters' if by == 'params' else 'latency'}"
    assert costs_of(found.points()) == ("macs", "params", "energy")
    with pytest.raises(InputError, match="front in 'latency'"):
        found.front("latency")


def test_a_killed_front_goes_on(model: nn.Module, inputs: Tensor, timed: list[int], tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch):
    made: list[float | None] = []

    def dying(deadline: int) -> Callable[..., pk.Result]:
        def compress(model: nn.Module, example: Any, target: pk.Target, **options: Any) -> pk.Result:
            if len(made) == deadline:
                raise KeyboardInterrupt
            made.append(target.macs)
            return pk.compress(model, example, target, **options)
        return compress
    monkeypatch.setattr(module, "compress", dying(2))
    shares = (0.8, 0.6, 0.4)
    with pytest.raises(KeyboardInterrupt):
        pk.pareto(model, inputs, shares, validate=accuracy, checkpoint=tmp_path)
    monkeypatch.setattr(module, "compress", dying(99))
    found = pk.pareto(model, inputs, shares, validate=accuracy, checkpoint=tmp_path)
    assert made == [0.8, 0.6, 0.4]
    assert len(timed) == 3
    assert found.points() == pk.pareto(model, inputs, shares, validate=accuracy).points()
    more = pk.pareto(model, inputs, (*shares, 0.3), validate=accuracy, checkpoint=tmp_path)
    assert made[-1] == 0.3
    assert len(more.results) == 4
    torch.testing.assert_close(more.results[0].model(inputs), found.results[0].model(inputs))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ArtefactError, match="other model"):
        pk.pareto(model, inputs, shares, validate=accuracy, checkpoint=tmp_path)


def test_what_cannot_be_lowered_has_no_latency(model: nn.Module, inputs: Tensor, timed: list[int],
                                               monkeypatch: pytest.MonkeyPatch):
    def refuse(self: LoweredProbe, pruned: nn.Module) -> Timed:
        raise LoweringError("no pure form")
    monkeypatch.setattr(LoweredProbe, "module", refuse)
    found = pk.pareto(model, inputs, (0.5,), validate=accuracy)
    assert all(point.latency is None for point in found.points())
    assert any("no pure form" in note for note in found.notes)


def test_out_of_reach_and_bad_input(model: nn.Module, inputs: Tensor):
    found = pk.pareto(model, inputs, (0.5, 1e-9), validate=accuracy, latency=False)
    assert found.shares == (0.5,)
    assert "out of reach" in found.notes[0]
    with pytest.raises(TargetError, match="none of the shares"):
        pk.pareto(model, inputs, (1e-9,), validate=accuracy, latency=False)
    with pytest.raises(TargetError, match="by='size'"):
        pk.pareto(model, inputs, validate=accuracy, by="size")
    with pytest.raises(TargetError, match="asks for no network"):
        pk.pareto(model, inputs, (), validate=accuracy)
    with pytest.raises(InputError, match="needs validate"):
        pk.pareto(model, inputs, validate=None)


# ---- report ----------------------------------------------------------------------------------------------------------

POINTS = (ParetoPoint("original", 100, 0.9, DENSE, params=50, latency=9.0, energy=5.0),
          ParetoPoint("a", 60, 0.85, params=40, latency=3.0, energy=4.0),
          ParetoPoint("b", 50, 0.85, params=45, latency=4.0, energy=2.0),
          ParetoPoint("c", 40, 0.80, params=48, latency=2.0, energy=4.5))


def test_each_cost_has_its_front():
    fronts = {cost: {p.name for p in pareto_front(POINTS, cost)} for cost in costs_of(POINTS)}
    assert fronts == {"macs": {"original", "b", "c"}, "params": {"original", "a"},
                      "latency": {"original", "a", "c"}, "energy": {"original", "b"}}
    for cost in fronts:             # by definition, point by point
        beaten = [any(getattr(q, cost) <= getattr(p, cost) and q.accuracy >= p.accuracy
                      and (getattr(q, cost) < getattr(p, cost) or q.accuracy > p.accuracy) for q in POINTS)
                  for p in POINTS]
        assert on_front(POINTS, cost) == tuple(not each for each in beaten)


def test_a_panel_for_each_cost(tmp_path: Path):
    report = Report("x", pareto=POINTS)
    page = html.render(report)
    for name in ("Parameters and accuracy", "Latency and accuracy", "Energy (proxy) and accuracy"):
        assert name in page
    chart = charts.pareto_chart(report, log=False, cost="latency")
    assert chart.x_title == "latency"
    assert sum("front" in mark.style.split() for mark in chart.marks) == 3
    assert len(plots.render(report)["pareto.png"]) > len(plots.render(Report("x", pareto=tuple(
        ParetoPoint(p.name, p.macs, p.accuracy, p.stage) for p in POINTS)))["pareto.png"])
    assert Report.from_json(report.to_json()).pareto == POINTS
    few = Report("x", pareto=(*POINTS, ParetoPoint("d", 10, 0.5)))
    assert "Latency and accuracy" not in html.render(few)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                             timed: list[int]):
    from prunekern.cli import searching
    from prunekern.cli.app import run
    from prunekern.cli.target import Sets
    images, labels = torch.randn(40, 1, 8, 8), torch.randint(0, 4, (40,))
    part = images, labels
    monkeypatch.setattr(searching, "load_sets", lambda *a: Sets(part, part, part, ""))
    (tmp_path / "netmodule.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), "
        "nn.Linear(288, 4)).eval()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(["pareto", "netmodule:net", "--data", "mnist", "--share", "0.5", "--criterion", "l2", "--json",
                "--quiet", "--out", str(tmp_path / "front")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [point["original"] for point in data["points"]] == [True, False]
    assert all(set(point) >= {"macs", "params", "latency", "energy", "accuracy", "front"} for point in data["points"])
    assert {"index.html", "report.json", "pareto.png"} <= {path.name for path in (tmp_path / "front").iterdir()}
