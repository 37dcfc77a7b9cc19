"""Ratios for every layer: the knapsack against trying everything, planted sensitivities, resuming, Optuna."""

from __future__ import annotations

import math
import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern.analysis.sensitivity import Scorer, divergence, sensitivity
from prunekern.errors import ArtefactError, InputError, TargetError
from prunekern.graph.groups import Groups
from prunekern.prune.target import Meter, Target
from prunekern.search import LatencyPlanner, Ratios, layerwise, tune
from prunekern.search.probe import Timed
from prunekern.search.ratios import Space, allot, knapsack, within
from prunekern.search.tables import widths_of
from prunekern.search.tuning import LOW, STARTUP


class Planted(nn.Module):
    """Three layers of equal cost: half of the first one's channels do nothing, all of the others' do something."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1), \
            nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.relu(layer(x)).mean((2, 3)) for layer in (self.idle, self.b, self.c)]
        return self.head(torch.cat(parts, 1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = Planted().eval()
    with torch.no_grad():
        made.head.weight.mul_(8)
        made.idle.weight[:8] = 0
        made.idle.bias[:8] = -1e-3
        made.head.weight[:, :8] *= 1e-3
    return made


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_divergence_is_kullback_and_leiblers():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert divergence(p.log() + 3, q.log() - 1) == pytest.approx(expected, rel=1e-5)
    assert divergence(torch.ones(2, 3, 4), torch.full((2, 3, 4), 1.5)) == pytest.approx(0.25)


def test_sensitivity_without_labels(model: nn.Module, inputs: Tensor, tmp_path: Path):
    found = sensitivity(model, inputs, labelled=False, ratios=(0.5,), checkpoint=tmp_path / "s.json")
    losses = {point.family: point.divergence for point in found.points}
    assert losses["idle"] < 1e-6 < min(losses["b"], losses["c"])
    assert all(math.isnan(point.accuracy) for point in found.points)
    assert math.isnan(found.dense)
    labels = model(inputs).argmax(1)
    labelled = sensitivity(model, (inputs, labels), ratios=(0.5,))
    assert labelled.dense == 1.0
    assert [p.divergence for p in labelled.points] == pytest.approx([p.divergence for p in found.points])
    with pytest.raises(ArtefactError, match="other criterion"):
        sensitivity(model, inputs, labelled=False, ratios=(0.5,), criterion="l1", checkpoint=tmp_path / "s.json")


def test_running_scores_end_at_the_whole_score(model: nn.Module, inputs: Tensor):
    space = Space.of(model, inputs, None)
    labels = model(inputs).argmax(1)
    scorer = Scorer(space.groups, [(x, y) for x, y in zip(inputs.split(20), labels.split(20), strict=True)])
    keep = space.keep([0.5] * 3)
    *_, last = scorer.running(keep)
    whole = Scorer(space.groups, [(inputs, labels)]).score(keep)
    assert last[0] == 64
    assert last[1:] == pytest.approx(whole)
    assert scorer.score(space.groups.everything()) == (1.0, 0.0)


# ---- dynamic programming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_equals_trying_everything(seed: int):
    draw = random.Random(seed)
    rows, options = draw.randint(1, 4), draw.randint(1, 4)
    losses = [[draw.random() for _ in range(options)] for _ in range(rows)]
    costs = [[float(draw.randint(0, 9)) for _ in range(options)] for _ in range(rows)]
    budget = draw.randint(0, 9 * rows)
    feasible = [picks for picks in product(range(options), repeat=rows)
                if sum(costs[row][pick] for row, pick in enumerate(picks)) <= budget]
    found = knapsack(losses, costs, float(budget), bins=max(budget, 1))
    if not feasible:
        assert found is None
        return
    assert found is not None
    assert tuple(found) in feasible
    assert sum(row[pick] for row, pick in zip(losses, found, strict=True)) == pytest.approx(
        min(sum(losses[row][pick] for row, pick in enumerate(picks)) for picks in feasible))


def test_a_coarse_knapsack_keeps_to_its_budget():
    draw = random.Random(0)
    for _ in range(50):
        losses = [[draw.random() for _ in range(5)] for _ in range(6)]
        costs = [[draw.random() for _ in range(4)] + [0.0] for _ in range(6)]
        found = knapsack(losses, costs, 1.3, bins=20)
        assert found is not None
        assert sum(row[pick] for row, pick in zip(costs, found, strict=True)) <= 1.3 + 1e-9


@pytest.mark.parametrize("limit", [0.2, 0.35, 0.5])
def test_products_of_widths_are_shared_out_as_well_as_by_trying_everything(limit: float):
    """Costs of a chain are products of neighbouring widths, and straight lines hold around a solution only."""
    chain = nn.Sequential(*[layer for width in (3, 10, 10, 10) for layer in (
        nn.Conv2d(width, 10, 3, padding=1), nn.ReLU())], nn.Flatten(), nn.Linear(10 * 16, 4)).eval()
    space = Space.of(chain, torch.randn(2, 3, 4, 4), Target(macs=limit))
    shares = [1.0, 0.8, 0.6, 0.4, 0.2]
    cost = {picks: space.spent(space.keep([shares[pick] for pick in picks])) for picks in product(range(5), repeat=4)}
    for seed in range(6):
        draw = random.Random(seed)
        losses = [[0.0, *sorted(draw.random() * scale for _ in range(4))] for scale in (1.0, 5.0, 2.0, 3.0)]
        total = {picks: sum(row[pick] for row, pick in zip(losses, picks, strict=True)) for picks in cost}
        best = min(total[picks] for picks in cost if cost[picks] <= limit)
        found = tuple(allot(space, shares, losses))
        assert cost[found] <= limit
        assert total[found] <= 1.02 * best


def test_what_does_nothing_goes_first(model: nn.Module, inputs: Tensor, tmp_path: Path):
    heard: list[str] = []
    found = layerwise(model, inputs, Target(macs=0.84), checkpoint=tmp_path, tell=heard.append)
    assert found.layers == {"idle": 0.5}
    assert found.loss < 1e-6
    assert found.spent <= 0.84
    result = pk.compress(model, inputs[:2], found.target, lower=False)
    assert result.plan.costs["macs"][1] / result.plan.costs["macs"][0] == pytest.approx(found.spent)
    assert result.model.idle.out_channels == 8
    torch.testing.assert_close(result.model(inputs), model(inputs), atol=1e-4, rtol=1e-3)
    report = found.report()
    assert {"Layers"} <= {table.title for table in report.tables}
    assert report.curves
    assert len(heard) == 4


def test_layerwise_by_accuracy_and_parameters(model: nn.Module, inputs: Tensor):
    labels = model(inputs).argmax(1)
    found = layerwise(model, (inputs, labels), Target(params=0.6), loss="accuracy")
    assert found.spent <= 0.6
    assert found.cost == "params"
    assert found.layers["idle"] <= 0.5


def test_layerwise_goes_on_after_a_kill(model: nn.Module, inputs: Tensor, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch):
    calls, score = [0], Scorer.score

    def dying(self: Scorer, keep: Tensor) -> tuple[float, float]:
        calls[0] += 1
        if calls[0] == 15:
            raise KeyboardInterrupt
        return score(self, keep)
    monkeypatch.setattr(Scorer, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        layerwise(model, inputs, Target(macs=0.6), checkpoint=tmp_path)
    found = layerwise(model, inputs, Target(macs=0.6), checkpoint=tmp_path)
    assert calls[0] == 3 * 9 + 1
    assert found == layerwise(model, inputs, Target(macs=0.6))
    with pytest.raises(ArtefactError, match="other options"):
        layerwise(model, inputs, Target(macs=0.6), criterion="l1", checkpoint=tmp_path)


def test_bad_targets(model: nn.Module, inputs: Tensor):
    for target, words in ((Target(macs=0.5, params=0.5), "not one share"), (Target(latency=0.5), "needs planner"),
                          (Target(macs=0.001), "out of reach")):
        with pytest.raises(TargetError, match=words):
            layerwise(model, inputs, target)
    with pytest.raises(InputError, match="known: 'divergence'"):
        layerwise(model, inputs, loss="mse")
    with pytest.raises(InputError, match="needs data with labels"):
        layerwise(model, [inputs], loss="accuracy")


# ---- Optuna ----------------------------------------------------------------------------------------------------------

optuna = pytest.importorskip("optuna", reason="Optuna is not installed")


def test_one_exponent_meets_the_cost(model: nn.Module, inputs: Tensor):
    space = Space.of(model, inputs, Target(macs=0.5))
    keep, cost = within(space, [0.9, 0.5, 0.7])
    left = [int(keep[family.groups].sum()) for family in space.families]
    assert 0.42 <= cost <= 0.5
    assert left[0] > left[2] > left[1]
    with pytest.raises(TargetError, match="out of reach"):
        within(Space.of(model, inputs, Target(macs=1e-4)), [0.9, 0.5, 0.7])


def score_of(target: Target) -> float:
    """A planted optimum: 'idle' narrow, the others wide."""
    layers = {"idle": 1.0, "b": 1.0, "c": 1.0} | dict(target.layers or {})
    return 1 - abs(layers["idle"] - 0.1) - abs(layers["b"] - layers["c"])


def test_tpe_finds_better_than_the_same_share_for_all(model: nn.Module, inputs: Tensor, tmp_path: Path):
    found = tune(model, inputs, Target(macs=0.6), trials=25, checkpoint=tmp_path)
    ratios = found.ratios
    first = next(iter(table for table in ratios.tables if table.title == "Trials")).rows[0]
    assert ratios.spent <= 0.6
    assert isinstance(first[2], float)
    assert ratios.loss < 0.8 * first[2]
    assert ratios.layers["idle"] < min(ratios.layers.get("b", 1.0), ratios.layers.get("c", 1.0))
    assert found.finished + found.pruned == 25
    result = pk.compress(model, inputs[:2], ratios.target, lower=False)
    assert result.plan.costs["macs"][1] / result.plan.costs["macs"][0] == pytest.approx(ratios.spent)
    assert {"Trials", "Layers"} <= {table.title for table in ratios.report().tables}


def test_tpe_goes_on_after_a_kill(model: nn.Module, inputs: Tensor, tmp_path: Path):
    asked: list[Target] = []

    def dying(target: Target) -> float:
        asked.append(target)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return score_of(target)
    with pytest.raises(KeyboardInterrupt):
        tune(model, inputs, Target(macs=0.5), trials=10, evaluate=dying, checkpoint=tmp_path)
    found = tune(model, inputs, Target(macs=0.5), trials=10, evaluate=dying, checkpoint=tmp_path)
    assert len(asked) == 11                     # five, the one that was killed, and five more
    assert found.finished == 10
    assert len({str(sorted((target.layers or {}).items())) for target in asked}) >= 9       # nothing is drawn again
    assert found.ratios.loss == pytest.approx(min(1 - score_of(t) for n, t in enumerate(asked) if n != 5))
    tune(model, inputs, Target(macs=0.5), trials=10, evaluate=dying, checkpoint=tmp_path)
    assert len(asked) == 11
    with pytest.raises(ArtefactError, match="another search"):
        tune(model, inputs, Target(macs=0.4), trials=10, evaluate=dying, checkpoint=tmp_path)


def test_hopeless_trials_are_given_up(model: nn.Module, inputs: Tensor, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    running = Scorer.running

    def counted(self: Scorer, keep: Tensor) -> Any:
        seen.append(0)
        for each in running(self, keep):
            seen[-1] += 1
            yield each
    monkeypatch.setattr(Scorer, "running", counted)
    found = tune(model, list(inputs.split(8)), Target(macs=0.5), trials=20)
    assert found.pruned >= 3
    assert sum(count < 8 for count in seen) == found.pruned
    assert all(count == 8 for count in seen[:STARTUP])
    rows = found.ratios.tables[0].rows
    assert sum(row[1] == "pruned" and row[2] is None and row[4] is not None for row in rows) == found.pruned


def test_nsga_gives_a_front(model: nn.Module, inputs: Tensor):
    found = tune(model, list(inputs.split(8)), trials=40, seed=1)
    assert len(found.best) >= 3
    costs, losses = [each.spent for each in found.best], [each.loss for each in found.best]
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    assert found.pruned >= 1                                    # as cheap and better is there already
    for each in found.best:
        assert min(each.layers.values(), default=1.0) >= LOW / 2
        assert each.target.layers


def test_ratios_that_are_known_are_tried_first(model: nn.Module, inputs: Tensor):
    known = layerwise(model, inputs, Target(macs=0.84))
    found = tune(model, inputs, Target(macs=0.84), trials=2, start=[known])
    assert isinstance(found.ratios, Ratios)
    assert found.ratios.channels["idle"][1] <= 9
    assert found.ratios.loss < 1e-2


def test_without_optuna_the_error_says_how_to_get_it(model: nn.Module, inputs: Tensor,
                                                     monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 'prunekern\[search\]'"):
        tune(model, inputs, Target(macs=0.5))


def test_evaluators_are_checked(model: nn.Module, inputs: Tensor):
    with pytest.raises(InputError, match="expected a number"):
        tune(model, inputs, Target(macs=0.5), trials=1, evaluate=lambda target: "good")  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="at least one"):
        tune(model, inputs, Target(macs=0.5), trials=0)


def test_latency_is_shared_out_by_what_a_planner_predicts(model: nn.Module, inputs: Tensor):
    """Time by formula: what the layer 'c' does takes all of it, so nothing else is worth cutting."""
    class Machine:
        identity, moved = "a formula", False

        def steps(self, groups: Groups, keep: Tensor) -> dict[str, float]:
            widths = widths_of(groups, Meter(groups).shapes(keep))
            return {name: widths[name][1] if name == "conv2d_2" else 0.0 for name in widths}

        def whole(self, groups: Groups, keep: Tensor) -> Timed:
            raise AssertionError("ratios are predicted")

        against = whole  # type: ignore[assignment]
    planner = LatencyPlanner(model, inputs, probe=Machine())  # type: ignore[arg-type]
    found = layerwise(model, inputs, Target(latency=0.5), planner=planner)
    assert found.cost == "latency"
    assert found.layers["c"] == 0.5
    assert found.layers.get("b", 1.0) == 1.0
    assert found.spent == pytest.approx(0.5)
