"""Training towards sparsity: penalties on groups, growing ones, and channels that come back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.errors import ArtefactError, InputError
from prunekern.prune.oneshot import groups_of, prune
from prunekern.prune.target import Target
from prunekern.train import GroupLasso, GrowingReg, SoftPruning, Sparsity, accuracy, fit
from tests.training import blobs, figures, network, same

X, Y = blobs()


class Conv(nn.Module):
    """Convolution, batch norm, a grouped convolution, a residual sum, a flatten: every kind of slice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.last(torch.relu(self.grouped(x)).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Linear(8, 10), nn.Linear(10, 12), nn.Linear(12, 10)
        self.norm, self.last = nn.BatchNorm1d(12), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(torch.relu(x + self.back(torch.relu(self.norm(self.inner(x))))))


def residual(seed: int = 0) -> Residual:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Residual().eval()


def example(model: nn.Module) -> Tensor:
    return torch.randn(4, 2, 4, 4) if isinstance(model, Conv) else X[:4]


def owned(model: nn.Module, groups: Any, group: int) -> Tensor:
    """All weights of a group in a row, found element by element."""
    parts = []
    for name, parameter in model.named_parameters():
        mine = torch.zeros_like(parameter, dtype=torch.long)
        for axis in range(parameter.dim()):
            table = groups.labels.axes.get((name, axis))
            if table is None:
                continue
            for index in torch.cartesian_prod(*(torch.arange(n) for n in parameter.shape)).view(-1, parameter.dim()):
                if table.dim() == 2:
                    row = int(index[0]) * len(table) // parameter.shape[0]
                    label = table[row, index[axis]]
                else:
                    label = table[index[axis]]
                mine[tuple(index)] += int(label) == group
        parts += [parameter[mine > 0]] * 1 + [parameter[mine > 1]]
    return torch.cat(parts)


# --- group lasso ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Conv, residual])
def test_norms_are_those_of_everything_a_group_owns(make: Any) -> None:
    model = make().eval()
    groups = groups_of(model, example(model))
    lasso = GroupLasso(groups, 0.1)
    norms = lasso.norms(model)
    for family in groups:
        for group in family.groups[:2].tolist():
            weights = owned(model, groups, group)
            assert norms[group].item() == pytest.approx(weights.norm().item(), rel=1e-5)
            assert lasso.counts[group].item() == len(weights)


@pytest.mark.parametrize("make", [Conv, residual])
@pytest.mark.parametrize("emphasis", [0.0, 4.0])
def test_what_is_added_is_the_gradient_of_the_penalty(make: Any, emphasis: float) -> None:
    model = make().eval()
    lasso = GroupLasso(groups_of(model, example(model)), 0.1, emphasis=emphasis)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(lasso.penalty(model), parameters, allow_unused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    lasso.before_step(model)
    for name, parameter, gradient in zip(names, parameters, expected, strict=True):
        wanted = torch.ones_like(parameter) if gradient is None else 1 + gradient
        torch.testing.assert_close(parameter.grad, wanted, msg=name)
    assert lasso.penalty(model) > 0


def test_emphasis_pulls_small_groups_harder() -> None:
    model = residual()
    groups = groups_of(model, X[:4])
    flat, steep = GroupLasso(groups, 1.0), GroupLasso(groups, 1.0, emphasis=4.0)
    norms = flat.norms(model)
    ratio = steep._weights(norms) / flat._weights(norms)
    for family in groups:
        order = norms[family.groups].argsort()
        assert ratio[family.groups[order[0]]].item() == pytest.approx(16.0, rel=1e-4)
        assert ratio[family.groups[order[-1]]].item() == pytest.approx(1.0, rel=1e-4)


def fitted(model: nn.Module, sparsity: Sparsity | None, **options: Any) -> Any:
    settings = {"epochs": 30, "lr": 0.02, "batch_size": 16, "weight_decay": 0.0, "progress": False} | options
    return fit(model, (X, Y), sparsity=sparsity, **settings)


def test_group_lasso_makes_whole_groups_vanish_and_keeps_the_accuracy() -> None:
    plain, sparse, test = network(dropout=0.0).eval(), network(dropout=0.0).eval(), blobs(300, seed=5)
    groups = groups_of(sparse, X[:4])
    lasso = GroupLasso(groups, 0.03)
    fitted(plain, None, epochs=40)
    fitted(sparse, lasso, epochs=40)
    hidden = groups.find("0")[0].groups
    assert lasso.norms(plain)[hidden].min() > 1
    assert 4 <= int((lasso.norms(sparse)[hidden] < 1e-2).sum()) < 16
    pruned = prune(sparse, X[:4], Target(layers={"0": 0.75})).model
    assert accuracy(sparse, test) > 0.95
    torch.testing.assert_close(pruned(X), sparse(X), rtol=0.02, atol=0.02)  # what was cut had no say any more


def test_ignored_layers_are_not_touched() -> None:
    model = residual()
    lasso = GroupLasso(groups_of(model, X[:4]), 0.1, ignore=("inner",))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    lasso.before_step(model)
    assert not bool(model.norm.weight.grad.any())
    assert bool(model.stem.weight.grad.any())


def test_a_loop_of_ones_own() -> None:
    """The same updates as ``fit`` makes."""
    model, other = residual(), residual()
    lasso = GroupLasso(groups_of(model, X[:4]), 0.01)
    fitted(model, lasso, epochs=2, batch_size=96, schedule="constant")
    optimizer = torch.optim.SGD(other.parameters(), 0.02, momentum=0.9)
    other.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(X), Y).backward()
        lasso.before_step(other)
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- growing regularisation -------------------------------------------------------------------------------


def test_the_penalty_grows_on_the_chosen_and_only_there() -> None:
    model = residual()
    groups = groups_of(model, X[:4])
    growing = GrowingReg(groups, Target(layers={"inner": 0.5}), step=0.1, every=3, ceiling=0.25)
    gone = growing.plan.kept["inner.weight"][0]
    found = []
    for _ in range(8):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        growing.before_step(model)
        pulled = model.inner.weight.grad / model.inner.weight
        assert not bool(pulled[gone].any())  # what is kept is left alone
        rest = [i for i in range(12) if i not in gone]
        found.append(round(pulled[rest].mean().item(), 4))
        torch.testing.assert_close(pulled[rest], torch.full_like(pulled[rest], found[-1]), rtol=1e-3, atol=1e-4)
        assert bool(model.back.weight.grad[:, rest].any())
        assert bool(model.norm.bias.grad[rest].any()) == bool(model.norm.bias[rest].any())
        assert not bool(model.stem.weight.grad.any())
    assert found == pytest.approx([0.1] * 3 + [0.2] * 3 + [0.25] * 2)


def test_growing_regularisation_empties_the_chosen_then_cuts_them() -> None:
    model = residual()
    growing = GrowingReg(groups_of(model, X[:4]), Target(layers={"inner": 0.5}), step=0.02, every=2)
    chosen = growing.keep.clone()
    fitted(model, growing)
    model.eval()
    pruned = growing.cut(model)
    assert torch.equal(growing.keep, chosen)
    assert pruned.model.inner.out_features == 6
    torch.testing.assert_close(pruned.model(X), model(X), rtol=0.05, atol=0.05)
    assert accuracy(pruned.model, blobs(300, seed=5)) > 0.9


# --- soft pruning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Conv, residual])
def test_a_softly_pruned_network_computes_what_the_cut_one_does(make: Any) -> None:
    torch.manual_seed(2)
    model = make().eval()
    x = example(model)
    soft = SoftPruning(groups_of(model, x), Target(macs=0.5))
    dense = copy.deepcopy(model)
    soft.after_epoch(model, 0)
    pruned = soft.cut(model)
    assert pruned.plan.costs["macs"][1] <= 0.5 * pruned.plan.costs["macs"][0]
    torch.testing.assert_close(pruned.model(x), model(x))
    assert not torch.allclose(dense(x), model(x), atol=1e-3)


def test_silenced_channels_come_back() -> None:
    model = residual()
    groups = groups_of(model, X[:4])
    soft = SoftPruning(groups, Target(layers={"inner": 0.5}))
    inner = groups.find("inner")[0].groups
    silent: list[Tensor] = []
    revived: list[float] = []

    def before(m: nn.Module) -> None:
        if silent:
            revived.append(m.back.weight[:, silent[-1]].abs().sum().item())

    def after(m: nn.Module, epoch: int) -> None:
        gone = ~soft.keep[inner]
        assert int(gone.sum()) == 6
        assert not bool(m.back.weight[:, gone].any())
        silent.append(gone)

    fitted(model, soft, epochs=12, lr=0.1, before_step=before, after_epoch=after)
    assert sum(value > 0 for value in revived) > 50  # all updates but the first of each epoch
    pruned = soft.cut(model.eval())
    torch.testing.assert_close(pruned.model(X), model(X))
    assert accuracy(pruned.model, blobs(300, seed=5)) > 0.9


def test_a_channel_that_has_grown_is_kept_and_another_one_goes() -> None:
    model = residual()
    groups = groups_of(model, X[:4])
    soft = SoftPruning(groups, Target(layers={"inner": 0.5}))
    copied = copy.deepcopy(model)  # the weights of the moment are looked at, not those that the groups were made of
    soft.after_epoch(copied, 0)
    inner = groups.find("inner")[0].groups
    first = (~soft.keep[inner]).nonzero()[:, 0].tolist()
    with torch.no_grad():
        copied.inner.weight[first[0]] *= 100
    soft.after_epoch(copied, 1)
    second = (~soft.keep[inner]).nonzero()[:, 0].tolist()
    assert len(first) == len(second) == 6
    assert first[0] not in second
    assert set(first[1:]) < set(second)


def test_soft_pruning_may_wait_some_epochs() -> None:
    model = residual()
    soft = SoftPruning(groups_of(model, X[:4]), Target(layers={"inner": 0.5}), every=2)
    zeros: list[int] = []
    fitted(model, soft, epochs=4, after_epoch=lambda m, e: zeros.append(int((m.back.weight == 0).sum())))
    assert [count > 0 for count in zeros] == [False, True, False, True]


def test_the_best_epoch_and_the_finished_run_come_back_with_their_choice(tmp_path: Path) -> None:
    """The choice changes in the second epoch, where silenced channels grow; the first epoch is the best."""

    def run(**options: Any) -> tuple[nn.Module, SoftPruning, list[Tensor], Any]:
        model, keeps, x, y = residual(), [], *blobs(60, seed=5)
        soft = SoftPruning(groups_of(model, X[:4]), Target(layers={"inner": 0.5}))

        def grow(m: nn.Module) -> None:
            if len(keeps) == 1:
                m.inner.weight.data[~keeps[0][soft.groups.find("inner")[0].groups]] += 0.5

        history = fitted(model, soft, epochs=3, before_step=grow,
                         after_epoch=lambda m, e: keeps.append(soft.keep.clone()),
                         validate=lambda: (x, y if not keeps[1:] else (y + 1) % 3), **options)
        return model, soft, keeps, history

    _, soft, keeps, _ = run(checkpoint=tmp_path / "last")
    assert not torch.equal(keeps[0], keeps[1])
    assert torch.equal(soft.keep, keeps[-1])
    model, again, none, _ = run(checkpoint=tmp_path / "last")
    assert none == []
    assert torch.equal(again.keep, keeps[-1])
    torch.testing.assert_close(again.cut(model.eval()).model(X), model(X))
    model, best, keeps, history = run(restore_best=True, checkpoint=tmp_path / "best")
    assert history.best == 0
    assert torch.equal(best.keep, keeps[0])
    torch.testing.assert_close(best.cut(model.eval()).model(X), model(X))
    assert torch.equal(run(restore_best=True, checkpoint=tmp_path / "best")[1].keep, keeps[0])


# --- resuming ---------------------------------------------------------------------------------------------


class StopHereError(Exception):
    """Stands for a kill that the test survives."""


MAKERS = {
    "lasso": lambda groups: GroupLasso(groups, 0.01, emphasis=2.0),
    "growing": lambda groups: GrowingReg(groups, Target(layers={"inner": 0.5}), step=0.05, every=4),
    "soft": lambda groups: SoftPruning(groups, Target(layers={"inner": 0.5})),
}


@pytest.mark.parametrize("moment", [2, 8, 12, 20])
@pytest.mark.parametrize("method", MAKERS)
def test_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, method: str, moment: int) -> None:
    def run(stop: int | None, **options: Any) -> tuple[nn.Module, Any, Any]:
        model = residual()
        sparsity = MAKERS[method](groups_of(model, X[:4]))
        count = iter(range(stop)) if stop is not None else None

        def kill(_: nn.Module) -> None:
            if count is not None and next(count, None) is None:
                raise StopHereError

        return model, sparsity, fitted(model, sparsity, epochs=4, before_step=kill, **options)

    whole, first, expected = run(None)
    with pytest.raises(StopHereError):
        run(moment, checkpoint=tmp_path / "run")
    parted, second, found = run(None, checkpoint=tmp_path / "run")
    assert figures(found) == figures(expected)
    assert same(parted, whole)
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())


def test_a_checkpoint_of_another_penalty_is_refused(tmp_path: Path) -> None:
    def run(strength: float) -> None:
        model = residual()
        fitted(model, GroupLasso(groups_of(model, X[:4]), strength), epochs=1, checkpoint=tmp_path / "run")

    run(0.1)
    with pytest.raises(ArtefactError, match=r"other sparsity \(strength=0.1, now 0.2"):
        run(0.2)


# --- what is refused --------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused() -> None:
    model = residual()
    groups = groups_of(model, X[:4])
    for make in (lambda: GroupLasso(groups, 0.0), lambda: GrowingReg(groups, step=2.0),
                 lambda: GrowingReg(groups, every=0), lambda: SoftPruning(groups, every=0)):
        with pytest.raises(InputError, match="must be"):
            make()
    with pytest.raises(InputError, match=r"groups have 'back\.bias' with shape"):
        fitted(nn.Linear(8, 3), GroupLasso(groups, 0.1))
    with pytest.raises(InputError, match="ema would average away"):
        fitted(model, SoftPruning(groups), ema=0.9)
