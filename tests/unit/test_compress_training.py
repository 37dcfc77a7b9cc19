"""``compress`` with schedules, sparse training, distillation and rewinding."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern import train as training
from prunekern.errors import InputError, TargetError, UnknownName
from tests.kills import Killed
from tests.training import blobs, same

TRAIN, VALIDATE = blobs(96, 0), blobs(60, 1)
X = TRAIN[0][:4]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.second, self.last = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.last(torch.relu(self.second(torch.relu(self.norm(self.first(x))))))


def initial() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net().eval()


@pytest.fixture(scope="module")
def trained() -> Net:
    model = initial()
    training.fit(model, TRAIN, epochs=8, lr=0.05, batch_size=16, progress=False)
    del model.seen
    return model


FIT = {"epochs": 2, "lr": 0.05, "batch_size": 16}


def compress(model: Net, **options: Any) -> pk.Result:
    settings: dict[str, Any] = {"train": TRAIN, "validate": VALIDATE, "lower": False, "fit": FIT} | options
    return pk.compress(model, X, **settings)


def killer(moment: int) -> Any:
    calls = itertools.count()

    def hook(*_: Any) -> None:
        if next(calls) == moment:
            raise Killed

    return hook


def test_the_schedule_is_followed(trained: Net) -> None:
    cubic = compress(trained, target=pk.Target(params=0.3), steps=2, schedule="cubic", train=None)
    assert cubic.steps[0].shares["params"] == pytest.approx(0.3 + 0.7 / 8)
    with pytest.raises(UnknownName, match="known: cubic"):
        compress(trained, schedule="square")


# ---- distillation --------------------------------------------------------------------------------------------


def test_the_original_teaches_by_default_also_without_labels(trained: Net) -> None:
    result = compress(trained, train=TRAIN[0], fit={**FIT, "epochs": 6, "distil": {"layers": ["first", "norm"]}},
                      target=pk.Target(macs=0.3), steps=2)
    assert result.metrics["validation accuracy, compressed"] > 0.9
    assert not trained.first._forward_hooks


def test_what_is_taught_are_the_channels_that_are_left(trained: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = training.fit

    @functools.wraps(real)
    def spy(model: nn.Module, *args: Any, **options: Any) -> Any:
        seen.append((model.first.weight.detach().clone(), options["distil"].kept["first"][1], options["teacher"]))
        return real(model, *args, **options)

    monkeypatch.setattr(training, "fit", spy)
    compress(trained, fit={**FIT, "distil": {"layers": ["first"]}, "epochs": 0}, target=pk.Target(macs=0.3), steps=2)
    assert len(seen) == 2
    for weight, kept, teacher in seen:
        assert torch.equal(weight, trained.first.weight[kept])
        assert torch.equal(teacher.first.weight, trained.first.weight)


def test_another_teacher_and_none(trained: Net) -> None:
    other = initial()
    plain, taught, untaught = (
        compress(trained, fit={**FIT, **extra}).model for extra in ({}, {"teacher": other}, {"distil": False}))
    assert same(plain, untaught)
    assert not same(plain, taught)


def test_early_stopping_looks_at_the_validation_data(trained: Net) -> None:
    result = compress(trained, fit={**FIT, "epochs": 5, "patience": 1})
    assert result.metrics["validation accuracy, compressed"] > 0.8
    with pytest.raises(InputError, match="need validate= as data"):
        compress(trained, fit={**FIT, "patience": 1}, validate=lambda model: 1.0)


# ---- sparse training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [
    {"method": "group-lasso", "strength": 0.01, "epochs": 25}, {"method": "growing", "step": 0.05, "every": 2,
                                                                "epochs": 25},
    {"method": "soft", "epochs": 5}], ids=lambda asked: asked["method"])
def test_after_sparse_training_a_cut_costs_nothing(trained: Net, asked: dict[str, Any]) -> None:
    before = copy.deepcopy(trained)
    options = {"fit": {"epochs": 0}, "target": pk.Target(layers={"first": 0.5}), "criterion": "l2"}
    sparse = compress(trained, sparse={**asked, "lr": 0.05, "batch_size": 16}, **options)
    plain = compress(trained, **options)
    assert same(trained, before)
    assert sparse.model.first.out_features == plain.model.first.out_features == 8
    assert sparse.metrics["validation accuracy, compressed"] > 0.95
    assert not torch.equal(sparse.model.first.weight, plain.model.first.weight)
    assert sparse.metrics["validation accuracy, original"] == training.accuracy(trained, VALIDATE)


@pytest.mark.parametrize("method", ["growing", "soft"])
def test_what_was_chosen_is_what_goes(trained: Net, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made while training, not by another look afterwards."""
    from prunekern.train import sparsify

    plans: list[Any] = []
    real = sparsify.METHODS[method].chosen
    monkeypatch.setattr(sparsify.METHODS[method], "chosen", lambda self: plans.append(real(self)) or plans[-1])
    result = compress(trained, sparse={"method": method, "epochs": 2}, criterion="random", fit={"epochs": 0})
    assert result.plan.kept == plans[0].kept


def test_sparse_training_may_be_followed_by_steps(trained: Net) -> None:
    result = compress(trained, sparse={"strength": 0.01, "epochs": 2}, steps=2, target=pk.Target(macs=0.4))
    assert [step.number for step in result.steps] == [1, 2]


@pytest.mark.parametrize("method", ["growing", "soft", "group-lasso"])
def test_weights_are_refitted_after_sparse_training(trained: Net, method: str) -> None:
    result = compress(trained, sparse={"method": method, "epochs": 1}, calibrate=TRAIN[0], fit={"epochs": 0})
    assert any("weights refitted" in note for note in result.notes)


@pytest.mark.parametrize("moment", [2, 9, 14])
def test_sparse_training_that_was_killed_goes_on(trained: Net, tmp_path: Path, moment: int) -> None:
    def run(folder: Path, hook: Any = None) -> pk.Result:
        return compress(trained, sparse={"method": "soft", "epochs": 3, "batch_size": 16, "before_step": hook},
                        checkpoint=folder)

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parted", killer(moment))
    counted: list[int] = []
    again = run(tmp_path / "parted", lambda model: counted.append(1))
    assert len(counted) == 18 - moment // 6 * 6
    assert again.plan.kept == whole.plan.kept
    assert same(again.model, whole.model)


@pytest.mark.parametrize(("options", "error", "says"), [
    ({"sparse": {"method": "ridge"}}, UnknownName, "known: group-lasso, growing, soft"),
    ({"sparse": {"method": "soft", "strength": 1}}, InputError, "'strength': ...} is no option of 'soft' \\(every\\)"),
    ({"sparse": {}, "train": None}, InputError, "needs train= as data"),
    ({"sparse": {"method": "soft"}, "steps": 2}, TargetError, "chooses what is to go"),
    ({"rewind": {"initial": initial()}, "target": pk.Target(macs=0.5)}, TargetError, "do not combine"),
    ({"rewind": {"fraction": 0.1}}, InputError, "the weights to go back to"),
    ({"rewind": {"initial": initial()}, "validate": None}, InputError, "needs train=, validate="),
], ids=str)
def test_phases_that_do_not_go_together_are_refused(trained: Net, options: dict[str, Any], error: type[Exception],
                                                    says: str) -> None:
    with pytest.raises(error, match=says):
        compress(trained, **options)


# ---- rewinding -----------------------------------------------------------------------------------------------


def test_rewinding_gives_a_result(trained: Net, tmp_path: Path) -> None:
    asked = {"initial": initial().state_dict(), "fraction": 0.3, "kappa": 0.8, "cycles": 3}
    result = compress(trained, rewind=asked, criterion="dropnet:minimum", fit={**FIT, "epochs": 4}, lower=True,
                      checkpoint=tmp_path / "run")
    assert 1 <= len(result.steps) <= 3
    assert result.metrics["validation accuracy, compressed"] > 0.8 * result.metrics["validation accuracy, original"]
    macs = [step.costs["macs"][1] for step in result.steps]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] == result.plan.costs["macs"][1] < result.plan.costs["macs"][0]
    result.save(tmp_path / "saved")
    assert same(pk.load(tmp_path / "saved", model=Net()).model, result.model)
    again = compress(trained, rewind=asked, criterion="dropnet:minimum", fit={**FIT, "epochs": 4},
                     checkpoint=tmp_path / "run")
    assert same(again.model, result.model)


def test_rewinding_that_fails_at_once_says_so(trained: Net) -> None:
    with pytest.raises(TargetError, match="cycle 1 fell to"):
        compress(trained, rewind={"initial": initial(), "fraction": 0.9, "kappa": 1.0}, fit={"epochs": 0})


@pytest.mark.parametrize("moment", [7, 25])
def test_rewinding_killed_in_the_middle_of_training_goes_on(trained: Net, tmp_path: Path, moment: int) -> None:
    asked = {"initial": initial().state_dict(), "fraction": 0.3, "kappa": 0.5, "cycles": 2}

    def run(folder: Path, hook: Any = None) -> pk.Result:
        return compress(trained, rewind=asked, checkpoint=folder, fit={**FIT, "epochs": 3, "before_step": hook})

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parted", killer(moment))
    counted: list[int] = []
    again = run(tmp_path / "parted", lambda model: counted.append(1))
    assert len(counted) == 36 - moment // 6 * 6  # whole epochs are not trained twice
    assert same(again.model, whole.model)
