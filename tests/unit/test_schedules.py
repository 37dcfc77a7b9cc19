"""Schedules: how much each step takes, DropNet's loop with rewinding, one channel at a time; all survive a kill."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern import train as training
from prunekern.core.plan import Plan
from prunekern.errors import ArtefactError, InputError, TargetError, UnknownName
from prunekern.prune import rewind, schedule, single
from prunekern.prune.oneshot import apply_plan, groups_of
from prunekern.prune.rewind import dropnet
from prunekern.prune.single import Stage, one_at_a_time
from prunekern.prune.slice import choice_of, sliced_tensors
from prunekern.prune.target import Target
from tests.kills import Killed, kill_at
from tests.training import blobs, same

TRAIN, VALIDATE = blobs(96, 0), blobs(60, 1)
X = TRAIN[0][:4]


class Net(nn.Module):
    """Two hidden layers with batch norm and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.second, self.third, self.last = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x) + self.third(x)))


def initial() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net().eval()


def fit(model: nn.Module, **options: Any) -> training.History:
    settings = {"epochs": 2, "lr": 0.05, "batch_size": 16, "progress": False} | options
    return training.fit(model, TRAIN, **settings)


@pytest.fixture(scope="module")
def trained() -> Net:
    model = initial()
    fit(model, epochs=6)
    return model


def accuracy(model: nn.Module) -> float:
    return training.accuracy(model, VALIDATE)


# ---- how much each step takes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exponential", [0.2**0.25, 0.2**0.5, 0.2**0.75, 0.2]),
        ("linear", [0.8, 0.6, 0.4, 0.2]),
        ("cubic", [0.2 + 0.8 * (1 - t) ** 3 for t in (0.25, 0.5, 0.75, 1.0)]),
    ],
)
def test_what_remains_follows_the_schedule(trained: Net, name: str, expected: list[float]) -> None:
    seen: list[tuple[int, int]] = []

    def between(module: nn.Module, number: int, plan: Plan) -> dict[str, Any]:
        seen.append((number, sum(p.numel() for p in module.parameters())))
        assert sum(p.numel() for p in apply_plan(trained, X, plan).model.parameters()) == seen[-1][1]
        return {}

    groups = groups_of(trained, X)
    outcome = schedule.run(trained, groups, Target(params=0.2), steps=4, schedule=name, between=between)
    assert [step.shares["params"] for step in outcome.steps] == pytest.approx(expected)
    dense = sum(p.numel() for p in trained.parameters())
    for (number, left), share in zip(seen, expected, strict=True):
        assert left <= share * dense, number
        assert left > (share - 0.12) * dense, number
    assert outcome.plan.target["schedule"] == name
    assert outcome.steps[-1].shares["params"] == 0.2  # to the last digit


def test_one_step_is_one_shot(trained: Net) -> None:
    groups = groups_of(trained, X)
    found = [schedule.run(trained, groups, Target(macs=0.4), schedule=name).plan.kept for name in schedule.SCHEDULES]
    assert found[0] == found[1] == found[2]
    with pytest.raises(UnknownName, match="unknown schedule 'square'; known: cubic, exponential, linear"):
        schedule.run(trained, groups, Target(macs=0.4), schedule="square")


def test_a_checkpoint_of_another_schedule_is_refused(trained: Net, tmp_path: Path) -> None:
    groups = groups_of(trained, X)
    schedule.run(trained, groups, Target(macs=0.4), steps=2, schedule="cubic", checkpoint=tmp_path)
    with pytest.raises(ArtefactError, match="another run"):
        schedule.run(trained, groups, Target(macs=0.4), steps=2, schedule="linear", checkpoint=tmp_path)


def test_a_checkpoint_knows_what_is_inside_its_options(trained: Net) -> None:
    groups = groups_of(trained, X)
    some, others = (schedule.identity_of(trained, groups, None, {"reconstruct": {"passes": n}}) for n in (0, 16))
    assert some != others


def test_the_policy_holds_in_every_step(trained: Net) -> None:
    """Output features may leave: also in the second step, and the plan of all steps says which are left."""
    groups = groups_of(trained, X, policy={"outputs": True})
    outcome = schedule.run(trained, groups, Target(params=0.1), steps=2, criterion="l1")
    left = outcome.plan.outputs["0"][1]
    assert outcome.model(X).shape[1] == len(left) < 3
    again = apply_plan(trained, X, outcome.plan)
    assert same(again.model, outcome.model)
    torch.testing.assert_close(again.model(X), outcome.model(X))
    assert again.plan.outputs == outcome.plan.outputs


# ---- DropNet -------------------------------------------------------------------------------------------------


def run_dropnet(model: Net, start: Any = None, **options: Any) -> schedule.Outcome:
    settings: dict[str, Any] = {"train": lambda m, n, plan: {"loss": fit(m, seed=n).epochs[-1].loss},
                                "accuracy": accuracy, "fraction": 0.4, "kappa": 0.9, "cycles": 4,
                                "criterion": "activation", "calibrate": [TRAIN[0]],
                                "normalisation": "none", "reduction": "first"} | options
    return dropnet(model, groups_of(model, X), initial() if start is None else start, **settings)


@pytest.mark.parametrize("form", ["module", "state"])
def test_every_cycle_starts_with_exactly_the_initial_weights_sliced(trained: Net, form: str) -> None:
    first, before = initial(), copy.deepcopy(trained)
    seen: list[dict[str, Tensor]] = []

    def train(module: nn.Module, number: int, plan: Plan) -> dict[str, Any]:
        seen.append({name: value.clone() for name, value in module.state_dict().items()})
        fit(module)
        return {}

    outcome = run_dropnet(trained, first if form == "module" else first.state_dict(), train=train, kappa=0.3)
    assert len(outcome.steps) == len(seen) == 4
    groups = groups_of(first, X)
    expected = sliced_tensors(groups, choice_of(groups, outcome.plan), first.state_dict())
    for name, value in seen[-1].items():
        assert torch.equal(value, expected[name]), name
    assert same(trained, before)
    assert same(first, initial())
    widths = [len(state["first.weight"]) + len(state["second.weight"]) for state in seen]
    assert widths == sorted(widths, reverse=True)
    assert 28 > widths[0] > widths[-1]


def test_without_rewinding_the_trained_weights_go_on(trained: Net) -> None:
    seen: list[float] = []
    run_dropnet(trained, rewind=False, cycles=1, train=lambda m, n, plan: seen.append(accuracy(m)))
    again: list[float] = []
    run_dropnet(trained, cycles=1, train=lambda m, n, plan: again.append(accuracy(m)))
    assert seen[0] > 0.8 > again[0]


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_a_fraction_of_the_units_is_dropped(trained: Net, ranking: str) -> None:
    groups = groups_of(trained, X)
    plan, keep = rewind.drop(groups, 0.25, ranking=ranking)
    gone = [int((~keep[family.groups]).sum()) for family in groups]
    assert sum(gone) == 7  # of 16 + 12
    if ranking == "layer":
        assert gone == [4, 3]
    assert plan.target["ranking"] == ranking
    with pytest.raises(TargetError, match="known: 'global', 'layer'"):
        rewind.drop(groups, 0.25, ranking="random")


def test_it_stops_at_the_floor_and_keeps_the_last_network_above(trained: Net) -> None:
    """Accuracies as told: 1.0 for the original, then 0.95, 0.91, 0.90 (not above 0.9 * 1.0), which ends it."""
    told, networks = iter([1.0, 0.95, 0.91, 0.9]), []

    def measure(module: nn.Module) -> float:
        networks.append(copy.deepcopy(module))
        return next(told)

    outcome = run_dropnet(trained, accuracy=measure, kappa=0.9, cycles=10, fraction=0.2)
    assert [step.measured["accepted"] for step in outcome.steps] == [True, True, False]
    assert [step.measured["accuracy"] for step in outcome.steps] == [0.95, 0.91, 0.9]
    assert same(outcome.model, networks[2])
    assert outcome.plan.costs["params"] == (sum(p.numel() for p in trained.parameters()),
                                            sum(p.numel() for p in outcome.model.parameters()))


def test_where_no_cycle_is_good_enough_the_original_comes_back(trained: Net) -> None:
    told = iter([1.0, 0.1])
    outcome = run_dropnet(trained, accuracy=lambda m: next(told))
    assert same(outcome.model, trained)
    assert outcome.plan.kept == {}
    assert "no cycle kept enough accuracy: this is the original" in outcome.notes


def test_it_ends_where_nothing_is_left_to_drop(trained: Net) -> None:
    outcome = run_dropnet(trained, accuracy=lambda m: 1.0, fraction=0.9, cycles=50, train=lambda m, n, plan: None)
    assert len(outcome.steps) < 10
    assert any("nothing was left to drop" in note for note in outcome.notes)
    assert outcome.model.first.out_features == outcome.model.second.out_features == 1


def killable_dropnet(model: Net, folder: Path | None, cycles: list[int]) -> schedule.Outcome:
    def train(module: nn.Module, number: int, plan: Plan) -> dict[str, Any]:
        cycles.append(number)
        return {"loss": fit(module, epochs=1, seed=number).epochs[-1].loss}
    return run_dropnet(model, checkpoint=folder, train=train, kappa=0.3, cycles=3)


@pytest.fixture(scope="module")
def whole_dropnet(trained: Net) -> schedule.Outcome:
    return killable_dropnet(trained, None, [])


@pytest.mark.parametrize("moment", [0, 2])
@pytest.mark.parametrize(("target", "name", "after"), [
    (rewind, "shrink", False), (schedule, "write_bytes", True), (schedule, "write_text", False),
    (schedule, "write_text", True)])
def test_killed_dropnet_goes_on(trained: Net, whole_dropnet: schedule.Outcome, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch, target: Any, name: str, after: bool,
                                moment: int) -> None:
    cycles: list[int] = []
    kill_at(target, name, moment, monkeypatch, after)
    with pytest.raises(Killed):
        killable_dropnet(trained, tmp_path, cycles)
    monkeypatch.undo()
    again = killable_dropnet(trained, tmp_path, cycles)
    assert len(cycles) <= len(whole_dropnet.steps) + 1  # at most the cycle that was killed is trained again
    assert again.plan.kept == whole_dropnet.plan.kept
    assert [step.measured for step in again.steps] == [step.measured for step in whole_dropnet.steps]
    assert same(again.model, whole_dropnet.model)
    cycles.clear()
    assert same(killable_dropnet(trained, tmp_path, cycles).model, whole_dropnet.model)
    assert cycles == []  # a finished checkpoint gives its result at once


def test_a_rejected_cycle_is_not_trained_again(trained: Net, tmp_path: Path) -> None:
    def run(told: Any) -> schedule.Outcome:
        return run_dropnet(trained, accuracy=lambda m: next(told), checkpoint=tmp_path)

    first = run(iter([1.0, 0.95, 0.1]))
    again = run(iter([]))
    assert same(first.model, again.model)
    assert [step.measured["accepted"] for step in again.steps] == [True, False]


def test_a_dropnet_checkpoint_belongs_to_its_initial_weights(trained: Net, tmp_path: Path) -> None:
    run_dropnet(trained, checkpoint=tmp_path, cycles=1)
    with pytest.raises(ArtefactError, match="another run"):
        run_dropnet(trained, Net().eval(), checkpoint=tmp_path, cycles=1)


def test_early_weights_are_taken_along_the_way(tmp_path: Path) -> None:
    """Rewinding to the weights after an epoch: noted during training, also when that was killed later on."""
    model, short = initial(), initial()
    early = training.Snapshot(tmp_path / "early", 1)
    fit(short, epochs=1, schedule="constant")
    count = iter(range(9))

    def kill(_: nn.Module) -> None:
        if next(count, None) is None:
            raise Killed

    with pytest.raises(Killed):
        fit(model, epochs=3, schedule="constant", after_epoch=early, before_step=kill, checkpoint=tmp_path / "run")
    model = initial()
    fit(model, epochs=3, schedule="constant", after_epoch=early, checkpoint=tmp_path / "run")
    assert all(torch.equal(value, short.state_dict()[name]) for name, value in early.state().items())
    assert not same(model, short)
    outcome = run_dropnet(model, early.state(), cycles=1, kappa=0.1, train=lambda m, n, plan: None)
    kept = outcome.plan.kept["first.weight"][0]
    assert torch.equal(outcome.model.first.weight, short.first.weight[kept])
    with pytest.raises(ArtefactError, match="no such file"):
        training.Snapshot(tmp_path / "nothing", 1).state()


@pytest.mark.parametrize("wrong", [{"fraction": 0}, {"fraction": 1.0}, {"kappa": 0}, {"cycles": 0}], ids=str)
def test_settings_of_dropnet_are_checked(trained: Net, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="fraction="):
        run_dropnet(trained, **wrong)
    with pytest.raises(ArtefactError, match="do not fit the model"):
        run_dropnet(trained, {"first.weight": torch.zeros(3)})


# ---- one channel at a time -----------------------------------------------------------------------------------


def run_single(model: Net, stages: Any = ("first", "second"), **options: Any) -> schedule.Outcome:
    settings: dict[str, Any] = {"train": lambda m, n, plan: fit(m, epochs=1, seed=n), "accuracy": accuracy,
                                "limit": 3.0} | options
    return one_at_a_time(model, groups_of(model, X), stages, **settings)


def test_channels_leave_one_by_one_with_their_triplets(trained: Net) -> None:
    networks: list[tuple[nn.Module, int]] = []

    def train(module: nn.Module, number: int, plan: Plan) -> None:
        networks.append((copy.deepcopy(module), number))
        fit(module, epochs=1, seed=number)

    outcome = run_single(trained, train=train)
    assert [number for _, number in networks] == list(range(1, len(outcome.steps) + 1))
    current, widths = accuracy(trained), {"first": 16, "second": 12}
    for step, (module, _) in zip(outcome.steps, networks, strict=True):
        found = step.measured
        assert found["before"] == current  # a step that was undone is not built upon
        assert found["after_pruning"] == accuracy(module)
        assert found["drop"] == pytest.approx(100 * (found["before"] - found["after_retraining"]))
        assert found["accepted"] == (found["drop"] <= 3.0 + 1e-9)
        assert getattr(module, found["stage"]).out_features == widths[found["stage"]] - 1
        if found["accepted"]:
            current = found["after_retraining"]
            widths[found["stage"]] -= 1
    assert accuracy(outcome.model) == current
    assert {name: getattr(outcome.model, name).out_features for name in widths} == widths
    assert widths["first"] < 16


def test_a_stage_ends_with_the_first_step_that_costs_too_much(trained: Net) -> None:
    # The original; then after pruning and after retraining of each step.
    told = iter([0.9, 0.8, 0.9, 0.8, 0.889, 0.7, 0.85])
    outcome = run_single(trained, accuracy=lambda m: next(told), limit=1.0, train=lambda m, n, plan: None)
    found = [(s.measured["stage"], s.measured["accepted"], round(s.measured["drop"], 6)) for s in outcome.steps]
    assert found == [("first", True, 0.0), ("first", False, 1.1), ("second", False, 5.0)]
    assert outcome.steps[2].measured["before"] == 0.9


def test_exactly_the_limit_is_not_too_much() -> None:
    assert not single.exceeded(100 * (0.9 - 0.89), 1.0)
    assert single.exceeded(1.001, 1.0)


def test_the_last_channel_stays_and_several_may_go_at_once(trained: Net) -> None:
    outcome = run_single(trained, [Stage("first", per_step=6, criterion="l1", name="wide")], limit=100.0,
                         train=lambda m, n, plan: None)
    assert [step.measured["stage"] for step in outcome.steps] == ["wide"] * 3
    assert outcome.model.first.out_features == 1  # 16 - 6 - 6 - 3
    assert {step.costs["params"][0] for step in outcome.steps} == {sum(p.numel() for p in trained.parameters())}


def test_by_default_every_family_has_its_turn(trained: Net) -> None:
    outcome = run_single(trained, None, limit=-1.0, train=lambda m, n, plan: None, accuracy=lambda m: 1.0)
    assert [step.measured["stage"] for step in outcome.steps] == ["first", "second"]
    assert "no step was accepted: this is the original" in outcome.notes
    assert same(outcome.model, trained)


def test_a_layer_that_is_none_is_refused(trained: Net) -> None:
    for stages, says in ((("fourth",), "must name one layer, it names 0: first, second"),
                         ((Stage("first", per_step=0),), "per_step=0")):
        with pytest.raises(TargetError, match=says):
            run_single(trained, stages)
    with pytest.raises(InputError, match="stages is empty"):
        run_single(trained, ())
    with pytest.raises(TargetError, match="matches no layer"):
        run_single(trained, ignore=("fourth",))


@pytest.fixture(scope="module")
def whole_single(trained: Net) -> schedule.Outcome:
    return killable_single(trained, None, [])


def killable_single(model: Net, folder: Path | None, steps: list[int]) -> schedule.Outcome:
    def train(module: nn.Module, number: int, plan: Plan) -> None:
        steps.append(number)
        fit(module, epochs=1, seed=number)
    return run_single(model, [Stage("first", per_step=6), Stage("second", per_step=6)], limit=20.0, train=train,
                      checkpoint=folder)


@pytest.mark.parametrize("moment", [0, 2])
@pytest.mark.parametrize(("name", "after"), [("prune", False), ("write_bytes", True), ("write_text", False),
                                             ("write_text", True)])
def test_killed_single_steps_go_on(trained: Net, whole_single: schedule.Outcome, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch, name: str, after: bool, moment: int) -> None:
    steps: list[int] = []
    kill_at(single, name, moment, monkeypatch, after)
    with pytest.raises(Killed):
        killable_single(trained, tmp_path, steps)
    monkeypatch.undo()
    again = killable_single(trained, tmp_path, steps)
    assert len(steps) <= len(whole_single.steps) + 1  # at most the step that was killed is taken again
    assert [step.measured for step in again.steps] == [step.measured for step in whole_single.steps]
    assert again.plan.kept == whole_single.plan.kept
    assert same(again.model, whole_single.model)
    (tmp_path / "0001" / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="damaged"):
        killable_single(trained, tmp_path, steps)


def test_a_checkpoint_of_single_steps_belongs_to_its_settings(trained: Net, tmp_path: Path) -> None:
    run_single(trained, [Stage("first", per_step=8)], checkpoint=tmp_path)
    with pytest.raises(ArtefactError, match="another run"):
        run_single(trained, [Stage("first", per_step=7)], checkpoint=tmp_path)
