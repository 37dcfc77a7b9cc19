"""Plans: plain data that survives JSON, tells what changed, and is refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunekern import apply_plan, groups_of
from prunekern.core.plan import Plan
from prunekern.errors import PlanError
from prunekern.graph.groups import Groups
from prunekern.prune.compose import compose
from prunekern.prune.slice import choice_of, plan_of
from prunekern.prune.target import Meter
from tests.pruning import cut, first_units
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(6 * 16, 5)).eval()


@pytest.fixture(scope="module")
def groups(model: nn.Module) -> Groups:
    return groups_of(model, torch.randn(2, 3, 8, 8))


def keeping(groups: Groups, **layers: list[int]) -> Plan:
    """A plan that keeps the named channels of layers called '_0' for '0'."""
    keep = groups.everything()
    for name, kept in layers.items():
        family = next(f for f in groups if f.name == name.lstrip("_"))
        gone = [i for i in range(family.channels) if i not in kept]
        keep[family.groups[gone]] = False
    return plan_of(groups, keep, costs=Meter(groups).change(keep), target={"macs": 0.5}, notes=("by hand",))


def test_kept_lists_every_axis_that_shrinks(groups: Groups) -> None:
    plan = keeping(groups, _0=[1, 4, 5], _2=[0, 5])
    columns = [channel * 16 + pixel for channel in (0, 5) for pixel in range(16)]
    assert plan.kept == {
        "0.weight": {0: [1, 4, 5]}, "0.bias": {0: [1, 4, 5]},
        "2.weight": {0: [0, 5], 1: [1, 4, 5]}, "2.bias": {0: [0, 5]},
        "5.weight": {1: columns}}
    assert list(plan.shapes.values()) == [["N", "3", "6", "6"]] * 2 + [["N", "2", "4", "4"]] * 2 + [["N", "32"]]
    before, after = plan.costs["macs"]
    assert before == 36 * 8 * 27 + 16 * 6 * 72 + 96 * 5
    assert after == 36 * 3 * 27 + 16 * 2 * 27 + 32 * 5
    assert plan.costs["params"][1] == (81 + 3) + (54 + 2) + (160 + 5)
    assert plan.costs["bytes"][1] == 4 * plan.costs["params"][1]


def test_json_round_trip(groups: Groups, tmp_path: Path) -> None:
    plan = keeping(groups, _0=[0, 7])
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_tables_round_trip() -> None:
    model, args, _ = ZOO["resnext"]()
    groups = groups_of(model, args)
    result = cut(model, groups, first_units(groups))
    rows = result.plan.kept["body.1.0.weight"][1]
    assert len(rows) == 4
    assert len({len(row) for row in rows}) == 1
    plan = Plan.from_json(json.loads(json.dumps(result.plan.to_json())))
    assert torch.equal(choice_of(groups, plan), result.keep)


def test_edited_plan_is_applied(model: nn.Module, groups: Groups) -> None:
    """By hand, all members of a family; shapes and costs are predicted again."""
    plan = keeping(groups, _0=[0, 1, 2])
    kept = {name: {axis: [0, 1, 2, 6] if list_ == [0, 1, 2] else list_ for axis, list_ in axes.items()}
            for name, axes in plan.kept.items()}
    result = apply_plan(model, None, plan.edited(kept=kept), groups=groups)
    assert torch.equal(result.model[0].weight, model[0].weight[[0, 1, 2, 6]])  # type: ignore[index]
    assert result.plan.kept == kept
    assert result.plan.shapes != plan.shapes
    assert result.plan.costs["params"][1] == sum(p.numel() for p in result.model.parameters())


def test_order_in_a_hand_written_list_does_not_matter(groups: Groups) -> None:
    plan = keeping(groups, _0=[0, 1, 2])
    kept = {name: {axis: list(reversed(list_)) for axis, list_ in axes.items()} for name, axes in plan.kept.items()}
    assert torch.equal(choice_of(groups, plan.edited(kept=kept)), choice_of(groups, plan))


@pytest.mark.parametrize(("kept", "words"), [
    ({"0.weight": {0: [0]}}, ["does not agree", "family '0'"]),
    ({"0.weight": {0: []}}, ["keeps nothing", "0.weight"]),
    ({"0.weight": {0: [0, 8]}}, ["indices from 0 to 7"]),
    ({"0.weight": {0: [0, 0]}}, ["different indices"]),
    ({"0.weight": {0: ["1"]}}, ["indices from 0 to 7"]),
    ({"0.weight": {1: [0, 1]}}, ["must stay"]),
    ({"5.weight": {0: [0, 1]}, "5.bias": {0: [0, 1]}}, ["must stay"]),
    ({"9.weight": {0: [0]}}, ["no such axis", "9.weight"]),
    ({"0.weight": {7: [0]}}, ["no such axis"]),
])
def test_plan_that_does_not_fit_is_refused(groups: Groups, kept: Any, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        choice_of(groups, keeping(groups).edited(kept=kept))
    assert all(word in str(caught.value) for word in words), caught.value


def test_unbalanced_table_is_refused() -> None:
    model, args, _ = ZOO["grouped_uneven"]()
    groups = groups_of(model, args)
    keep = groups.everything()
    keep[groups.families[0].groups[0]] = False
    with pytest.raises(PlanError, match="as many channels in each group"):
        choice_of(groups, plan_of(groups, keep))


def test_fingerprint_is_of_the_graph_not_of_the_weights(model: nn.Module, groups: Groups) -> None:
    plan = keeping(groups, _0=[0, 1])
    other = nn.Sequential(*[type(m)(*a) for m, a in zip(model, [
        (3, 8, 3), (), (8, 6, 3), (), (), (6 * 16, 5)], strict=True)]).eval()
    again = apply_plan(other, torch.randn(3, 3, 8, 8), plan)
    assert again.plan.kept == plan.kept
    for changed in (nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 9, 3)):
        last = nn.Linear(6 * (16 if changed.padding == (0, 0) else 36), 5)
        middle = nn.Conv2d(changed.out_channels, 6, 3)
        fresh = nn.Sequential(changed, nn.ReLU(), middle, nn.ReLU(), nn.Flatten(), last).eval()
        with pytest.raises(PlanError, match="belongs to graph"):
            apply_plan(fresh, torch.randn(2, 3, 8, 8), plan)


def test_diff_names_what_comes_and_goes(groups: Groups) -> None:
    a, b = keeping(groups, _0=[0, 1, 2]), keeping(groups, _0=[1, 2, 3])
    assert a.diff(a) == {}
    change = {"added": [3], "removed": [0]}
    assert a.diff(b) == {"0.bias": {0: change}, "0.weight": {0: change}, "2.weight": {1: change}}
    assert b.diff(a)["0.bias"] == {0: {"added": [0], "removed": [3]}}
    whole = keeping(groups)
    assert a.diff(whole)["0.bias"] == {0: {"added": [None], "removed": [0, 1, 2]}}
    assert whole.diff(a)["0.bias"] == {0: {"added": [0, 1, 2], "removed": [None]}}


def test_diff_of_tables_counts_in_rows() -> None:
    a = Plan("g", {"w": {1: [[0, 1], [2, 3]]}})
    b = Plan("g", {"w": {1: [[0, 2], [2, 3]]}})
    assert a.diff(b) == {"w": {1: {"added": [[0, 2]], "removed": [[0, 1]]}}}


@pytest.mark.parametrize("data", [
    None, [], "plan", {}, {"format": "prunekern-graph"}, {"format": "prunekern-plan", "version": 99},
    {"format": "prunekern-plan", "version": 1}, {"format": "prunekern-plan", "version": 1, "graph": "g"},
    {"format": "prunekern-plan", "version": 1, "graph": "g", "kept": [1]},
    {"format": "prunekern-plan", "version": 1, "graph": "g", "kept": {"w": {"x": [0]}}},
    {"format": "prunekern-plan", "version": 1, "graph": "g", "kept": {"w": {"0": 3}}},
    {"format": "prunekern-plan", "version": 1, "graph": "g", "kept": {}, "costs": {"macs": [1]}},
])
def test_data_that_is_no_plan(data: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(data)


def test_text_says_what_is_kept(groups: Groups) -> None:
    text = str(keeping(groups, _0=[0, 1]))
    assert "0.weight[0]: keeps 2" in text
    assert "macs:" in text
    assert str(Plan("g", {"w": {1: [[0, 1], [2, 3]]}})).endswith("keeps 2 of each of 2 rows")


def test_plans_in_a_row_are_one(model: nn.Module, groups: Groups) -> None:
    """Pruned twice, and once as both plans together say: the same weights."""
    first = apply_plan(model, None, keeping(groups, _0=[1, 3, 5, 7], _2=[0, 2, 4]), groups=groups)
    inner = groups_of(first.model, torch.randn(2, 3, 8, 8))
    second = apply_plan(first.model, None, keeping(inner, _0=[0, 2], _2=[1]), groups=inner)
    together = compose(groups, first.plan, second.plan)
    assert together.kept["0.weight"] == {0: [1, 5]}
    assert together.kept["2.weight"] == {0: [2], 1: [1, 5]}
    once = apply_plan(model, None, together, groups=groups)
    for left, right in zip(once.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert together.costs["macs"] == (first.plan.costs["macs"][0], second.plan.costs["macs"][1])
