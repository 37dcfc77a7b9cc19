"""Targets: what is asked is what remains, or the message says what can be reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern import Target, prune
from prunekern.errors import TargetError
from prunekern.graph.groups import Groups
from prunekern.prune.target import GAP, SHARES, Choice, Meter, choose, ignored
from prunekern.prune.units import Units, make_units
from tests.models import make
from tests.pruning import groups_of
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def groups() -> Groups:
    model, args = make("fashion")
    return groups_of(model, args)


@pytest.fixture(scope="module")
def scores(groups: Groups) -> Tensor:
    return torch.rand(groups.labels.groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def units(groups: Groups, scores: Tensor) -> Units:
    return make_units(groups, scores)


def kept(groups: Groups, choice: Choice) -> dict[str, int]:
    return {family.name: int(choice.keep[family.groups].sum()) for family in groups}


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("what", SHARES)
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.2, 0.03])
def test_share_is_met_from_below(groups: Groups, units: Units, what: str, share: float, ranking: str) -> None:
    choice = choose(groups, units, Target(**{what: share}), ranking=ranking)
    before, after = choice.costs[what]
    assert after <= share * before
    assert not choice.notes or after < (share - 0.01) * before
    assert (share == 1.0) == bool(choice.keep.all())


def test_the_largest_network_below_the_target(groups: Groups, units: Units) -> None:
    """No unit that left could come back."""
    meter, target = Meter(groups), Target(macs=0.37)
    choice = choose(groups, units, target)
    gone = [unit for unit in range(len(units)) if not bool(choice.keep[units.of == unit].any())]
    assert gone
    for unit in gone:
        keep = choice.keep | (units.of == unit)
        assert not meter.meets(keep, target.shares)


def test_global_takes_the_least_important_anywhere(groups: Groups, units: Units, scores: Tensor) -> None:
    choice = choose(groups, units, Target(params=0.6), refill=0)
    gone, stay = ~choice.keep, choice.keep & (units.of >= 0)
    stay[torch.isin(units.of, units.last.nonzero()[:, 0])] = False
    assert scores[gone].max() < scores[stay].min()


def test_layer_takes_the_same_share_everywhere(groups: Groups, units: Units) -> None:
    choice = choose(groups, units, Target(macs=0.4), ranking="layer", refill=0)
    shares = [int(choice.keep[family.groups].sum()) / family.channels for family in groups]
    assert max(shares) - min(shares) <= 1 / min(family.channels for family in groups)


def test_shares_combine(groups: Groups, units: Units) -> None:
    choice = choose(groups, units, Target(macs=0.6, params=0.3, bytes=0.8))
    for what, share in (("macs", 0.6), ("params", 0.3), ("bytes", 0.8)):
        before, after = choice.costs[what]
        assert after <= share * before


def test_layers_by_glob_and_number(groups: Groups, units: Units) -> None:
    found = kept(groups, choose(groups, units, Target(layers={"conv*": 0.5, "fc1": 0.33})))
    assert found == {"conv1": 8, "conv2": 8, "fc1": 33}
    assert kept(groups, choose(groups, units, Target(layers={"conv2": 0.001}))) == {"conv1": 16, "conv2": 1, "fc1": 100}
    assert kept(groups, choose(groups, units, Target(layers={"*": 1.0}))) == {"conv1": 16, "conv2": 16, "fc1": 100}


def test_layers_then_shares(groups: Groups, units: Units) -> None:
    """What a glob takes is gone; the share takes more where it has to."""
    choice = choose(groups, units, Target(layers={"conv1": 0.25}, macs=0.2))
    before, after = choice.costs["macs"]
    assert kept(groups, choice)["conv1"] <= 4
    assert after <= 0.2 * before


def test_layers_of_families_that_leave_together() -> None:
    """Both branches of a grouped convolution are asked for; what leaves with the first counts for the second."""
    model, args, _ = ZOO["branches_grouped"]()
    groups = groups_of(model, args)
    units = make_units(groups, torch.rand(groups.labels.groups, dtype=torch.float64))
    for wanted in ({"b.0": 0.5}, {"a.0": 0.5, "b.0": 0.5}, {"*": 0.5}):
        found = kept(groups, choose(groups, units, Target(layers=wanted)))
        assert found["b.0"] == 4
        assert found["a.0"] + found["b.0"] >= 6


def test_one_unit_of_one_layer(groups: Groups, units: Units, scores: Tensor) -> None:
    choice = choose(groups, units, Target(one="conv2"))
    gone = (~choice.keep).nonzero()[:, 0]
    family = groups.find("conv2")[0]
    assert gone.tolist() == [int(family.groups[scores[family.groups].argmin()])]


def test_one_that_names_none_several_or_the_last(groups: Groups, units: Units) -> None:
    with pytest.raises(TargetError, match="names 2: conv1, conv2"):
        choose(groups, units, Target(one="conv*"))
    with pytest.raises(TargetError, match="it names 0: conv1, conv2, fc1"):
        choose(groups, units, Target(one="nose"))
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)).eval()
    small = prune(model, torch.randn(2, 3, 4, 4), Target(one="0"), criterion="l1")
    with pytest.raises(Exception, match="no prunable channels"):
        prune(small.model, torch.randn(2, 3, 4, 4), Target(one="0"), criterion="l1")


def test_out_of_reach_says_what_is_reachable(groups: Groups, units: Units) -> None:
    meter = Meter(groups)
    least = meter.of(~units.removed(~units.last))
    with pytest.raises(TargetError, match="out of reach") as caught:
        choose(groups, units, Target(macs=1e-6, params=0.9))
    assert f"macs {least['macs'] / meter.whole['macs']:.3f}" in str(caught.value)
    assert f"params {least['params'] / meter.whole['params']:.3f}" in str(caught.value)
    reachable = least["macs"] / meter.whole["macs"]
    assert choose(groups, units, Target(macs=reachable)).costs["macs"][1] == least["macs"]


def test_out_of_reach_because_of_ignore(groups: Groups, scores: Tensor) -> None:
    few = make_units(groups, scores, ignore=ignored(groups, ["conv*"]))
    with pytest.raises(TargetError, match="ignore less"):
        choose(groups, few, Target(macs=0.3))


def test_gap_is_noted() -> None:
    """Where units are big the nearest network lies well below, and that is said with the numbers."""
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 2, 1)).eval()
    groups = groups_of(model, torch.randn(2, 3, 4, 4))
    coarse = make_units(groups, torch.rand(groups.labels.groups, dtype=torch.float64), round_to=16)
    choice = choose(groups, coarse, Target(macs=0.9))
    assert choice.costs["macs"][1] * 2 == choice.costs["macs"][0]
    assert any(note.startswith(GAP) and "macs=0.9 has 0.500" in note for note in choice.notes)
    assert not choose(groups, coarse, Target(macs=0.5)).notes


class Branches(nn.Module):
    """A cheap and an expensive layer side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.cheap, self.dear = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 7, padding=3)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(torch.cat((self.cheap(x), self.dear(x)), 1)))


def test_refill_puts_back_what_fits() -> None:
    """Cheap channels left first; once an expensive one is gone they may stay."""
    groups = groups_of(Branches().eval(), torch.randn(2, 3, 8, 8))
    scores = torch.ones(groups.labels.groups, dtype=torch.float64)
    scores[groups.find("cheap")[0].groups] = torch.linspace(0.1, 0.2, 8, dtype=torch.float64)
    units, target = make_units(groups, scores), Target(macs=0.8)
    bare, filled = (choose(groups, units, target, refill=n) for n in (0, 64))
    assert kept(groups, bare) == {"cheap": 1, "dear": 3}
    assert kept(groups, filled) == {"cheap": 8, "dear": 3}


def test_ignore_by_layer_family_and_member(groups: Groups) -> None:
    assert int(ignored(groups, ["conv1"]).sum()) == 16
    assert int(ignored(groups, ["conv*", "fc1"]).sum()) == 132
    assert not bool(ignored(groups, []).any())
    assert not bool(ignored(groups, ["fc2"]).any())          # a layer that has nothing to give
    with pytest.raises(TargetError, match=r"'head' matches no layer.*conv1, conv2, fc1"):
        ignored(groups, ["conv1", "head"])


def test_ignore_reaches_layers_that_share_the_channels() -> None:
    """A batch norm's name and that of any layer of a residual stream stand for the whole stream."""
    model, args, _ = ZOO["preact_residual"]()
    groups = groups_of(model, args)
    stream = groups.find("stem")[0]
    for name in ("stem", "bn1", "conv1"):
        assert torch.equal(ignored(groups, [name]).nonzero()[:, 0].sort().values, stream.groups.sort().values)


def test_ignored_channels_stay(groups: Groups, scores: Tensor) -> None:
    few = make_units(groups, scores, ignore=ignored(groups, ["conv2"]))
    choice = choose(groups, few, Target(macs=0.5))
    assert kept(groups, choice)["conv2"] == 16


@pytest.mark.parametrize("what", [*SHARES, "accuracy"])
@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), float("inf"), "half", [0.5]])
def test_no_share(what: str, value: Any) -> None:
    with pytest.raises(TargetError, match=what):
        Target(**{what: value})


@pytest.mark.parametrize(("settings", "words"), [
    ({}, "asks for nothing"),
    ({"layers": {"conv1": 0}}, "layers\\['conv1'\\]=0"),
    ({"layers": {"conv1": 1.01}}, "layers\\['conv1'\\]"),
    ({"max_drop": -1}, "max_drop=-1"),
    ({"max_drop": 101}, "max_drop=101"),
    ({"one": "conv1", "macs": 0.5}, "does not combine"),
    ({"one": "conv1", "layers": {"*": 0.5}}, "does not combine"),
])
def test_contradictions(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        Target(**settings)


def test_unknown_ranking_and_layer(groups: Groups, units: Units) -> None:
    with pytest.raises(TargetError, match="'global', 'layer'"):
        choose(groups, units, Target(macs=0.5), ranking="best")
    with pytest.raises(TargetError, match="matches no prunable layer; there are: conv1, conv2, fc1"):
        choose(groups, units, Target(layers={"fc2": 0.5}))


def test_json_holds_what_was_asked() -> None:
    assert Target(macs=0.5, layers={"a": 0.25}).to_json() == {"macs": 0.5, "layers": {"a": 0.25}}
    assert Target(accuracy=0.9).needs_evaluator
    assert Target(max_drop=0).needs_evaluator
    assert not Target(macs=0.5).needs_evaluator


def test_meter_counts_what_is_left(groups: Groups) -> None:
    """Predicted for a batch of one, from shapes alone: 784 * 16 * 9 and so on."""
    meter = Meter(groups)
    assert meter.whole["macs"] == 784 * 16 * 9 + 196 * 16 * 16 * 9 + 784 * 100 + 1000
    keep = groups.everything()
    keep[groups.find("conv2")[0].groups[3:]] = False
    assert meter.of(keep)["macs"] == 784 * 16 * 9 + 196 * 3 * 16 * 9 + 3 * 49 * 100 + 1000
    assert meter.of(keep)["params"] == (160 + 3 * 145) + (3 * 49 + 1) * 100 + 1010
    assert meter.of(keep)["bytes"] == 4 * meter.of(keep)["params"]
