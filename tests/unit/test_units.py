"""What leaves in one step: single channels, bundles that keep grouped convolutions rectangular, rounded blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from prunekern.graph.groups import Groups
from prunekern.prune.slice import check_balance
from prunekern.prune.units import Units, make_units
from tests.pruning import cut, groups_of
from tests.zoo import ZOO
from tests.zoo.branches import channel_shuffle


def chain(*widths: int) -> Groups:
    layers = [nn.Conv2d(a, b, 1) for a, b in pairwise(widths)]
    return groups_of(nn.Sequential(*layers).eval(), torch.randn(2, widths[0], 4, 4))


def zoo(name: str) -> Groups:
    model, args, kwargs = ZOO[name]()
    assert not kwargs
    return groups_of(model, args)


def scores_of(groups: Groups, seed: int = 0) -> Tensor:
    return torch.rand(groups.labels.groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(groups: Groups, units: Units, seed: int = 0) -> list[Tensor]:
    """The choice after each unit of a random order has left, down to what never leaves."""
    chosen, choices = torch.zeros(len(units), dtype=torch.bool), []
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
    for unit in order[~units.last[order]].tolist():
        chosen[unit] = True
        choices.append(~units.removed(chosen))
    return choices


def assert_sound(groups: Groups, units: Units) -> None:
    """In any order: rows stay equal, every family keeps a channel, no unit is taken twice."""
    assert units.of[0] == -1
    for keep in steps(groups, units):
        check_balance(groups.labels, keep)
        assert all(bool(keep[family.groups].any()) for family in groups)
    held = torch.bincount(units.of[units.of >= 0], minlength=len(units))
    assert bool((held > 0).all())


def test_single_channels_in_ascending_order() -> None:
    groups = chain(3, 6, 5, 2)
    scores = scores_of(groups)
    units = make_units(groups, scores)
    assert len(units) == 11
    for number, family in enumerate(groups):
        mine = (units.family == number).nonzero()[:, 0]
        assert torch.equal(units.score[mine], scores[family.groups].sort().values)
        assert units.rank[mine].tolist() == [(i + 1) / len(mine) for i in range(len(mine))]
        assert units.last[mine].tolist() == [False] * (len(mine) - 1) + [True]
        best = family.groups[scores[family.groups].argmax()]
        assert units.last[units.of[best]]
    assert_sound(groups, units)


def test_ignored_channels_are_in_no_unit_and_free_the_last() -> None:
    groups = chain(3, 6, 2)
    ignore = torch.zeros(groups.labels.groups, dtype=torch.bool)
    ignore[groups.families[0].groups[:2]] = True
    units = make_units(groups, scores_of(groups), ignore=ignore)
    assert len(units) == 4
    assert not bool(units.last.any())
    assert bool((units.of[ignore] == -1).all())


def kept_after(groups: Groups, round_to: int) -> list[int]:
    """What the first family keeps after each unit that may leave."""
    units = make_units(groups, scores_of(groups), round_to=round_to)
    family = groups.families[0]
    chosen, found = torch.zeros(len(units), dtype=torch.bool), []
    for unit in (~units.last).nonzero()[:, 0].tolist():
        chosen[unit] = True
        found.append(int((~units.removed(chosen))[family.groups].sum()))
    return found


@pytest.mark.parametrize(("width", "round_to", "kept"), [
    (8, 4, [4]), (13, 4, [12, 8, 4]), (13, 8, [8]), (6, 8, []), (8, 8, []), (7, 1, [6, 5, 4, 3, 2, 1]), (9, 3, [6, 3]),
])
def test_round_to(width: int, round_to: int, kept: list[int]) -> None:
    """Kept channels are multiples, or what was there; a family narrower than that is left alone."""
    assert kept_after(chain(3, width, 2), round_to) == kept


@pytest.mark.parametrize(("round_to", "kept"), [
    (1, [8, 7, 6, 5, 4, 3, 2, 1]), (4, [8, 7, 6, 5, 4, 3, 2, 1]), (8, [8, 6, 4, 2]), (6, [6, 3])])
def test_round_to_counts_the_channels_of_heads(round_to: int, kept: list[int]) -> None:
    """Nine heads of four channels: a head more or less is four of them."""
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(6, 108), nn.Linear(36, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(-1, 7, 3, 9, 4).permute(2, 0, 3, 1, 4)
            return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 7, 36))
    groups = groups_of(Attention().eval(), torch.randn(2, 7, 6))
    assert [family.channels for family in groups] == [9]
    assert kept_after(groups, round_to) == kept


@pytest.mark.parametrize("name", ["resnext", "grouped_uneven", "branches_grouped", "shufflenet_v1",
                                  "channel_shuffle_module", "autoencoder", "split_attention"])
@pytest.mark.parametrize("round_to", [1, 2])
def test_balanced_networks(name: str, round_to: int) -> None:
    groups = zoo(name)
    assert groups.labels.balanced or name == "shufflenet_v1"
    units = make_units(groups, scores_of(groups), round_to=round_to)
    assert_sound(groups, units)
    assert len(steps(groups, units)) > 0


def test_bundles_pair_the_least_important_of_every_row() -> None:
    """One grouped convolution: the i-th least important channel of each group leaves with that of the others."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1, groups=2), nn.Conv2d(6, 2, 1)).eval()
    groups = groups_of(model, torch.randn(2, 3, 4, 4))
    scores = scores_of(groups)
    units = make_units(groups, scores)
    inputs = groups.labels.axes["0.weight", 0].view(2, 4)
    order = [row[scores[row].argsort()] for row in inputs]
    for i in range(4):
        assert units.of[order[0][i]] == units.of[order[1][i]]
    first = units.of[order[0][0]]
    assert units.score[first] == scores[torch.stack([order[0][0], order[1][0]])].mean()
    assert_sound(groups, units)


class Shuffled(nn.Module):
    """Two grouped convolutions with a shuffle between: rows of one are columns of the other."""

    def __init__(self, groups: int = 2, width: int = 8) -> None:
        super().__init__()
        self.groups = groups
        self.first = nn.Conv2d(3, width, 1)
        self.second = nn.Conv2d(width, width, 1, groups=groups)
        self.third = nn.Conv2d(width, 4 * groups, 1, groups=groups)
        self.head = nn.Conv2d(4 * groups, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = channel_shuffle(self.second(torch.relu(self.first(x))), self.groups)
        return self.head(torch.relu(self.third(torch.relu(x))))


@pytest.mark.parametrize(("groups", "width"), [(2, 8), (2, 12), (3, 9), (3, 18), (4, 16)])
def test_shuffled_groups_find_bundles(groups: int, width: int) -> None:
    """An integer program finds sets that take as much from every row of both tables."""
    torch.manual_seed(0)
    model = Shuffled(groups, width).eval()
    found = groups_of(model, torch.randn(2, 3, 4, 4))
    units = make_units(found, scores_of(found))
    assert_sound(found, units)
    choices = steps(found, units)
    assert choices
    cut(model, found, choices[-1])
    assert int(choices[-1].sum()) < int(found.everything().sum())


def test_cheapest_bundle_goes_first() -> None:
    """The integer program takes the channels of low score, not any that balance."""
    model = Shuffled(2, 8).eval()
    groups = groups_of(model, torch.randn(2, 3, 4, 4))
    middle = groups.labels.axes["second.weight", 0]
    scores = torch.ones(groups.labels.groups, dtype=torch.float64)
    cheap = middle.view(2, 4)[:, [1, 2]].reshape(-1)       # balanced in both tables: rows 0, 1 and columns odd, even
    scores[cheap] = 0.01
    units = make_units(groups, scores)
    mine = units.of[cheap]
    assert bool((units.score[mine] < 0.5).all())


def test_families_that_only_leave_with_others_keep_a_channel() -> None:
    """Bundles across families count for the first; the others must not lose their last channel to it."""
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)
            self.grouped, self.head = nn.Conv2d(12, 8, 1, groups=2), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.grouped(torch.cat((self.a(x), self.b(x), self.c(x)), 1))))

    groups = groups_of(Net().eval(), torch.randn(2, 3, 4, 4))
    for seed in range(5):
        assert_sound(groups, make_units(groups, scores_of(groups, seed)))


def test_within_lists_units_of_other_families_too() -> None:
    groups = zoo("branches_grouped")
    units = make_units(groups, scores_of(groups))
    family = groups.find("b.0")[0]
    mine, held = units.within(family)
    assert not bool(units.last[mine].any())
    assert bool((units.score[mine].diff() >= 0).all())
    assert int(held.sum()) + int(units.last[units.of[family.groups]].sum()) == family.channels
    assert set(units.family[mine].tolist()) != {groups.families.index(family)}


def test_no_way_to_balance_is_said() -> None:
    """Inputs that must stay on one side of a grouped convolution leave nothing that could go from the other."""
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.grouped, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.grouped(torch.cat((x, self.a(x)), 1))))

    groups = groups_of(Net().eval(), torch.randn(2, 3, 4, 4))
    units = make_units(groups, scores_of(groups))
    assert [note.startswith("'a': a grouped convolution leaves no way") for note in units.notes] == [True]
    assert bool((units.of[groups.find("a")[0].groups] == -1).all())
    assert_sound(groups, units)


def normed(after: nn.Module) -> tuple[nn.Module, Groups]:
    """Three groups of four channels that a group norm holds together, a grouped convolution, and what is after it."""
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 3, groups=3), after,
                          nn.Conv2d(12, 2, 1)).eval()
    return model, groups_of(model, torch.randn(2, 3, 5, 5))


def test_groups_held_together_on_one_side_are_said() -> None:
    """Only all three could leave, so nothing does; the other side goes equally from each group."""
    _, groups = normed(nn.BatchNorm2d(12))
    units = make_units(groups, scores_of(groups))
    assert [note.startswith("'0': a grouped convolution leaves no way") for note in units.notes] == [True]
    assert len(units.within(groups.find("2")[0])[0]) == 3
    assert_sound(groups, units)


def test_groups_held_together_on_both_sides_leave_as_a_whole() -> None:
    model, groups = normed(nn.GroupNorm(3, 12))
    units = make_units(groups, scores_of(groups))
    assert (units.notes, len(units), groups.labels.balanced) == ((), 3, ())
    assert_sound(groups, units)
    cut_down = cut(model, groups, ~units.removed(torch.tensor([True, False, False]))).model
    assert (cut_down[2].groups, cut_down[2].weight.shape[:2], cut_down[3].num_groups) == (2, (8, 4), 2)


def test_infinite_scores_are_ranked_last() -> None:
    groups = chain(3, 6, 2)
    scores = scores_of(groups)
    scores[groups.families[0].groups[2]] = float("inf")
    units = make_units(groups, scores)
    assert units.last[units.of[groups.families[0].groups[2]]]


def test_nothing_to_prune_gives_no_units() -> None:
    groups = groups_of(nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4))
    units = make_units(groups, scores_of(groups))
    assert len(units) == 0
    assert not bool(units.removed(torch.zeros(0, dtype=torch.bool)).any())


def test_a_family_that_is_wholly_ignored_has_no_units() -> None:
    groups = chain(3, 6, 2)
    units = make_units(groups, scores_of(groups), ignore=torch.ones(groups.labels.groups, dtype=torch.bool))
    assert len(units) == 0
    assert [len(found) for found in units.within(groups.families[0])] == [0, 0]


def test_equal_scores_leave_in_order() -> None:
    groups = chain(3, 6, 2)
    units = make_units(groups, torch.ones(groups.labels.groups, dtype=torch.float64))
    assert units.last.tolist() == [False] * 5 + [True]
    mine, held = units.within(groups.families[0])
    assert (mine.tolist(), held.tolist()) == ([0, 1, 2, 3, 4], [1] * 5)


class Ways(nn.Module):
    """Both directions of a layer keep as many units; of one of them, every group of a convolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6, bidirectional=True, batch_first=True)
        self.grouped, self.last = nn.Conv1d(6, 9, 1, groups=3), nn.Conv1d(15, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        forth, back = self.gru(x)[0].transpose(1, 2).split(6, 1)
        return self.last(torch.cat((self.grouped(forth), back), 1))


@pytest.mark.parametrize("seed", range(4))
def test_rows_within_rows(seed: int) -> None:
    groups = groups_of(Ways().eval(), torch.randn(2, 5, 4))
    units = make_units(groups, scores_of(groups, seed))
    assert_sound(groups, units)
    assert int(units.removed(~units.last).sum()) >= 6      # three units of either direction at once
