"""Targets on latency, on machines whose time is a formula: nothing here looks at a clock."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern import api
from prunekern.backends import Lowered
from prunekern.errors import ArtefactError, BackendUnavailable, TargetError
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import as_call
from prunekern.prune.schedule import run
from prunekern.prune.target import Meter, Target, choose
from prunekern.prune.units import Units, make_units
from prunekern.search import LatencyPlanner
from prunekern.search.latency import BAND
from prunekern.search.probe import LoweredProbe, Timed
from prunekern.search.tables import REST, Corrected, Table, Tables, colours, orthogonal, widths_of
from tests.pruning import groups_of

Formula = Callable[[str, float, float], float]


class Net(nn.Module):
    """A residual stream, an inner layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 40, 3), nn.Conv2d(40, 24, 1)
        self.c, self.fc = nn.Conv2d(24, 32, 3), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x[..., 1:-1, 1:-1] + self.b(torch.relu(self.a(x)))
        return self.fc(torch.relu(self.c(x)).mean((2, 3)))


class Machine:
    """A machine whose steps take what a formula of their widths says, and whole networks what ``whole`` makes of it."""

    identity, moved = "a formula", False

    def __init__(self, step: Formula, distorted: Callable[[float], float] = lambda share: share) -> None:
        self.step, self.distorted = step, distorted
        self.tables, self.networks = 0, list[float]()
        self.original: float | None = None

    def steps(self, groups: Groups, keep: Tensor) -> Mapping[str, float]:
        self.tables += 1
        widths = widths_of(groups, Meter(groups).shapes(keep))
        return {name: self.step(name, *pair) for name, pair in widths.items()}

    def whole(self, groups: Groups, keep: Tensor) -> Timed:
        total = math.fsum(self.steps(groups, keep).values())
        self.tables -= 1
        dense = math.fsum(self.steps(groups, groups.everything()).values())
        self.tables -= 1
        self.networks.append(self.distorted(total / dense))
        return Timed(1.0, self.networks[-1])

    def against(self, pruned: Lowered) -> Timed:
        return Timed(1.0, self.networks[-1])


def products(name: str, read: float, written: float) -> float:
    """Time as arithmetic has it: contractions by both widths, other steps by one."""
    if name.startswith(("conv2d", "linear")):
        return 0.02 + read * written
    return 0.01 + 0.1 * written


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def groups(model: nn.Module, inputs: Tensor) -> Groups:
    return groups_of(model, inputs)


@pytest.fixture(scope="module")
def units(groups: Groups) -> Units:
    return make_units(groups, torch.rand(groups.labels.groups, generator=torch.Generator().manual_seed(0),
                                         dtype=torch.float64))


def planner(model: nn.Module, inputs: Tensor, machine: Machine, **options: Any) -> LatencyPlanner:
    return LatencyPlanner(model, inputs, probe=machine, **options)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_orthogonal_arrays_have_every_pair_once():
    for levels in (2, 3, 5, 7):
        runs = np.array(orthogonal(levels))
        assert runs.shape == (levels ** 2, levels + 1)
        assert not runs[0].any()
        for a in range(levels + 1):
            for b in range(a):
                assert len(set(zip(runs[:, a], runs[:, b], strict=True))) == levels ** 2


def test_families_that_meet_have_different_colours(groups: Groups):
    found = colours(groups)
    for members in {m.name: [f for f in groups if any(n.name == m.name for n in f.members)]
                    for family in groups for m in family.members}.values():
        mine = [found[groups.families.index(family)] for family in members]
        assert len(set(mine)) == len(mine)


GRID = [(a, b) for a in (1.0, 0.5, 0.2) for b in (1.0, 0.5, 0.2)]
SCATTERED = [(1.0, 1.0), (0.7, 0.5), (0.5, 0.75), (0.2, 0.6), (0.3, 0.3), (0.6, 0.2)]


@pytest.mark.parametrize("points", [GRID, SCATTERED, [(a, a) for a in (1.0, 0.5, 0.2)],
                                    [(1.0, b) for b in (1.0, 0.6, 0.2)], [(a, 1.0) for a in (1.0, 0.6, 0.2)]], ids=len)
def test_interpolation_is_exact_on_linear_tables(points: list[tuple[float, float]]):
    def seconds(read: float, written: float) -> float:
        return 3.0 + 2.0 * read + 5.0 * written
    table = Table(np.array(points), np.array([seconds(*pair) for pair in points]))
    same, fixed = all(a == b for a, b in points), [len({pair[axis] for pair in points}) == 1 for axis in (0, 1)]
    for read, written in ((0.9, 0.4), (0.35, 0.35), (0.6, 1.0), (1.0, 0.1)):
        read = written if same else 1.0 if fixed[0] else read
        written = 1.0 if fixed[1] else written
        assert table.at(read, written) == pytest.approx(seconds(read, written), rel=1e-6)


def test_interpolation_goes_through_what_was_measured():
    seconds = np.array([9.0, 8.5, 3.0, 6.0, 5.0, 2.0, 4.0, 1.5, 1.0])      # in jumps, as registers fill
    table = Table(np.array(GRID), seconds)
    assert [table.at(*pair) for pair in GRID] == pytest.approx(list(seconds))
    assert table.at(1.0, 0.75) == pytest.approx((9.0 + 8.5) / 2)
    assert table.at(0.75, 0.75) == pytest.approx((9.0 + 8.5 + 6.0 + 5.0) / 4)
    assert table.at(0.0, 0.0) >= 0


def test_tables_predict_products_exactly(model: nn.Module, inputs: Tensor, groups: Groups, units: Units):
    machine = Machine(products)
    tables = planner(model, inputs, machine).tables(groups, units)
    assert machine.tables == 9
    meter = Meter(groups)
    for seed in range(5):
        gone = torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < 0.5
        keep = ~units.removed(gone & ~units.last)
        exact = machine.whole(groups, keep).share
        assert tables.share(meter.shapes(keep)) == pytest.approx(exact)
    assert tables.share(meter.shapes(groups.everything())) == pytest.approx(1.0)


def test_steps_that_are_not_seen_everywhere_count_with_the_rest(groups: Groups):
    meter = Meter(groups)
    dense, = (widths_of(groups, meter.shapes(groups.everything())),)
    tables = Tables.of(groups, [(dense, {"conv2d": 3.0, "fused away": 1.0, REST: 0.5}),
                                (dense, {"conv2d": 2.0, "linear": 1.0, REST: 0.25})])
    assert set(tables.steps) == {"conv2d", REST}
    assert tables.dense == pytest.approx(2.5 + (1.5 + 1.25) / 2)


# ---- correction ------------------------------------------------------------------------------------------------------


def test_correction_goes_through_what_is_known_and_never_falls():
    known = Corrected()
    assert [known.at(x) for x in (1.0, 0.5, 0.1)] == pytest.approx([1.0, 0.5, 0.1])
    known.add(0.5, 0.7)
    assert [known.at(x) for x in (1.0, 0.75, 0.5, 0.25)] == pytest.approx([1.2, 0.95, 0.7, 0.35])
    known.add(0.6, 0.6)                                 # noise
    shares = [known.at(x / 50) for x in range(1, 51)]
    assert all(a <= b + 1e-12 for a, b in pairwise(shares))


@pytest.mark.parametrize("limit", [0.8, 0.5, 0.3, 0.15])
def test_target_is_met_where_the_tables_are_right(model: nn.Module, inputs: Tensor, groups: Groups, units: Units,
                                                  limit: float):
    machine = Machine(products)
    choice = planner(model, inputs, machine)(groups, units, Target(latency=limit))
    assert limit * (1 - BAND) <= machine.whole(groups, choice.keep).share <= limit
    assert len(machine.networks) <= 3                   # one of them just now
    assert not any("missed" in note or "below" in note for note in choice.notes)


@pytest.mark.parametrize("distorted", [lambda s: s ** 0.5, lambda s: 0.3 + 0.7 * s, lambda s: s ** 2,
                                       lambda s: 0.6 * s if s < 0.9 else s], ids=["root", "overhead", "square", "jump"])
@pytest.mark.parametrize("limit", [0.52, 0.45])
def test_measuring_the_whole_corrects_wrong_tables(model: nn.Module, inputs: Tensor, groups: Groups, units: Units,
                                                   distorted: Callable[[float], float], limit: float):
    machine = Machine(products, distorted)
    choice = planner(model, inputs, machine)(groups, units, Target(latency=limit))
    assert limit * (1 - BAND) <= machine.whole(groups, choice.keep).share <= limit
    assert any(f"at most {limit:g} was asked for" in note for note in choice.notes)


def test_latency_that_does_not_fall_is_refused_with_the_best_that_was_measured(
        model: nn.Module, inputs: Tensor, groups: Groups, units: Units):
    machine = Machine(products, lambda share: 0.8 + 0.2 * share)
    with pytest.raises(TargetError, match=r"latency=0\.5 is out of reach.*takes 0\.8[01]\d of the lowered original"):
        planner(model, inputs, machine)(groups, units, Target(latency=0.5))
    assert min(machine.networks) < 0.82


def test_time_in_jumps_is_met_from_below_and_said(model: nn.Module, inputs: Tensor, groups: Groups, units: Units):
    machine = Machine(products, lambda share: 0.3 if share < 0.6 else 0.95)
    choice = planner(model, inputs, machine)(groups, units, Target(latency=0.5))
    assert machine.whole(groups, choice.keep).share == 0.3
    assert any("40.0% below" in note and "0.950" in note for note in choice.notes)


def test_combines_with_other_shares_and_layers(model: nn.Module, inputs: Tensor, groups: Groups, units: Units):
    machine = Machine(products)
    tight = planner(model, inputs, machine)(groups, units, Target(latency=0.9, macs=0.2))
    assert tight.costs["macs"][1] <= 0.2 * tight.costs["macs"][0]
    assert any("because macs=0.2 asks for less" in note for note in tight.notes)
    loose = planner(model, inputs, machine)(groups, units, Target(latency=0.3, params=0.95))
    assert 0.3 * (1 - BAND) <= machine.whole(groups, loose.keep).share <= 0.3
    layered = planner(model, inputs, machine)(groups, units, Target(latency=0.5, layers={"a": 0.25}))
    assert int(layered.keep[groups.find("a")[0].groups].sum()) <= 10
    assert machine.whole(groups, layered.keep).share <= 0.5
    with pytest.raises(TargetError, match="out of reach"):
        planner(model, inputs, machine)(groups, units, Target(latency=0.5, macs=1e-9))


def test_everything_stays_where_nothing_has_to_get_faster(model: nn.Module, inputs: Tensor, groups: Groups,
                                                          units: Units):
    machine = Machine(products)
    assert bool(planner(model, inputs, machine)(groups, units, Target(latency=1.0)).keep.all())
    assert not machine.networks


def test_tables_are_kept_network_by_network(model: nn.Module, inputs: Tensor, groups: Groups, units: Units,
                                            tmp_path: Path):
    class Dying(Machine):
        def steps(self, groups: Groups, keep: Tensor) -> Mapping[str, float]:
            if self.tables == 4:
                raise KeyboardInterrupt
            return super().steps(groups, keep)
    with pytest.raises(KeyboardInterrupt):
        planner(model, inputs, Dying(products), checkpoint=tmp_path).tables(groups, units)
    again = Machine(products)
    found = planner(model, inputs, again, checkpoint=tmp_path).tables(groups, units)
    assert again.tables == 5
    assert found.dense == pytest.approx(planner(model, inputs, Machine(products)).tables(groups, units).dense)
    other = Machine(products)
    other.identity = "another machine"  # type: ignore[misc]
    with pytest.raises(ArtefactError, match="other machine"):
        planner(model, inputs, other, checkpoint=tmp_path).tables(groups, units)
    (file,) = tmp_path.glob("latency-*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "figures": 3}))
    with pytest.raises(ArtefactError, match="damaged"):
        planner(model, inputs, Machine(products), checkpoint=tmp_path).tables(groups, units)


def test_the_same_graph_traced_again_uses_the_same_tables(model: nn.Module, inputs: Tensor, units: Units,
                                                          groups: Groups):
    machine = Machine(products)
    plan = planner(model, inputs, machine)
    plan(groups, units, Target(latency=0.5))
    choice = plan(groups_of(model, inputs), units, Target(latency=0.3))
    assert machine.tables == 9
    assert 0.3 * (1 - BAND) <= machine.networks[-1] <= 0.3
    assert not bool(choice.keep.all())


# ---- around it -------------------------------------------------------------------------------------------------------


def test_targets_are_checked():
    for words, settings in (("not a share", {"latency": 0}), ("on='cpu' says where", {"macs": 0.5, "on": "cpu"}),
                            ("no device", {"latency": 0.5, "on": "gpu"}), ("known: 'macs'", {"accuracy": 0.5,
                                                                                              "minimise": "time"}),
                            ("drop it, or the shares", {"accuracy": 0.5, "macs": 0.5, "minimise": "params"}),
                            ("drop it, or the shares", {"macs": 0.5, "minimise": "params"}),
                            ("asks for nothing", {"on": "cpu"}), ("does not combine", {"one": "a", "latency": 0.5})):
        with pytest.raises(TargetError, match=words):
            Target(**settings)  # type: ignore[arg-type]
    assert Target(latency=0.5, on="cuda:1").to_json() == {"latency": 0.5, "on": "cuda:1"}
    assert Target(accuracy=0.5, minimise="latency", on="cpu").timed


def test_without_measuring_there_is_no_target_on_latency(groups: Groups, units: Units):
    with pytest.raises(TargetError, match=r"takes measuring.*compress"):
        choose(groups, units, Target(latency=0.5))
    with pytest.raises(TargetError, match=r"1\.0 first"):
        planner(nn.Linear(2, 2), torch.ones(1, 2), Machine(products), levels=(0.5, 1.0))


def test_steps_aim_at_shares_of_the_original(model: nn.Module, inputs: Tensor, groups: Groups):
    """In each step, latency is a share of the very original's, whatever was cut before."""
    class Original(Machine):
        dense = 0.0

        def whole(self, groups: Groups, keep: Tensor) -> Timed:
            widths = {f.name: int(keep[f.groups].sum()) for f in groups}
            total = widths["stem"] * widths["a"] + widths["c"] * widths["stem"]
            self.dense = self.dense or sum((24 * 40, 24 * 32))
            self.networks.append(total / self.dense)
            return Timed(1.0, self.networks[-1])
    machine = Original(products)
    outcome = run(model, groups, Target(latency=0.25), steps=2, schedule="linear",
                  planner=planner(model, inputs, machine))
    assert [step.shares["latency"] for step in outcome.steps] == [pytest.approx(0.625), 0.25]
    after = {name: len(outcome.plan.kept[f"{name}.weight"][0]) for name in ("stem", "a", "c")}
    left = (after["stem"] * after["a"] + after["c"] * after["stem"]) / (24 * 40 + 24 * 32)
    assert left <= 0.25
    assert left > 0.15


def test_compress_measures_and_reports(model: nn.Module, inputs: Tensor, monkeypatch: pytest.MonkeyPatch,
                                       tmp_path: Path):
    machine = Machine(products)
    monkeypatch.setattr(api, "LatencyPlanner", lambda *a, **k: LatencyPlanner(*a, probe=machine, **k))
    result = pk.compress(model, inputs, Target(latency=0.5, on="cpu"), lower=False, checkpoint=tmp_path)
    share = result.metrics["latency, share"]
    assert 0.5 * (1 - BAND) <= share <= 0.5
    assert any("latency left" in figure.label for figure in result.report.headline)
    assert result.plan.target["latency"] == 0.5
    assert list(tmp_path.glob("latency-*.json"))


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from prunekern.cli.app import run as command
    monkeypatch.setattr(api, "LatencyPlanner", lambda *a, **k: LatencyPlanner(*a, probe=Machine(products), **k))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timednet.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(1, 30, 3), nn.ReLU(), "
        "nn.Conv2d(30, 30, 3), nn.ReLU(), nn.Conv2d(30, 4, 1)).eval()\n")
    common = ["compress", "timednet:net", "--input", "2x1x8x8", "--json", "--quiet", "--no-lower"]
    assert command([*common, "--latency", "0.5", "--on", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"]["latency"] == 0.5
    assert 0.5 * (1 - BAND) <= found["metrics"]["latency, share"] <= 0.5
    assert command([*common, "--on", "cpu"]) == 1
    assert "asks for nothing" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["latency", "params", "macs"])
def test_accuracy_makes_the_cost_smallest_that_is_named(model: nn.Module, inputs: Tensor, what: str,
                                                        monkeypatch: pytest.MonkeyPatch):
    machine = Machine(products)
    monkeypatch.setattr(api, "LatencyPlanner", lambda *a, **k: LatencyPlanner(*a, probe=machine, **k))

    def accuracy(candidate: nn.Module) -> float:
        return 0.5 + 0.5 * min(1.0, sum(p.numel() for p in candidate.parameters()) / 14_000)
    result = pk.compress(model, inputs, Target(accuracy=0.8, minimise=what), validate=accuracy, lower=False)
    words = api.COSTS[what]
    assert any(f"the share of {words} was bisected" in note for note in result.notes)
    assert result.metrics["validation accuracy, compressed"] >= 0.8
    assert bool(machine.networks) == (what == "latency")
    assert ("latency, share" in result.metrics) == (what == "latency")


def test_a_real_network_is_taken_apart_and_measured(model: nn.Module, inputs: Tensor, groups: Groups, units: Units):
    """The probe's own side: names of steps are those of the graph, and the whole runs (how fast is nobody's matter)."""
    probe = LoweredProbe(model, as_call(model, inputs), seconds=0.01)
    keep = ~units.removed(torch.arange(len(units)) % 2 == 0)
    seconds = probe.steps(groups, keep)
    assert {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "linear", REST} <= set(seconds)
    assert all(each >= 0 for each in seconds.values())
    timed = probe.whole(groups, keep)
    assert timed.dense > 0 < timed.pruned
    assert "batch 2" in timed.how
    torch.testing.assert_close(probe.dense(inputs), model(inputs), rtol=1e-3, atol=1e-3)
    small = probe.network(groups, keep).program
    assert sum(w.numel() for w in small.weights.values()) < sum(p.numel() for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_device_that_is_not_there(model: nn.Module, inputs: Tensor):
    with pytest.raises(BackendUnavailable, match="finds 0 CUDA devices"):
        pk.compress(model, inputs, Target(latency=0.5, on="cuda:0"))
