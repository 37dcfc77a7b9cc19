"""Optimal brain surgeon over groups: costs against least squares by brute force, the greedy order, many readers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.core.labels import FIXED
from prunekern.graph.groups import Groups
from prunekern.prune.importance import Evidence, score
from prunekern.prune.importance import obs as criterion
from prunekern.prune.importance import readers as module
from prunekern.prune.importance.obs import _taken_apart
from prunekern.prune.importance.readers import Reader, look, readers
from tests.planted import SHAPE, grouped, lively


class Problem:
    """Random rows x [n, k] of correlated inputs, weights [o, k], a curvature [o, o]; each group owns some columns."""

    def __init__(self, ids: list[int], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        k, o = len(ids), 4
        self.ids = torch.tensor(ids)
        self.x = rng.normal(size=(400, k)) @ (np.eye(k) + 0.6 * rng.normal(size=(k, k)))
        self.w = rng.normal(size=(o, k))
        root = rng.normal(size=(o, o))
        self.c = root @ root.T
        self.h = self.x.T @ self.x / len(self.x)

    def reader(self) -> Reader:
        return Reader(self.ids, *(torch.from_numpy(part) for part in (self.h, self.c, self.w)))

    def refitted(self, gone: list[int]) -> tuple[Any, float]:
        """(weights of the others, the error that is left): y = W x by least squares from the columns that stay."""
        left = ~np.isin(self.ids.numpy(), gone)
        lift = module.RIDGE * np.diag(self.h).mean() * np.eye(len(self.h))
        h = self.h + lift                                   # as rows sqrt(lift) e_i beside x
        new = np.zeros_like(self.w)
        new[:, left] = np.linalg.solve(h[left][:, left], (self.w @ h)[:, left].T).T
        off = self.w - new
        return new[:, left], float(np.trace(self.c @ off @ h @ off.T))


IDS = [3, 3, 5, 7, 7, 2, 5, 9, 9, 9]        # widths of 1, 2 and 3, scattered


def costs_of(reader: Reader, alive: list[int]) -> dict[int, float]:
    total, mask = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.bool)
    mask[alive] = True
    reader.add_costs(total, mask)
    return {group: float(total[group]) for group in alive}


def test_costs_are_what_least_squares_leaves() -> None:
    problem = Problem(IDS)
    for group, cost in costs_of(problem.reader(), [2, 3, 5, 7, 9]).items():
        assert cost == pytest.approx(problem.refitted([group])[1], rel=1e-9)


def test_downdates_are_refits_of_what_is_left() -> None:
    """After each removal: weights are those of a fresh fit, and costs are what a fresh fit says leaves in addition."""
    problem = Problem(IDS)
    reader, gone = problem.reader(), list[int]()
    for group in (5, 9, 3):
        reader.remove(torch.tensor([group]))
        gone.append(group)
        weights, before = problem.refitted(gone)
        assert np.allclose(reader.weight, weights)
        rest = [g for g in (2, 3, 5, 7, 9) if g not in gone]
        for other, cost in costs_of(reader, rest).items():
            assert cost == pytest.approx(problem.refitted([*gone, other])[1] - before, rel=1e-7)
        assert reader.joint(torch.tensor(rest)) == pytest.approx(problem.refitted([*gone, *rest])[1] - before, rel=1e-7)


def test_several_at_once_are_one_after_another() -> None:
    one, other = Problem(IDS).reader(), Problem(IDS).reader()
    one.remove(torch.tensor([3, 9]))
    other.remove(torch.tensor([3]))
    other.remove(torch.tensor([9, 4]))                      # 4 has nothing here
    assert torch.equal(one.ids, other.ids)
    for name in ("inverse", "weight", "bent"):
        assert torch.allclose(getattr(one, name), getattr(other, name))


def test_curvature_of_many_outputs_is_its_diagonal() -> None:
    problem = Problem(IDS)
    problem.c = np.diag(np.diag(problem.c))
    given = [torch.from_numpy(part) for part in (problem.h, np.diag(problem.c).copy(), problem.w)]
    mine = costs_of(Reader(problem.ids, *given), [2, 9])
    assert mine == pytest.approx({group: problem.refitted([group])[1] for group in (2, 9)})


def test_costs_add_up_over_readers_and_the_cheapest_per_mac_leaves_first() -> None:
    """And count as often as layers read the group."""
    one, two = Problem([2, 3, 4, 5], 1), Problem([5, 4, 3, 2, 6], 2)
    saved = torch.ones(12, dtype=torch.float64)
    saved[4] = 1000
    costs = torch.full((12,), torch.nan, dtype=torch.float64)
    ids = torch.tensor([2, 3, 4, 5])
    _taken_apart(costs, ids, [one.reader(), two.reader()], saved)
    gone, spent, worst = list[int](), 0.0, 0.0
    for _ in range(4):
        now = {group: sum(p.refitted([*gone, group])[1] for p in (one, two)) - spent
               for group in (2, 3, 4, 5) if group not in gone}
        first = min(now, key=lambda group: now[group] / float(saved[group]))
        worst = max(worst, 2 * now[first] / float(saved[first]))
        assert float(costs[first]) == pytest.approx(worst * float(saved[first]), rel=1e-6)
        gone.append(first)
        spent += now[first]
    assert bool(costs[[0, 1, 6]].isnan().all())


def test_twins_do_not_leave_together() -> None:
    """300 channels, 6 leave in a step; 100 of them exist twice: each is free to lose once, and only once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 200, generator=generator).double()
    x = torch.cat((x, x[:, :100]), 1)
    w = torch.randn(5, 300, generator=generator).double()
    costs = torch.full((302,), torch.nan, dtype=torch.float64)
    ids = torch.arange(2, 302)
    _taken_apart(costs, ids, [Reader(ids, x.T @ x / 2000, torch.eye(5).double(), w)], torch.ones(302).double())
    early = set(costs[ids].argsort(stable=True)[:100].tolist())
    pairs = [{i, i + 200} for i in range(100)]
    assert all(len(pair & early) == 1 for pair in pairs)


@pytest.mark.parametrize("ids", [[2] * 9 + [3] * 3 + [4] * 2, [4, 2] * 6, list(range(14))])
def test_parts_of_wide_layers_keep_groups_whole(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDEST", 8)
    monkeypatch.setattr(module, "PART", 5)
    table = torch.tensor(ids)
    parts = module._parts(table)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(ids)))
    assert all(len(part) <= 8 for part in parts)
    for one, two in itertools.combinations(parts, 2):
        shared = set(table[one].tolist()) & set(table[two].tolist())
        assert all(ids.count(group) > 5 for group in shared)


# ---- in networks -------------------------------------------------------------------------------------------


class Redundant(nn.Module):
    """12 channels, of which those from 4 on are sums of the first ones (linear, no activation in between)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).mean((2, 3))


def images(rows: int = 64) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(5))


def test_redundant_channels_cost_nothing_until_too_few_are_left() -> None:
    torch.manual_seed(2)
    model: Any = lively(Redundant())
    with torch.no_grad():
        mix = torch.randn(8, 4)
        for tensor in (model.first.weight, model.first.bias):
            tensor[4:] = torch.einsum("ij,j...->i...", mix, tensor[:4])
    groups = grouped(model)
    costs = score(groups, "obs", batches=images()).values[groups.families[0].groups].sort()[0]
    assert float(costs[7]) < 0.2 * float(costs[8])          # the ridge makes them a little dear


class Readers(nn.Module):
    """A stream read by a plain, a grouped convolution and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain, self.split = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.plain(F.relu(x)) + self.split(F.relu(x))
        return self.head(x.mean((2, 3)))


def test_every_layer_that_reads_a_channel_has_its_reader() -> None:
    groups = grouped(lively(Readers()))
    found = readers(groups.labels, *look(Evidence(groups, images())))
    axes = groups.labels.axes
    assert sorted(tuple(reader.ids.tolist()) for reader in found) == sorted(
        tuple(ids.tolist()) for ids in (axes["plain.weight", 1], *axes["split.weight", 1].repeat_interleave(9, 1),
                                        axes["head.weight", 1]))


def test_scores_are_of_all_readers_together() -> None:
    """What one layer hardly needs, another one does: its cost is what the other says, and not less."""
    torch.manual_seed(0)
    model: Any = lively(Readers())
    with torch.no_grad():
        model.plain.weight[:, 3] = 0
        model.split.weight[:, 3] = 0        # channels 3 and 7
        model.head.weight[:, 3] = 0
        model.head.weight[:, 7] *= 20
        model.plain.weight[:, 7] = 0
    groups = grouped(model)
    ids = groups.labels.axes["stem.weight", 0]
    values = score(groups, "obs", batches=images()).values[ids]
    assert int(values.argmin()) == 3
    assert int(values.argmax()) == 7


def test_moments_and_curvature_are_those_of_the_network() -> None:
    """Inputs: covariance over pixels and images. Outputs: E over directions of J^T v v^T J is J^T J, in units of the
    spread of the outputs, summed over pixels."""
    torch.manual_seed(0)
    model: Any = lively(Readers()).double()
    x = images(40).double()
    groups = grouped(model, x[:2])
    layers, _, seen = look(Evidence(groups, torch.cat([x] * 25)))
    head, plain = (next(n for n, layer in layers.items() if layer.weight == f"{name}.weight")
                   for name in ("head", "plain"))
    h = F.relu(model.stem(x)).detach()
    assert torch.allclose(seen.inputs[plain, 0][0], torch.cov(h.movedim(1, 0).flatten(1), correction=0), rtol=0.02,
                          atol=1e-2)
    spread = float(model(x).std(correction=0))
    want = torch.eye(5).double() / spread**2
    assert torch.allclose(seen.outputs[head][0], want, rtol=0.4, atol=0.4 * float(want[0, 0]))
    jacobian = model.head.weight.detach() / 64          # of an output with respect to one pixel of a channel
    want = 64 * jacobian.T @ jacobian / spread**2
    assert torch.allclose(seen.outputs[plain][0], want, rtol=0.4, atol=0.4 * float(want.diagonal().mean()))


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(3, 9) + torch.zeros(3, 1))


def test_a_network_of_fixed_batch_size_is_never_given_less() -> None:
    torch.manual_seed(0)
    model = Fixed().eval()
    groups = grouped(model, torch.randn(3, 6))
    assert not groups.graph.free_batch
    batches = [torch.randn(3, 6) for _ in range(400)]       # 1200 rows: 1024 are no multiple of 3
    assert bool(score(groups, "obs", batches=batches).values[groups.families[0].groups].isfinite().all())


class Unread(nn.Module):
    """Channels that only a norm and an average see before they are given away: no layer reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3))


def test_depthwise_channels_are_those_of_what_reads_them_at_last() -> None:
    torch.manual_seed(0)
    model: Any = lively(Unread())
    with torch.no_grad():
        model.c.weight[:, 2] = 0
    groups = grouped(model)
    family = groups.families[0]
    values = score(groups, "obs", batches=images()).values
    assert int(values[groups.labels.axes["c.weight", 1]].argmin()) == 2
    assert bool(values[family.groups].isfinite().all())


def test_a_generator_is_enough_and_the_seed_decides() -> None:
    torch.manual_seed(0)
    groups: Groups = grouped(lively(Readers()))
    ids = groups.families[0].groups
    one, two, other = (score(groups, "obs", batches=(x for x in images().split(16)), seed=seed).values[ids]
                       for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert FIXED not in ids.tolist()


def test_wide_layers_are_held_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels [8 x 16 pixels] into a linear layer: parts of two channels, more than that at no time."""
    monkeypatch.setattr(module, "WIDEST", 50)
    monkeypatch.setattr(module, "PART", 33)
    torch.manual_seed(0)
    model: Any = lively(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)))
    with torch.no_grad():
        model[3].weight.unflatten(1, (8, 16))[:, 5] = 0
    groups = grouped(model)
    layers, slices, seen = look(Evidence(groups, images()))
    assert {tuple(part.shape) for parts in seen.inputs.values() for part in parts} == {(32, 32)}
    assert len(readers(groups.labels, layers, slices, seen)) == 4
    values = score(groups, "obs", batches=images()).values[groups.families[0].groups]
    assert int(values.argmin()) == 5


def test_the_network_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model: Any = lively(Readers())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(grouped(model), "obs", batches=images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert criterion.POWER > 0
