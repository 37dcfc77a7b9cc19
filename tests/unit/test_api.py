"""compress from end to end: every kind of target, training, resuming, custom parts, inputs in every spelling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern import train as training
from prunekern.api import EXAMPLE_ROWS
from prunekern.prune import schedule
from prunekern.prune.edit import edit_plan
from prunekern.prune.importance import Evidence
from tests.identity import snapshot
from tests.kills import Killed, kill_at
from tests.training import blobs


class Blob(nn.Module):
    """A perceptron with batch norm on 8 numbers, for three classes."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x)))


class Chatty(Blob):
    """Leaves traces of every forward on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[Any] = []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.features = x * 2
        self.seen.append(x)
        self.count.add_(1)
        return super().forward(x)


class Pair(nn.Module):
    """Two inputs, by position or by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 10), nn.Linear(6, 10), nn.Linear(10, 2)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.last(torch.relu(self.left(left) + self.right(right) * scale))}


TRAIN, VALIDATE, TEST = blobs(96, 0), blobs(60, 1), blobs(60, 2)
X = TRAIN[0][:4]


@pytest.fixture(scope="module")
def trained() -> Blob:
    torch.manual_seed(3)
    model = Blob()
    training.fit(model, TRAIN, epochs=12, lr=0.05, batch_size=16, progress=False)
    model.eval()
    assert training.accuracy(model, VALIDATE) > 0.9
    return model


@pytest.fixture
def untouched(trained: Blob) -> Iterator[Blob]:
    """The trained model, which the test must leave bit-identical."""
    before = snapshot(trained)
    yield trained
    assert snapshot(trained) == before


def share(result: pk.Result, what: str) -> float:
    before, after = result.plan.costs[what]
    return after / before


# ---- targets -------------------------------------------------------------------------------------------------


def test_default_is_half_of_the_macs(untouched: Blob) -> None:
    result = pk.compress(untouched, X)
    assert 0.45 < share(result, "macs") <= 0.5
    assert type(result.model) is Blob
    assert result.form == "class"
    assert result.plan.costs["macs"][1] == pk.profile(result.model, X[:1]).macs
    assert result.plan.costs["params"][1] == sum(p.numel() for p in result.model.parameters())
    assert result.proof is not None
    assert max(result.proof.twin_error, result.proof.real_error) <= result.proof.limit
    with torch.no_grad():
        assert torch.allclose(result.lowered(X), result.model(X), atol=1e-5)


@pytest.mark.parametrize("what", ["macs", "params", "bytes"])
@pytest.mark.parametrize("wanted", [0.3, 0.7])
def test_shares(untouched: Blob, what: str, wanted: float) -> None:
    result = pk.compress(untouched, X, pk.Target(**{what: wanted}), lower=False)
    assert wanted - 0.06 < share(result, what) <= wanted
    assert result.lowered is None


def test_shares_combine(untouched: Blob) -> None:
    result = pk.compress(untouched, X, pk.Target(macs=0.9, params=0.4, bytes=0.8), lower=False)
    assert share(result, "params") <= 0.4
    assert share(result, "macs") <= 0.9
    assert result.plan.target == {**result.plan.target, "macs": 0.9, "params": 0.4, "bytes": 0.8}


def test_layers(untouched: Blob) -> None:
    result = pk.compress(untouched, X, pk.Target(layers={"first": 0.5, "sec*": 0.25}), lower=False)
    assert (result.model.first.out_features, result.model.second.out_features) == (12, 6)
    assert result.model.norm.num_features == 12


def test_layers_and_share(untouched: Blob) -> None:
    result = pk.compress(untouched, X, pk.Target(layers={"first": 0.75}, macs=0.5), lower=False)
    assert result.model.first.out_features <= 18
    assert share(result, "macs") <= 0.5


def test_one_channel(untouched: Blob) -> None:
    result = pk.compress(untouched, X, pk.Target(one="second"), lower=False)
    assert (result.model.first.out_features, result.model.second.out_features) == (24, 23)


def test_ignore_and_round_to(untouched: Blob) -> None:
    result = pk.compress(untouched, X, pk.Target(macs=0.6), ignore=["first"], round_to=4, lower=False)
    assert result.model.first.out_features == 24
    assert result.model.second.out_features % 4 == 0
    assert result.model.second.out_features < 24


def test_layer_ranking_takes_the_same_share_everywhere(untouched: Blob) -> None:
    result = pk.compress(untouched, X, pk.Target(macs=0.4), ranking="layer", lower=False)
    assert abs(result.model.first.out_features - result.model.second.out_features) <= 1


def test_max_drop_finds_the_smallest_that_keeps_it(untouched: Blob) -> None:
    dense = training.accuracy(untouched, VALIDATE)
    result = pk.compress(untouched, X, pk.Target(max_drop=3), validate=VALIDATE, test=TEST, lower=False)
    kept = training.accuracy(result.model, VALIDATE)
    assert kept >= dense - 0.03
    assert share(result, "macs") < 0.9
    assert result.metrics == {
        "validation accuracy, original": dense, "validation accuracy, compressed": kept,
        "test accuracy, original": training.accuracy(untouched, TEST),
        "test accuracy, compressed": training.accuracy(result.model, TEST)}
    assert any("bisected" in note for note in result.notes)


def test_accuracy_is_absolute(untouched: Blob) -> None:
    result = pk.compress(untouched, X, pk.Target(accuracy=0.6), validate=VALIDATE, lower=False)
    assert training.accuracy(result.model, VALIDATE) >= 0.6
    looser = pk.compress(untouched, X, pk.Target(accuracy=0.4), validate=VALIDATE, lower=False)
    assert looser.plan.costs["macs"][1] <= result.plan.costs["macs"][1]


def test_share_with_accuracy_as_a_floor(untouched: Blob) -> None:
    result = pk.compress(untouched, X, pk.Target(macs=0.8, accuracy=0.5), validate=VALIDATE, lower=False)
    assert 0.7 < share(result, "macs") <= 0.8
    assert result.plan.target["accuracy"] == 0.5


# ---- the choice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["l1", "fpgm", "taylor", "activation", "apoz", "random"])
def test_criteria(untouched: Blob, criterion: str) -> None:
    result = pk.compress(untouched, X, pk.Target(macs=0.5), criterion=criterion, calibrate=VALIDATE, lower=False)
    assert share(result, "macs") <= 0.5
    assert result.plan.target["criterion"] == criterion


def test_custom_criterion(untouched: Blob) -> None:
    """The highest scores stay, whatever the weights say."""
    def last_ones(evidence: Evidence) -> Iterator[tuple[Tensor, Tensor]]:
        for family in evidence.groups:
            yield family.groups, torch.arange(family.channels, dtype=torch.float64)
    result = pk.compress(untouched, X, pk.Target(layers={"*": 0.5}), criterion=last_ones, lower=False)
    assert result.plan.kept["first.weight"][0] == list(range(12, 24))
    assert result.plan.target["criterion"] == "last_ones"
    least = pk.compress(untouched, X, pk.Target(layers={"*": 0.5}), criterion=last_ones, direction="maximum",
                        lower=False)
    assert least.plan.kept["first.weight"][0] == list(range(12))


def test_seed_is_all_that_random_depends_on(untouched: Blob) -> None:
    def kept(seed: int) -> Any:
        torch.manual_seed(torch.randint(1 << 30, ()).item())
        return pk.compress(untouched, X, criterion="random", seed=seed, lower=False).plan.kept
    assert kept(1) == kept(1) != kept(2)


# ---- plans ---------------------------------------------------------------------------------------------------


def test_given_plan(untouched: Blob) -> None:
    groups = pk.groups_of(untouched, X)
    plan = edit_plan(groups, remove={"first": [0, 3], "second": [23]})
    result = pk.compress(untouched, X, plan=plan)
    assert (result.model.first.out_features, result.model.second.out_features) == (22, 23)
    assert result.plan.kept["second.weight"] == {0: list(range(23)), 1: [1, 2, *range(4, 24)]}
    torch.testing.assert_close(result.model.first.weight, untouched.first.weight[[1, 2, *range(4, 24)]])
    assert result.plan.costs == pk.apply_plan(untouched, X, plan).plan.costs
    assert len(result.steps) == 1


def test_given_plan_with_training(untouched: Blob) -> None:
    plan = edit_plan(pk.groups_of(untouched, X), remove={"first": range(12)})
    result = pk.compress(untouched, plan=plan, train=TRAIN, validate=VALIDATE, fit={"epochs": 2})
    measured = result.steps[0].measured
    assert measured["accuracy"] == training.accuracy(result.model, VALIDATE)
    assert {"accuracy before training", "loss"} < measured.keys()


def test_groups_can_be_listed_printed_and_edited(untouched: Blob) -> None:
    groups = pk.groups_of(untouched, X)
    assert str(groups) == (
        "first: 24 channels: first.weight[0], first.bias[0], norm.weight[0], norm.bias[0],\n"
        "    norm.running_mean[0], norm.running_var[0], second.weight[1]\n"
        "second: 24 channels: second.weight[0], second.bias[0], last.weight[1]")
    automatic = pk.prune(untouched, X, pk.Target(layers={"*": 0.5})).plan
    gone = sorted(set(range(24)) - set(automatic.kept["first.weight"][0]))
    first_left = automatic.kept["second.weight"][0][0]
    edited = edit_plan(groups, automatic, keep={"first": gone[:2]}, remove={"second": [first_left]})
    pruned = pk.apply_plan(untouched, X, edited)
    assert (pruned.model.first.out_features, pruned.model.second.out_features) == (14, 11)
    assert set(gone[:2]) <= set(edited.kept["first.weight"][0])
    assert automatic.diff(edited)["first.weight"][0] == {"added": gone[:2], "removed": []}


# ---- steps and training --------------------------------------------------------------------------------------


def test_steps_with_training(untouched: Blob) -> None:
    result = pk.compress(untouched, target=pk.Target(macs=0.25), train=TRAIN, validate=VALIDATE, steps=3,
                         fit={"epochs": 2, "lr": 0.05, "batch_size": 16}, lower=False)
    shares = [step.costs["macs"][1] / step.costs["macs"][0] for step in result.steps]
    assert [step.number for step in result.steps] == [1, 2, 3]
    assert all(low <= high for low, high in zip(shares, [0.25 ** (n / 3) for n in (1, 2, 3)], strict=True))
    assert shares == sorted(shares, reverse=True)
    assert share(result, "macs") == shares[-1] <= 0.25
    assert training.accuracy(result.model, VALIDATE) == result.steps[-1].measured["accuracy"] > 0.8
    # The plan is of the original: it leads to the same shapes at once.
    again = pk.apply_plan(untouched, X, result.plan)
    assert {n: t.shape for n, t in again.model.state_dict().items()} == {
        n: t.shape for n, t in result.model.state_dict().items()}


def test_training_is_what_moves_the_weights(untouched: Blob) -> None:
    cut, tuned = (pk.compress(untouched, X, train=data, fit={"epochs": 1}, lower=False) for data in (None, TRAIN))
    assert cut.plan.kept == tuned.plan.kept
    assert not torch.equal(cut.model.last.weight, tuned.model.last.weight)


def test_the_same_call_gives_the_same_network(untouched: Blob) -> None:
    first, second = (pk.compress(untouched, train=TRAIN, steps=2, fit={"epochs": 1}, seed=5, lower=False)
                     for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(),
                                                 second.model.state_dict().values(), strict=True))


def test_own_training_function(untouched: Blob) -> None:
    trained_modules = []

    def own(module: nn.Module) -> None:
        trained_modules.append(module)
        with torch.no_grad():
            module.last.bias.fill_(7.0)
    result = pk.compress(untouched, X, train=own, steps=2, lower=False)
    assert len(trained_modules) == 2
    assert bool((result.model.last.bias == 7).all())


def test_custom_evaluator(untouched: Blob) -> None:
    asked: list[int] = []

    def evaluate(module: nn.Module) -> float:
        asked.append(module.first.out_features)
        return 0.9 if module.first.out_features >= 12 else 0.5
    result = pk.compress(untouched, X, pk.Target(accuracy=0.8), validate=evaluate, test=lambda module: 1, lower=False)
    assert result.model.first.out_features >= 12
    assert len(set(asked)) > 2
    assert result.metrics["test accuracy, compressed"] == 1.0


@pytest.mark.parametrize("value", [None, "good", torch.tensor(0.5)], ids=str)
def test_evaluator_that_returns_no_number(untouched: Blob, value: Any) -> None:
    with pytest.raises(pk.api.InputError, match="evaluator returned"):
        pk.compress(untouched, X, validate=lambda module: value)


def test_recalibration(untouched: Blob) -> None:
    """Statistics are those of the calibration data in the pruned network, to the letter."""
    data = VALIDATE[0] + 2
    plain, again = (pk.compress(untouched, X, pk.Target(macs=0.5), calibrate=data, recalibrate=wanted, lower=False)
                    for wanted in (False, True))
    assert torch.equal(plain.model.first.weight, again.model.first.weight)
    before_norm = again.model.first(data)
    torch.testing.assert_close(again.model.norm.running_mean, before_norm.mean(0))
    torch.testing.assert_close(again.model.norm.running_var, before_norm.var(0))
    assert not torch.allclose(plain.model.norm.running_mean, again.model.norm.running_mean, atol=1e-2)


def test_recalibration_on_training_data(untouched: Blob) -> None:
    result = pk.compress(untouched, train=(TRAIN[0] + 2, TRAIN[1]), fit={"epochs": 0}, recalibrate=True, lower=False)
    assert not torch.allclose(result.model.norm.running_mean,
                              untouched.norm.running_mean[result.plan.kept["norm.weight"][0]], atol=1e-2)


# ---- kills ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(6))
@pytest.mark.parametrize(("name", "after"), [("prune", False), ("prune", True), ("write_bytes", False),
                                             ("write_bytes", True), ("write_text", False), ("write_text", True)])
def test_killed_run_goes_on(untouched: Blob, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, name: str, after: bool,
                            moment: int) -> None:
    def run(folder: Any) -> pk.Result:
        return pk.compress(untouched, target=pk.Target(macs=0.3), train=TRAIN, validate=VALIDATE, steps=3,
                           fit={"epochs": 1, "batch_size": 16}, checkpoint=folder, lower=False)
    whole = run(tmp_path / "whole")
    kill_at(schedule, name, moment, monkeypatch, after)
    try:
        run(tmp_path / "killed")
    except Killed:
        pass
    else:
        assert moment >= 3, "it should have been killed"
    monkeypatch.undo()
    again = run(tmp_path / "killed")
    assert again.plan.kept == whole.plan.kept
    assert [step.measured for step in again.steps] == [step.measured for step in whole.steps]
    for name_, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name_], tensor), name_


@pytest.mark.parametrize("moment", [0, 5, 6, 13, 20, 30])
def test_run_killed_in_the_middle_of_training_goes_on(untouched: Blob, tmp_path: Any, moment: int) -> None:
    batches: list[int] = []

    def run(folder: Any, last: int | None) -> pk.Result:
        def before_step(_: nn.Module) -> None:
            batches.append(len(batches))
            if len(batches) - 1 == last:
                raise Killed
        batches.clear()
        return pk.compress(untouched, target=pk.Target(macs=0.4), train=TRAIN, steps=2, checkpoint=folder, lower=False,
                           fit={"epochs": 3, "batch_size": 16, "before_step": before_step})
    whole = run(tmp_path / "whole", None)
    assert len(batches) == 2 * 3 * 6
    with pytest.raises(Killed):
        run(tmp_path / "killed", moment)
    again = run(tmp_path / "killed", None)
    assert len(batches) == 36 - moment // 6 * 6          # whole epochs are not trained twice
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(),
                                                 again.model.state_dict().values(), strict=True))


def test_finished_checkpoint_gives_its_result_at_once(untouched: Blob, tmp_path: Any) -> None:
    def run() -> tuple[pk.Result, list[str]]:
        told: list[str] = []
        result = pk.compress(untouched, train=TRAIN, steps=2, fit={"epochs": 1}, checkpoint=tmp_path, lower=False,
                             tell=told.append)
        return result, told
    first, told_first = run()
    second, told_second = run()
    assert [line for line in told_first if "step" in line] == [
        "step 1/2: prune", "step 1/2: train", "step 2/2: prune", "step 2/2: train"]
    assert not [line for line in told_second if "step" in line]
    assert torch.equal(first.model.last.weight, second.model.last.weight)


def test_checkpoint_of_another_run_is_refused(untouched: Blob, tmp_path: Any) -> None:
    pk.compress(untouched, X, pk.Target(macs=0.5), checkpoint=tmp_path, lower=False)
    with pytest.raises(pk.result.ArtefactError, match="another run"):
        pk.compress(untouched, X, pk.Target(macs=0.4), checkpoint=tmp_path, lower=False)


# ---- inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [
    (torch.randn(3, 4), torch.randn(3, 6)), {"left": torch.randn(3, 4), "right": torch.randn(3, 6)},
    {"right": torch.randn(1, 6), "left": torch.randn(1, 4), "scale": 0.5}], ids=["tuple", "dict", "number"])
def test_inputs_in_every_spelling(inputs: Any) -> None:
    torch.manual_seed(0)
    model = Pair().eval()
    before = snapshot(model)
    result = pk.compress(model, inputs, pk.Target(macs=0.5))
    assert snapshot(model) == before
    assert share(result, "macs") <= 0.5
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with torch.no_grad():
        torch.testing.assert_close(result.lowered(*args, **kwargs)["logits"], result.model(*args, **kwargs)["logits"],
                                   atol=1e-5, rtol=1e-4)


def test_inferred_inputs_are_said(untouched: Blob) -> None:
    result = pk.compress(untouched)
    assert any("inferred from the first layer" in note and "(2, 8)" in note for note in result.notes)


@pytest.mark.parametrize("source", ["train", "validate", "test", "calibrate"])
@pytest.mark.parametrize("form", [tuple, lambda pair: [pair], lambda pair: torch.utils.data.TensorDataset(*pair),
                                  lambda pair: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), 16)],
                         ids=["tensors", "list", "dataset", "loader"])
def test_inputs_come_from_data(untouched: Blob, source: str, form: Callable[[Any], Any]) -> None:
    result = pk.compress(untouched, **{source: form(TRAIN)}, fit={"epochs": 0}, lower=False)
    (example,) = result.example.args
    assert torch.equal(example, TRAIN[0][:EXAMPLE_ROWS])
    assert not any("inferred" in note for note in result.notes)


def test_calibration_without_labels(untouched: Blob) -> None:
    result = pk.compress(untouched, calibrate=TRAIN[0], criterion="activation", lower=False)
    assert torch.equal(result.example.args[0], TRAIN[0][:EXAMPLE_ROWS])


# ---- the model is never modified -----------------------------------------------------------------------------


def test_forward_that_writes_to_itself_leaves_no_trace() -> None:
    model = Chatty().eval()
    before = snapshot(model)
    result = pk.compress(model, X, pk.Target(macs=0.5))
    assert snapshot(model) == before
    assert not hasattr(model, "features")
    assert model.seen == []
    assert share(result, "macs") <= 0.5


def test_gradients_are_kept() -> None:
    torch.manual_seed(0)
    model = Blob().eval()
    model(X).sum().backward()
    before = snapshot(model)
    pk.compress(model, X, criterion="taylor", calibrate=VALIDATE)
    assert snapshot(model) == before
    assert model.first.weight.grad is not None


# ---- sensitivity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tuple, lambda pair: [pair],
                                  lambda pair: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), 16)],
                         ids=["tensors", "list", "loader"])
def test_sensitivity_is_what_cutting_that_family_costs(untouched: Blob, form: Callable[[Any], Any]) -> None:
    told: list[str] = []
    found = pk.sensitivity(untouched, form(VALIDATE), ratios=(0.25, 0.75), tell=told.append)
    assert told == ["first", "second"]
    assert found.dense == training.accuracy(untouched, VALIDATE)
    assert [(p.family, p.removed) for p in found.points] == [("first", 6), ("first", 18), ("second", 6), ("second", 18)]
    for point in found.points:
        cut = pk.prune(untouched, X, pk.Target(layers={point.family: 1 - point.ratio}))
        assert training.accuracy(cut.model, VALIDATE) == pytest.approx(point.accuracy)
    assert "first" in str(found)


@pytest.mark.parametrize(("options", "error", "word"), [
    ({"families": ["thrid"]}, "TargetError", "'thrid'"), ({"ratios": (1.0,)}, "TargetError", "ratios=1.0"),
    ({"data": []}, "InputError", "no batch"), ({"data": [VALIDATE[0]]}, "InputError", "with labels"),
    ({"criterion": "best"}, "UnknownName", "taylor")], ids=str)
def test_sensitivity_refuses(untouched: Blob, options: dict[str, Any], error: str, word: str) -> None:
    with pytest.raises(pk.errors.PrunekernError, match=word) as caught:
        pk.sensitivity(untouched, **{"data": VALIDATE, **options})
    assert type(caught.value).__name__ == error


# ---- what is told --------------------------------------------------------------------------------------------


def test_progress_lines(untouched: Blob) -> None:
    told: list[str] = []
    pk.compress(untouched, train=TRAIN, validate=VALIDATE, test=TEST, fit={"epochs": 1}, tell=told.append)
    assert told == ["trace", "step 1/1: prune", "step 1/1: train", "measure on validation data",
                    "measure on test data", "lower"]


def test_report(untouched: Blob, tmp_path: Any) -> None:
    result = pk.compress(untouched, train=TRAIN, validate=VALIDATE, steps=2, fit={"epochs": 1})
    report = result.report
    assert {row.name: (row.before, row.after) for row in report.layers} == {
        name: (getattr(untouched, name).out_features, getattr(result.model, name).out_features)
        for name in ("first", "second", "last")}
    assert sum(row.macs_after for row in report.layers) == result.plan.costs["macs"][1]
    assert report.proof is not None
    assert report.proof.passed
    figures = {figure.label: figure.value for figure in report.headline}
    assert figures["MACs left"] == pytest.approx(share(result, "macs"))
    assert figures["validation accuracy, compressed"] == training.accuracy(result.model, VALIDATE)
    assert report.environment["torch"] == torch.__version__
    saved = report.save(tmp_path / "report")
    assert {path.name for path in saved.files} >= {"index.html", "report.json", "layers.png"}
    page = (tmp_path / "report" / "index.html").read_text()
    assert "second" in page
    assert str(result.plan.costs["macs"][1])[:2] in page


def test_result_prints(untouched: Blob) -> None:
    text = str(pk.compress(untouched, X, pk.Target(macs=0.5)))
    assert "Blob (your class)" in text
    assert "macs:" in text
    assert "proven in float64" in text
