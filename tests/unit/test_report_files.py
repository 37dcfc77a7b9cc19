"""The report's outputs: files written all or none, missing extras, the terminal."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prunekern.errors import ArtefactError
from prunekern.report import Check, LayerRow, ParetoPoint, Proof, Report, html, plots, save, show, units
from tests.report_sample import hostile, png_size, sample


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for matplotlib where only the writing of the files matters."""
    count = itertools.count()
    monkeypatch.setattr(plots, "render", lambda report: {name: b"%d" % next(count) for name in plots.NAMES})


def test_save_writes_every_file(tmp_path: Path) -> None:
    report = sample()
    saved = save(report, tmp_path / "new" / "report")
    names = {path.name for path in saved.files}
    pngs = {"pareto.png", "layers.png", "triplets.png", "latency.png", "curves.png"}
    assert names == pngs | {"index.html", "report.json", "triplets.csv"}
    assert names == set(contents(saved.folder))
    assert saved.skipped == ()
    assert Report.from_json((saved.folder / "report.json").read_text(encoding="utf-8")) == report
    for name in pngs:
        width, height = png_size((saved.folder / name).read_bytes())
        assert width >= 900
        assert height >= 300


@pytest.mark.usefixtures("small_plots")
def test_csv_holds_full_precision(tmp_path: Path) -> None:
    report = sample()
    report.save(tmp_path)
    with open(tmp_path / "triplets.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.triplets)
    for row, step in zip(rows, report.triplets, strict=True):
        assert float(row["after_retraining"]) == step.after_retraining
        assert float(row["drop_points"]) == step.drop
        assert row["accepted"] == str(step.accepted)
        assert int(row["macs"]) == step.macs


def test_hostile_names_reach_the_plots_unharmed(tmp_path: Path) -> None:
    formula = LayerRow(r"$\frac$", "op", 2, 1, 2, 1, 2, 1)
    saved = save(dataclasses.replace(hostile(sample()), layers=(formula,)), tmp_path)
    assert len(saved.files) == 8


def test_files_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    save(sample(), tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    save(Report("smaller"), tmp_path)
    assert set(contents(tmp_path)) == {"report.json", "index.html", "mine.txt"}


@pytest.mark.usefixtures("small_plots")
@pytest.mark.parametrize("call", [1, 2, 5, 8])
@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_a_failure_in_the_middle_leaves_the_old_report(
    operation: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(sample(title="old"), tmp_path)
    before = contents(tmp_path)
    real, calls = getattr(os, operation), []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, operation, failing)
    with pytest.raises(ArtefactError, match=r"No space left.*unchanged"):
        save(sample(title="new"), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("small_plots")
def test_a_failure_while_rendering_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(sample(title="old"), tmp_path)
    before = contents(tmp_path)

    def broken(report: Report) -> str:
        raise RuntimeError("template")

    monkeypatch.setattr(html, "render", broken)
    with pytest.raises(RuntimeError, match="template"):
        save(sample(title="new"), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("small_plots")
def test_a_failure_in_a_fresh_folder_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(sample(), tmp_path)
    assert contents(tmp_path) == {}


def test_a_file_in_the_folders_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file")
    with pytest.raises(ArtefactError, match="could not be written"):
        save(Report("x"), tmp_path / "report")


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_get_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    save(Report("x"), tmp_path)
    expected = (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "index.html").stat().st_mode == expected


# Missing extras


@pytest.mark.parametrize(
    ("package", "missing"),
    [
        ("jinja2", {"index.html"}),
        ("matplotlib", {"pareto.png", "layers.png", "triplets.png", "latency.png", "curves.png"}),
    ],
)
def test_a_missing_extra_is_named_and_the_rest_is_written(
    package: str, missing: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = sample(triplets=sample().triplets[:20])
    full = {path.name for path in save(report, tmp_path).files}
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.warns(UserWarning, match=rf"{package}.*pip install 'prunekern\[report\]'"):
        saved = save(report, tmp_path)
    assert {path.name for path in saved.files} == full - missing
    assert set(contents(tmp_path)) == full - missing
    assert len(saved.skipped) == 1
    assert Report.from_json((tmp_path / "report.json").read_text(encoding="utf-8")) == report


def test_importing_the_report_layer_imports_no_extra() -> None:
    code = (
        "import sys, prunekern; before = set(sys.modules); import prunekern.report\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'rich', 'matplotlib', 'jinja2', 'plotly', 'torch', 'numpy'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Terminal


def printed(report: Report, **options: Any) -> str:
    stream = io.StringIO()
    show(report, file=stream, **options)
    return stream.getvalue().replace(units.NBSP, " ")


@pytest.mark.parametrize("rich", [True, False])
def test_show_holds_the_figures(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    report = sample()
    text = printed(report)
    assert ("─" in text) is rich
    for expected in (
        report.title,
        "89",
        "1.33 M → 290 k",
        "≤ 1e-10",
        "53.5 µs",
        "3.40×",
        "576×7×72",
        "chosen",
    ):
        assert expected in text
    assert "Verified: all 5 checks" in text
    assert text.count("undone") >= 4
    assert "138 more steps" in text
    full = printed(report, full=True)
    assert "more steps" not in full
    assert "2.13.0+cpu" in full
    assert full.count(" kept") > 140


@pytest.mark.parametrize("rich", [True, False])
def test_show_prints_names_as_they_are(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    text = printed(Report("[bold]t", layers=(LayerRow("[red]x[/red]\x1b[2J", "op", 1, 1, 1, 1, 1, 1),)))
    assert "[bold]t" in text
    assert "[red]x[/red]\\x1b[2J" in text
    assert "\x1b[2J" not in text


def test_show_says_a_failed_proof() -> None:
    text = printed(Report("x", proof=Proof({"a": Check(2, 1)})))
    assert "NOT VERIFIED: 1 of 1 checks missed" in text
    assert "FAILED" in text


def test_show_names_a_chosen_network_off_the_front() -> None:
    points = (ParetoPoint("good", 1, 0.9), ParetoPoint("mine", 2, 0.8, chosen=True))
    assert "chosen, off the front" in printed(Report("x", pareto=points))


def test_show_keeps_the_minus_on_a_stream_without_unicode() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252")
    show(sample(), file=stream, full=True)
    stream.flush()
    text = raw.getvalue().decode("cp1252")
    assert "1.33\xa0M -> 290\xa0k" in text
    assert " -0." in text
    assert "?" not in text
