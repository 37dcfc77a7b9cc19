"""Sensitivity to sparsity, sparsities chosen by it, weight histograms, and channels compared with single weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern import compare as comparing
from prunekern.analysis.sparsity import SparsePoint, SparsityScan, choose, sparsity_scan
from prunekern.analysis.weights import weights_of
from prunekern.backends.lowered import Lowered
from prunekern.compare import compare
from prunekern.errors import ArtefactError, InputError, LoweringError, ModelError, PrunekernError, TargetError
from prunekern.prune.sparse import magnitude, masked, prunable, zeros_of
from prunekern.prune.sparse_file import sizes
from prunekern.report import Report, WeightRow, html
from prunekern.train import accuracy
from tests.report_sample import Page, hostile, png_size, sample
from tests.training import blobs, network, train


def trained() -> nn.Module:
    model = network(dropout=0.0)
    train(model, epochs=6)
    return model.eval()


def points(layer: str, weights: int, *curve: tuple[float, float]) -> tuple[SparsePoint, ...]:
    return tuple(SparsePoint(layer, share, round(share * weights), weights, value) for share, value in curve)


# ---- the scan --------------------------------------------------------------------------------------------------------


def test_each_point_is_that_layer_alone() -> None:
    model, test = trained(), blobs(200, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[str] = []
    scan = sparsity_scan(model, test, sparsities=(0.5, 0.95), tell=told.append)
    assert scan.dense == accuracy(model, test)
    assert [(p.layer, p.sparsity) for p in scan.points] == [(layer, s) for layer in ("0.weight", "4.weight")
                                                            for s in (0.5, 0.95)]
    for point in scan.points:
        masks = magnitude(model, point.sparsity, layers=point.layer)
        assert (point.removed, point.weights) == (masks.zeros, masks.weights)
        assert point.accuracy == accuracy(masked(model, masks), test)
    assert min(p.accuracy for p in scan.points) < scan.dense - 0.05         # else it would compare nothing
    assert told == ["0.weight (1/2)", "4.weight (2/2)"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert scan.to_json()["points"][0]["layer"] == "0.weight"
    assert f"{scan.dense:.2%}" in str(scan)


def test_batches_and_evaluators_give_the_same() -> None:
    model, test = trained(), blobs(100, 5)
    whole = sparsity_scan(model, test, sparsities=(0.9,))
    model.train()
    parts = [(test[0][:30], test[1][:30]), (test[0][30:], test[1][30:])]
    assert sparsity_scan(model, parts, sparsities=(0.9,)) == whole
    assert sparsity_scan(model, lambda module: accuracy(module, test), sparsities=(0.9,)) == whole
    assert model.training


class StoppedError(Exception):
    pass


def test_a_scan_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, test = trained(), blobs(60, 5)
    whole = sparsity_scan(model, test, sparsities=(0.5, 0.9))
    path, calls = tmp_path / "deep" / "scan.json", []

    def measure(module: nn.Module, most: int = 99) -> float:
        if len(calls) == most:
            raise StoppedError
        calls.append(1)
        return accuracy(module, test)
    with pytest.raises(StoppedError):
        sparsity_scan(model, lambda module: measure(module, 3), sparsities=(0.5, 0.9), checkpoint=path)
    assert sparsity_scan(model, lambda module: measure(module), sparsities=(0.5, 0.9), checkpoint=path) == whole
    assert len(calls) == 5                    # the untouched network, two layers at two sparsities
    more = sparsity_scan(model, lambda module: measure(module), sparsities=(0.5, 0.7, 0.9), checkpoint=path)
    assert len(calls) == 7
    assert set(whole.points) < set(more.points)
    with pytest.raises(ArtefactError, match="another model"):
        sparsity_scan(network(3), measure, checkpoint=path)
    with pytest.raises(ArtefactError, match="another data"):
        sparsity_scan(model, test, checkpoint=path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ArtefactError, match="damaged"):
        sparsity_scan(model, measure, checkpoint=path)
    path.write_text(json.dumps({"format": "else", "version": 1, "identity": {}, "accuracies": {}}))
    with pytest.raises(ArtefactError, match="no scan checkpoint"):
        sparsity_scan(model, measure, checkpoint=path)


def test_a_killed_scan_resumes(tmp_path: Path) -> None:
    """A real SIGKILL, in a process of its own, in the middle of a scan."""
    script = f"""
        import os, signal, sys, torch
        sys.path.insert(0, {os.getcwd()!r})
        torch.set_num_threads(1)
        from prunekern.analysis.sparsity import sparsity_scan
        from tests.training import blobs, network
        def stop(name):
            if name.startswith("4."):
                os.kill(os.getpid(), signal.SIGKILL)
        place = {str(tmp_path / "s")!r}
        sparsity_scan(network().eval(), blobs(30, 2), sparsities=(0.5, 0.9), checkpoint=place, tell=stop)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(json.loads((tmp_path / "s").read_text())["accuracies"]) == 3
    found = sparsity_scan(network().eval(), blobs(30, 2), sparsities=(0.5, 0.9), checkpoint=tmp_path / "s")
    assert found == sparsity_scan(network().eval(), blobs(30, 2), sparsities=(0.5, 0.9))


def test_what_a_scan_refuses() -> None:
    model, test = network(), blobs(30)
    with pytest.raises(InputError, match="needs data"):
        sparsity_scan(model, None)
    with pytest.raises(InputError, match="data with labels"):
        sparsity_scan(model, [test[0]])
    with pytest.raises(InputError, match="expected an accuracy"):
        sparsity_scan(model, lambda module: 93.4)
    for share in (0.0, 1.0, -1):
        with pytest.raises(TargetError, match="sparsities="):
            sparsity_scan(model, test, sparsities=(share,))
    with pytest.raises(TargetError, match="matches no weight"):
        sparsity_scan(model, test, layers="7")
    with pytest.raises(TargetError, match="max_drop=-1"):
        choose(model, SparsityScan(0.9, ()), test, -1)


# ---- what to make of it ----------------------------------------------------------------------------------------------


SCAN = SparsityScan(0.9, (*points("a", 100, (0.5, 0.9), (0.8, 0.87), (0.9, 0.6)),
                          *points("b", 1000, (0.5, 0.89), (0.8, 0.92), (0.9, 0.8))))


def test_sparsities_within_a_drop() -> None:
    assert SCAN.within(0) == {"a": 0.5, "b": 0.0}
    assert SCAN.within(3) == pytest.approx({"a": 0.8, "b": 0.8 + 0.1 * 0.05 / 0.12})
    assert SCAN.within(0.5) == pytest.approx({"a": 0.5 + 0.3 * 0.005 / 0.03, "b": 0.25})    # b recovers by luck only
    assert SCAN.within(100) == {"a": 0.9, "b": 0.9}


def test_the_cheapest_zeros_go_first() -> None:
    """Drops per zero: a is free up to 50, then 0.03 / 30, then 0.027; b 0.01 / 800, then 0.09 / 100."""
    assert SCAN.cheapest(0.0) == {"a": 0.0, "b": 0.0}
    assert SCAN.cheapest(50 / 990) == pytest.approx({"a": 0.5, "b": 0.0})
    assert SCAN.cheapest(450 / 990) == pytest.approx({"a": 0.5, "b": 0.4})
    assert SCAN.cheapest(900 / 990) == pytest.approx({"a": 0.5, "b": 0.85})
    assert SCAN.cheapest(1.0) == {"a": 0.9, "b": 0.9}


def test_zeros_that_come_free_after_dear_ones_are_not_free() -> None:
    """Of c the first 50 cost 0.05 and the next 40 nothing: 90 for 0.05, less each than those of d at 0.07 for 90."""
    scan = SparsityScan(0.9, (*points("c", 100, (0.5, 0.85), (0.9, 0.85)), *points("d", 100, (0.9, 0.83))))
    assert scan.cheapest(100 / 180) == pytest.approx({"c": 0.9, "d": 0.1})


def test_tolerances_begin_with_what_costs_nothing() -> None:
    assert SCAN.tolerated(0.25) == pytest.approx({"a": 0.25, "b": 0.0})
    assert SCAN.tolerated(0.5) == SCAN.within(0)
    assert SCAN.tolerated(1.0) == SCAN.within(30)


@pytest.mark.parametrize("drop", [0.0, 1.0, 5.0, 100.0])
def test_chosen_sparsities_keep_the_accuracy(drop: float) -> None:
    model, test = trained(), blobs(300, 5)
    scan = sparsity_scan(model, test, sparsities=(0.3, 0.5, 0.7, 0.9))
    told: list[str] = []
    found = choose(model, scan, test, drop, tell=told.append)
    assert found.dense == accuracy(model, test)
    assert found.accuracy == accuracy(masked(model, found.masks), test) >= found.dense - drop / 100 - 1e-9
    assert found.masks.removed() == magnitude(model, dict(found.sparsities)).removed()
    good = [share for share, value in found.tried if value >= found.dense - drop / 100]
    assert found.masks.sparsity == max(good, default=0.0)
    assert len(told) == len(found.tried)
    if drop == 100:
        assert len(found.tried) == 1
        assert set(found.sparsities.values()) == {0.9}
    else:
        assert len(found.tried) == 17
    if drop >= 1:
        assert found.masks.sparsity > 0.3
    assert f"{found.accuracy:.2%}" in str(found)


def test_nothing_goes_where_nothing_may() -> None:
    """Every zero costs: what is left is the network itself."""
    model = network()
    calls: list[int] = []

    def measure(module: nn.Module) -> float:
        calls.append(1)
        return 0.9 if zeros_of(module).zeros == 0 else 0.1
    scan = sparsity_scan(model, measure, sparsities=(0.5,))
    found = choose(model, scan, measure, 1.0)
    assert (found.masks.zeros, found.accuracy) == (0, 0.9)
    assert set(found.sparsities.values()) == {0.0}


def test_the_scan_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    many = SparsityScan(0.9, tuple(p for i in range(14) for p in points(f"layer{i}", 10, (0.5, 0.8), (0.9, 0.3))))
    width, height = png_size(many.plot(tmp_path / "scan.png").read_bytes())
    assert width > height > 600
    report = many.report("Net")
    assert [len(curve.series) for curve in report.curves] == [6, 6, 2]
    assert report.curves[0].series["layer0"] == ((0.0, 0.9), (0.5, 0.8), (0.9, 0.3))
    assert report.tables[0].rows[13] == ("layer13", 10, "80.00%", "30.00%")


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weights_before_and_after() -> None:
    model = network()
    masks = magnitude(model, 0.75)
    found = weights_of(model, masks, bins=20)
    assert found == weights_of(model, masked(model, masks), bins=20)
    assert [layer.name for layer in found.layers] == ["0.weight", "4.weight"]
    assert (found.weights, found.zeros) == (masks.weights, masks.zeros)
    assert found.others == sum(p.numel() for p in model.parameters()) - masks.weights
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    for layer in found.layers:
        value, kept = prunable(model)[layer.name].detach().double(), masks.kept[layer.name]
        left = value[kept]
        assert (layer.zeros_before, layer.zeros) == (0, int((~kept).sum()))
        assert sum(layer.counts_before) == value.numel()
        assert sum(layer.counts) == left.numel()
        assert list(layer.counts) == torch.histogram(left, torch.tensor(layer.edges).double())[0].long().tolist()
        assert layer.counts[9] == layer.counts[10] == 0 < layer.counts_before[9]
        assert (layer.smallest, layer.largest) == (float(left.min()), float(left.max()))
        assert layer.magnitudes[0] == pytest.approx(float(left.abs().quantile(0.5)))
        assert layer.std == pytest.approx(float(left.std(correction=0)))
        assert layer.edges[-1] == -layer.edges[0] == pytest.approx(float(value.abs().max()))
    alone = weights_of(model)
    assert not alone.compared
    assert alone.layers[0].counts == alone.layers[0].counts_before
    assert len(alone.layers[0].counts) == 11                # as many as 128 weights give sense to
    assert "75.00%" in str(found)
    assert found.to_json()["layers"][0]["zeros"] == 96


def test_weights_that_are_all_gone_and_refusals() -> None:
    layer = nn.Linear(3, 2)
    empty = weights_of(layer, magnitude(layer, 0.99)).layers[0]
    assert (empty.zeros, empty.mean, empty.std, empty.magnitudes) == (6, 0.0, 0.0, (0.0, 0.0, 0.0))
    assert sum(empty.counts) == 0
    with pytest.raises(ModelError, match="of another shape"):
        weights_of(layer, nn.Linear(3, 4))
    with pytest.raises(InputError, match="bins=0"):
        weights_of(layer, bins=0)
    with pytest.raises(PrunekernError, match="3 edges for 1 and 2 bins"):
        WeightRow("a", 1, 0, 0, (0, 1, 2), (1,), (1, 0))


def test_weights_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = network()
    found = weights_of(model, magnitude(model, 0.9))
    files = found.plot(tmp_path)
    assert [path.name for path in files] == ["weights.png", "histograms.png"]
    for path in files:
        assert min(png_size(path.read_bytes())) > 200
    report = found.report("Net")
    assert Report.from_json(report.to_json()) == report
    page = Page(html.render(report))
    assert "weights" in page.ids
    assert "0.weight" in page.text
    drawn = [value for tag, name, value in page.attributes if tag == "path" and name == "d"]
    assert sum(path.startswith("M0,100V") and path.endswith("Z") for path in drawn) == 4    # two layers, twice each
    nasty = hostile(sample(weights=tuple(found.rows())))
    assert "<script>alert('x')</script>" in Page(html.render(nasty)).text
    saved = report.save(tmp_path / "report")
    assert {"weights.png", "histograms.png", "index.html"} <= {path.name for path in saved.files}
    empty = Report("empty", weights=(WeightRow("a", 0, 0, 0, (-1, 1), (0,), (0,)),))
    Page(html.render(empty))
    empty.save(tmp_path / "empty")


# ---- the comparison --------------------------------------------------------------------------------------------------


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    patterns = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    return patterns[labels] + torch.randn(count, 1, 8, 8, generator=generator), labels


def learnt() -> nn.Module:
    model = Images()
    train(model, images(120, 1), epochs=4)
    return model.eval()


def test_channels_and_single_weights_measured_alike(tmp_path: Path) -> None:
    model = learnt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[str] = []
    options: dict[str, Any] = {
        "validate": images(90, 2), "test": images(90, 3), "train": images(120, 1), "shares": (0.5, 0.0001),
        "sparsities": (0.8,), "fit": {"epochs": 2, "lr": 0.02, "batch_size": 30}, "seconds": 0.0,
        "checkpoint": tmp_path / "ck"}
    found = compare(model, **options, tell=told.append)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    original, structured, sparse, pattern = found.contenders
    assert [c.kind for c in found.contenders] == ["original", "structured", "unstructured", "N:M"]
    macs = 36 * 9 * 8 + 16 * 72 * 12 + 192 * 3
    assert original.macs == original.useful_macs == original.lowered_macs == sparse.macs == pattern.macs == macs
    assert original.accuracy == original.pruned_accuracy == accuracy(model, images(90, 2))
    assert structured.macs == structured.useful_macs == structured.lowered_macs <= macs / 2
    assert structured.parameters == structured.nonzero < original.parameters
    # Zeros: a fifth of each layer's weights is left, exactly; and all parameters are still there.
    left = {"conv1": 72 - 58, "conv2": 864 - 691, "fc": 576 - 461}
    useful = 36 * left["conv1"] + 16 * left["conv2"] + left["fc"]
    assert (sparse.useful_macs, sparse.parameters) == (useful, original.parameters)
    assert sparse.nonzero == sum(left.values()) + 8 + 12 + 3
    assert sparse.bytes == min(vars(sparse.sizes).values()) < original.bytes < original.sizes.dense
    assert original.sizes == sizes(model)
    assert pattern.nonzero - 23 == 72 + 864 // 2 + 576 // 2          # one input channel: a block of one stays
    assert {row.contender for row in found.latency} == {c.name for c in found.contenders}
    assert all(c.latency and c.latency > 0 for c in found.contenders)
    assert any("out of reach" in note for note in found.notes)
    assert any("sparse tensor cores" in note for note in found.notes)
    assert "2:4: train" in told
    again = compare(model, **options, tell=told.append)
    assert [(c.name, c.accuracy, c.test_accuracy, c.sizes) for c in again.contenders] == \
        [(c.name, c.accuracy, c.test_accuracy, c.sizes) for c in found.contenders]
    _check_report(found, tmp_path)


def _check_report(found: comparing.Comparison, folder: Path) -> None:
    report = found.report()
    assert Report.from_json(report.to_json()) == report
    assert [point.macs for point in report.pareto] == [c.run_macs for c in found.contenders]
    assert [point.accuracy for point in report.pareto] == [c.accuracy for c in found.contenders]
    assert set(report.curves[0].series) == {"original", "structured", "unstructured", "N:M"}
    assert len(report.tables[0].rows) == 4
    names = {path.name for path in report.save(folder / "report").files}
    assert {"index.html", "report.json", "pareto.png", "curves.png", "latency.png"} <= names
    assert len(json.loads(json.dumps(found.to_json()))["contenders"]) == 4
    assert "by zero" in str(found)


def test_dead_channels_vanish_in_the_lowered_network() -> None:
    """So sparse that whole filters are gone: lowering leaves them out, and the chart shows what is carried out."""
    model = learnt()
    with torch.no_grad():
        model.conv1.weight[:4] *= 1e-3
    found = compare(model, images(4, 2)[0], validate=images(30, 2), shares=(), sparsities=(0.5,), patterns=(),
                    seconds=0.0)
    original, sparse = found.contenders
    assert sparse.lowered_macs is not None
    assert sparse.lowered_macs == sparse.run_macs < sparse.macs == original.macs
    assert sparse.accuracy == sparse.pruned_accuracy        # nothing was trained


def test_what_cannot_be_lowered_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Lowered:
        raise LoweringError("no rule")
    monkeypatch.setattr(comparing, "lower_network", refuse)
    found = compare(learnt(), validate=images(30, 2), shares=(0.5,), sparsities=(), patterns=())
    assert found.latency == ()
    assert found.contenders[0].lowered_macs is None
    assert found.contenders[1].run_macs == found.contenders[1].macs
    assert sum("was not lowered: no rule" in note for note in found.notes) == 2
    assert "µs lowered" not in found.report().tables[0].columns


def test_what_a_comparison_refuses() -> None:
    with pytest.raises(InputError, match="validate="):
        compare(learnt(), validate=None)
    with pytest.raises(InputError, match="recalibrate"):
        compare(learnt(), validate=images(30, 2), recalibrate=True)
