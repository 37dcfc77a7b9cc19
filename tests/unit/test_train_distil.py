"""Distillation: what the student is measured by, on which channels, and what becomes of the teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.errors import ArtefactError, InputError, ModelError
from prunekern.prune.oneshot import groups_of, prune
from prunekern.prune.target import Target
from prunekern.train import Distil, accuracy, fit, kept_outputs
from tests.training import blobs, figures, network, same, train

X, Y = blobs()


def taught_by(teacher: nn.Module, **distil: Any) -> dict[str, Any]:
    return {"teacher": teacher, "distil": distil or None, "lr": 0.05, "epochs": 1, "batch_size": 96, "progress": False}


def loss_of(student: nn.Module, options: dict[str, Any], data: Any = None) -> float:
    """The loss of the first batch, which holds all data."""
    return fit(copy.deepcopy(student), (X, Y) if data is None else data, **options).epochs[0].loss


# --- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_published_one(temperature: float) -> None:
    student, teacher = network(0, dropout=0.0), network(1).eval()
    with torch.no_grad():
        ours, theirs = student(X), teacher(X)
    soft = [torch.softmax(scores / temperature, 1) for scores in (theirs, ours)]
    divergence = (soft[0] * (soft[0] / soft[1]).log()).sum(1).mean() * temperature**2
    expected = 0.3 * F.cross_entropy(ours, Y) + 0.7 * divergence
    found = loss_of(student, taught_by(teacher, logits=0.7, labels=0.3, temperature=temperature))
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_layers_are_compared_relative_to_the_teacher() -> None:
    student, teacher = network(0, dropout=0.0), network(1).eval()
    errors = []
    for end in (1, 3):
        with torch.no_grad():
            theirs, ours = teacher[:end](X), copy.deepcopy(student)[:end](X)
        errors.append((ours - theirs).square().mean() / theirs.square().mean())
    expected = 2 * sum(errors) / 2
    found = loss_of(student, taught_by(teacher, logits=0.0, labels=0.0, layers=("0", "2"), features=2.0))
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_the_kept_channels_are_compared() -> None:
    """A sliced copy of the teacher has no error at all, where the plan says which channels are which."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    groups = groups_of(teacher, X[:4])
    plan = prune(teacher, X[:4], Target(macs=0.5), groups=groups, criterion="random").plan
    layers = ("0", "1", "3")
    kept = kept_outputs(groups, plan, layers)
    assert kept["0"][1].tolist() == kept["1"][1].tolist() == plan.kept["0.weight"][0]
    # Nothing of the first layer depends on what was cut before it, so these features are equal.
    student = prune(teacher, X[:4], Target(macs=0.5), criterion="random").model
    asked = {"logits": 0.0, "labels": 0.0, "layers": ("0", "1"), "kept": kept}
    assert loss_of(student, taught_by(teacher, **asked)) == pytest.approx(0.0, abs=1e-12)
    wrong = {**kept, "0": {1: (kept["0"][1] + 1) % 16}}
    assert loss_of(student, taught_by(teacher, **{**asked, "kept": wrong})) > 0.1
    with pytest.raises(InputError, match=r"gives \(96, \d+\) in the student and \(96, 16\)"):
        loss_of(student, taught_by(teacher, **{**asked, "kept": {}}))


def test_outputs_of_whole_blocks_are_mapped_by_the_graph() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)) + x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 6, 3), Block(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x)).mean((2, 3)))

    model = Net().eval()
    x = torch.randn(2, 3, 8, 8)
    groups = groups_of(model, x)
    pruned = prune(model, x, Target(layers={"stem": 0.5}), groups=groups)
    kept = kept_outputs(groups, pruned.plan, ("block", "block.conv", "head"))
    assert kept["block"][1].tolist() == pruned.plan.kept["stem.weight"][0]
    assert kept["head"] == {}
    with pytest.raises(InputError, match="runs no layer 'tail'; it has 'stem'"):
        kept_outputs(groups, pruned.plan, ("tail",))


# --- learning ---------------------------------------------------------------------------------------------


def trained_teacher() -> nn.Module:
    teacher = network(5, dropout=0.0)
    train(teacher, epochs=12)
    return teacher.eval()


@pytest.mark.parametrize("form", ["tensor", "batches", "function", "dataset"])
def test_a_student_learns_without_labels(form: str) -> None:
    teacher, student, test = trained_teacher(), network(0), blobs(300, seed=5)
    inputs = blobs(240, seed=7)[0]
    data = {"tensor": inputs, "batches": list(inputs.split(16)), "function": lambda: iter(inputs.split(16)),
            "dataset": torch.utils.data.TensorDataset(inputs)}[form]
    history = train(student, data, epochs=6, teacher=teacher)
    assert accuracy(student, test) > 0.9
    assert history.epochs[-1].train_accuracy is None
    assert history.epochs[-1].loss < history.epochs[0].loss / 3


def test_labels_are_needed_without_a_teacher() -> None:
    with pytest.raises(InputError, match=r"must be \(input, target\)"):
        train(network(), X)


def test_labels_and_a_teacher_together() -> None:
    teacher, test = trained_teacher(), blobs(300, seed=5)
    student = network(0)
    history = train(student, epochs=6, teacher=teacher, distil={"temperature": 2.0, "layers": ["0"]})
    assert accuracy(student, test) > 0.9
    assert history.epochs[-1].train_accuracy is not None


# --- the teacher ------------------------------------------------------------------------------------------


def test_the_teacher_says_what_it_says_in_eval_mode_and_is_left_alone() -> None:
    teacher = network(1, dropout=0.5).train()
    before, modes = copy.deepcopy(teacher), []
    teacher.register_forward_hook(lambda m, i, o: modes.append((m.training, m[1].training, o.requires_grad)))
    train(network(0), teacher=teacher, distil={"layers": ("0",)})
    assert set(modes) == {(False, False, False)}
    assert same(teacher, before)
    assert all(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher[0]._forward_hooks


def test_the_student_keeps_no_hooks_even_after_an_error() -> None:
    student = network(0)
    with pytest.raises(InputError, match="has no layer 'nothing'; it has '0', '1'"):
        train(student, teacher=network(1), distil={"layers": ("0", "nothing")})
    assert not student[0]._forward_hooks
    train(student, teacher=network(1), distil={"layers": ("0",)})
    assert not student[0]._forward_hooks


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"distil": {"temperature": 2}}, InputError, "needs a teacher"),
        ({"teacher": network(1), "distil": {"heat": 2}}, InputError, "known: logits, labels, temperature"),
        ({"teacher": network(1), "distil": {"temperature": 0}}, InputError, "must be positive"),
        ({"teacher": network(1), "distil": {"logits": -1}}, InputError, "weight from 0"),
        ({"teacher": network(1), "distil": {"logits": 0}}, InputError, "nothing of the teacher"),
        ({"teacher": network(1), "distil": 4}, InputError, "distil is a int"),
        ({"teacher": lambda x: x}, ModelError, "must be a torch.nn.Module"),
        ({"teacher": nn.Linear(8, 5)}, InputError, r"are \(16, 3\), the teacher's \(16, 5\)"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        train(network(), **options)


def test_a_model_does_not_teach_itself() -> None:
    model = network()
    with pytest.raises(ModelError, match="shares weights"):
        train(model, teacher=nn.Sequential(model[0], nn.Linear(16, 3)))


# --- resuming ---------------------------------------------------------------------------------------------


class StopHereError(Exception):
    """Stands for a kill that the test survives."""


@pytest.mark.parametrize("moment", [2, 9, 17])
def test_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, moment: int) -> None:
    teacher = network(1, dropout=0.5)
    options = {"teacher": teacher, "distil": {"layers": ("0",)}, "epochs": 3, "ema": 0.9}
    whole = network()
    expected = train(whole, **options)
    count = iter(range(moment))

    def kill(model: nn.Module) -> None:
        if next(count, None) is None:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(network(), before_step=kill, checkpoint=tmp_path / "run", **options)
    parted = network()
    assert figures(train(parted, checkpoint=tmp_path / "run", **options)) == figures(expected)
    assert same(parted, whole)


def test_a_checkpoint_under_another_teacher_is_refused(tmp_path: Path) -> None:
    train(network(), teacher=network(1), checkpoint=tmp_path / "run")
    with pytest.raises(ArtefactError, match="other teacher"):
        train(network(), teacher=network(2), checkpoint=tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"temperature=4\.0, now 2\.0"):
        train(network(), teacher=network(1), distil=Distil(temperature=2.0), checkpoint=tmp_path / "run")
    with pytest.raises(ArtefactError, match="another teacher"):
        train(network(), checkpoint=tmp_path / "run")
