"""The report's content: data model, JSON, Pareto front, numbers, axes, the HTML page."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunekern.errors import ArtefactError, PrunekernError
from prunekern.report import (
    DENSE,
    Check,
    Curve,
    LatencyRow,
    LayerRow,
    ParetoPoint,
    Proof,
    Report,
    Table,
    charts,
    html,
    on_front,
    pareto_front,
    save,
    show,
    tables,
    units,
)
from prunekern.report.scales import Scale, tick_labels
from tests.report_sample import Page, hostile, png_size, sample, sample_triplets

# Data model and JSON


def test_json_round_trip() -> None:
    report = sample()
    text = report.to_json()
    assert Report.from_json(text) == report
    document = json.loads(text)
    assert document["format"] == "prunekern-report"
    assert document["version"] == 1
    first = document["report"]["triplets"][0]
    assert first["drop"] == pytest.approx(100 * (first["before"] - first["after_retraining"]))
    assert document["report"]["proof"]["passed"] is True


def test_json_round_trip_of_the_smallest_report() -> None:
    assert Report.from_json(Report("x", created="").to_json()) == Report("x", created="")


def test_json_is_strict_and_keeps_non_finite_numbers() -> None:
    proof = Proof({"error": Check(math.inf, 1e-6), "other": Check(math.nan, 1.0)})
    table = Table("t", ("a", "b"), ((1, -math.inf), (True, "text")))
    text = Report("x", proof=proof, tables=(table,)).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = Report.from_json(text)
    assert back.proof is not None
    assert back.proof.checks["error"].value == math.inf
    assert math.isnan(back.proof.checks["other"].value)
    assert back.tables[0].rows == ((1, -math.inf), (True, "text"))


def test_numpy_scalars_are_written_as_numbers() -> None:
    row = LayerRow("a", "linear", np.int64(4), np.int64(2), 8, 4, 8, 4)  # type: ignore[arg-type]
    point = ParetoPoint("a", np.int64(3), np.float32(0.5), chosen=np.bool_(True))  # type: ignore[arg-type]
    back = Report.from_json(Report("x", layers=(row,), pareto=(point,)).to_json())
    assert back.layers == (LayerRow("a", "linear", 4, 2, 8, 4, 8, 4),)
    assert back.pareto == (ParetoPoint("a", 3, 0.5, chosen=True),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(format="other"), "prunekern-report"),
        (lambda d: d["report"].update(surprise=1), "surprise"),
        (lambda d: d["report"].pop("title"), "title"),
        (lambda d: d["report"]["triplets"][3].update(before="high"), r"triplets\[3\]\.before"),
        (lambda d: d["report"]["layers"][0].update(before=1.5), r"layers\[0\]\.before"),
        (lambda d: d["report"]["pareto"][0].update(chosen=1), r"pareto\[0\]\.chosen"),
        (lambda d: d["report"]["proof"]["checks"]["Teeth"].update(relation="~"), "relation"),
        (lambda d: d["report"].update(latency={}), "latency"),
        (lambda d: d["report"]["curves"][0]["series"]["training"].append([1.0]), "series"),
    ],
)
def test_altered_json_is_refused_with_its_place(change: Any, message: str) -> None:
    document = json.loads(sample().to_json())
    change(document)
    with pytest.raises(ArtefactError, match=message):
        Report.from_json(json.dumps(document))


def test_truncated_json_is_refused() -> None:
    with pytest.raises(ArtefactError, match="not valid JSON"):
        Report.from_json(sample().to_json()[:-20])


def test_percentages_given_as_fractions_are_refused() -> None:
    with pytest.raises(PrunekernError, match=r"accuracy is 91\.2.*Divide"):
        ParetoPoint("a", 1, 91.2)
    with pytest.raises(PrunekernError, match="step 1"):
        dataclasses.replace(sample_triplets()[0], after_retraining=-0.1)


def test_lists_become_tuples_and_rows_must_fit() -> None:
    assert Report("x", notes=["a"]).notes == ("a",)  # type: ignore[arg-type]
    with pytest.raises(PrunekernError, match="1 cells for 2 columns"):
        Table("t", ("a", "b"), ((1,),))


@pytest.mark.parametrize(
    ("value", "relation", "limit", "passed"),
    [
        (1.0, "<=", 1.0, True),
        (1.1, "<=", 1.0, False),
        (1.0, "<", 1.0, False),
        (1.0, ">=", 1.0, True),
        (0.9, ">=", 1.0, False),
        (1.0, ">", 1.0, False),
        (14, "==", 14, True),
        (13, "==", 14, False),
        (math.nan, "<=", 1.0, False),
        (math.nan, ">=", 1.0, False),
        (5.0, "<=", None, None),
    ],
)
def test_checks_judge_themselves(
    value: float, relation: Any, limit: float | None, passed: bool | None
) -> None:
    assert Check(value, limit, relation=relation).passed is passed


def test_a_proof_needs_a_judged_check() -> None:
    good, bad, stated = Check(1, 2), Check(3, 2), Check(3)
    assert Proof({"a": good, "b": stated}).passed
    assert not Proof({"a": good, "b": bad}).passed
    assert not Proof({"b": stated}).passed
    assert Proof({"a": good, "b": bad}).failed == ("b",)


# Pareto front


def brute_force(points: list[ParetoPoint]) -> tuple[bool, ...]:
    """The definition, word for word."""

    def beats(a: ParetoPoint, b: ParetoPoint) -> bool:
        as_good = a.macs <= b.macs and a.accuracy >= b.accuracy
        return as_good and (a.macs < b.macs or a.accuracy > b.accuracy)

    return tuple(not math.isnan(p.accuracy) and not any(beats(other, p) for other in points) for p in points)


def test_front_with_ties() -> None:
    points = [
        ParetoPoint("same cost, worse", 10, 0.8),
        ParetoPoint("best at 10", 10, 0.9),
        ParetoPoint("its duplicate", 10, 0.9),
        ParetoPoint("same accuracy, dearer", 20, 0.9),
        ParetoPoint("broken", 1, math.nan),
        ParetoPoint("best at 30", 30, 0.95),
        ParetoPoint("cheapest", 5, 0.2),
    ]
    names = [point.name for point in pareto_front(points)]
    assert names == ["cheapest", "best at 10", "its duplicate", "best at 30"]


def test_front_matches_its_definition_on_random_points() -> None:
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randrange(0, 14)
        points = [
            ParetoPoint(str(i), draw.randrange(1, 6), draw.choice([0.1, 0.2, 0.3, 0.4, math.nan]))
            for i in range(size)
        ]
        assert on_front(points) == brute_force(points)


# Numbers and axes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.count(999), "999"),
        (units.count(1234567), "1.23 M"),
        (units.count(999_950), "1.00 M"),
        (units.count(4_089_200_000), "4.09 G"),
        (units.count(None), "–"),
        (units.percent(0.9123), "91.23 %"),
        (units.percent(math.nan), "nan"),
        (units.points(-0.004), "0.00"),
        (units.points(-0.5), "−0.50"),
        (units.duration(53.46), "53.5 µs"),
        (units.duration(999.7), "1.00 ms"),
        (units.duration(161_000), "161 ms"),
        (units.duration(2_500_000), "2.50 s"),
        (units.duration(0.25), "0.250 µs"),
        (units.times(2.314), "2.31×"),
        (units.compact(1e-10), "1e-10"),
        (units.compact(3.14e-15), "3.14e-15"),
        (units.short(units.duration(10_000)), "10 ms"),
        (units.short(units.duration(100)), "100 µs"),
        (units.joined(0.9123, "fraction"), "91.23 %"),
        (units.joined(123456, "params"), "123 k params"),
        (units.joined(1_500_000, "bytes"), "1.50 MB"),
        (units.joined(3.4, "×"), "3.40×"),
        (units.joined("n/a", ""), "n/a"),
        (units.plain(1234567), "1,234,567"),
        (units.printable("a\x1b[31mb\n"), "a\\x1b[31mb\\x0a"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text.replace(units.NBSP, " ") == expected


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(1, 9e9), (3.3e5, 1.7e6), (0.91, 0.92), (5, 5), (1, 2), (2e5, 2.1e5)]
)
def test_ticks_are_inside_distinct_and_few(low: float, high: float, log: bool) -> None:
    scale = Scale.around([low, high], log=log)
    ticks = scale.ticks(6)
    assert 2 <= len(ticks) <= 13
    assert all(scale.holds(tick) for tick in ticks)
    assert list(ticks) == sorted(set(ticks))
    assert 0 < scale.at(low) <= scale.at(high) < 100
    assert len(set(tick_labels(ticks, lambda value, digits: f"{value:.{digits}f}"))) == len(ticks)


def test_tick_labels_say_the_value() -> None:
    assert tick_labels((0.0, 2.5, 5.0), units.fixed) == ("0.0", "2.5", "5.0")
    assert [t.replace(units.NBSP, " ") for t in tick_labels((0.905, 0.91), units.percent)] == [
        "90.5 %",
        "91.0 %",
    ]


# HTML


def test_page_is_well_formed_and_holds_the_figures() -> None:
    report = sample()
    page = Page(html.render(report))
    assert len(page.ids) == len(set(page.ids))
    chosen = next(point for point in report.pareto if point.chosen)
    expected = [
        report.title,
        "all 5 checks within their limits",
        units.percent(chosen.accuracy),
        "1.33 M → 290 k",
        "≤ 1e-10",
        "3.1e-15",
        "53.5 µs",
        "3.40×",
        "576×7×72",
        *report.notes,
        report.command,
        "2.13.0+cpu",
    ]
    for text in expected:
        assert " ".join(text.replace(units.NBSP, " ").split()) in page.text, text
    for section in ("pareto", "layers", "triplets", "curves", "proof", "latency", "notes", "environment"):
        assert section in page.ids
    undone = sum(not step.accepted for step in report.triplets)
    assert undone == 4
    assert (
        sum((tag, name, value) == ("tr", "class", "undone") for tag, name, value in page.attributes) == undone
    )
    tips = "".join(page.inside("title"))
    assert f"{units.exact(chosen.macs)}" in tips
    assert tips.count("after retraining") == len(report.triplets)


def test_page_stays_small() -> None:
    assert len(html.render(sample()).encode()) < 300_000


def test_page_refers_to_nothing_outside_itself() -> None:
    source = html.render(sample())
    page = Page(source)
    references = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
    for tag, name, value in page.attributes:
        assert name not in references or value.startswith("#"), (tag, name, value)
        assert "//" not in value, (tag, name, value)
    targets = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert targets <= set(page.ids)
    assert "link" not in page.tags
    code = "".join(page.inside("style") + page.inside("script"))
    assert not re.search(r"https?:|url\(|@import|@font-face|fetch\(|XMLHttp|import\(", code)


def test_a_web_address_in_a_note_is_only_text() -> None:
    page = Page(html.render(Report("x", notes=("see https://example.org/",))))
    assert "see https://example.org/" in page.text
    assert not any("example" in value for _, _, value in page.attributes)


def test_every_text_is_escaped() -> None:
    source = html.render(hostile(sample()))
    page, calm = Page(source), Page(html.render(sample()))
    assert page.tags.count("script") == calm.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.tags.count("style") == 1
    assert page.inside("script") == calm.inside("script")
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.text.count("<script>alert('x')</script>") > 100
    assert "{{ 7 * 7 }}" in page.text


def test_sections_without_data_are_left_out() -> None:
    report = Report("Only a title", layers=sample().layers, notes=("one note",))
    page = Page(html.render(report))
    assert {"layers", "notes"} <= set(page.ids)
    assert not {"pareto", "triplets", "curves", "proof", "latency", "tables", "environment"} & set(page.ids)
    assert "Verified" not in page.text
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links == ["#layers", "#notes"]
    least = Page(html.render(Report("x", notes=("one note",), command="prunekern")))
    assert [value for tag, name, value in least.attributes if (tag, name) == ("a", "href")] == [
        "#notes",
        "#environment",
    ]


def test_a_failed_check_is_said_at_the_top() -> None:
    page = Page(html.render(sample(proof=Proof({"a": Check(2, 1), "b": Check(0, 1)}))))
    assert "✗ Not verified: 1 of 2 checks missed their limit" in page.text
    assert "✗ failed" in page.text
    assert "Verified:" not in page.text


@pytest.mark.parametrize(
    "report",
    [
        Report("nothing"),
        Report("one point", pareto=(ParetoPoint("a", 0, 0.5),)),
        Report("nan", pareto=(ParetoPoint("a", 5, math.nan), ParetoPoint("b", 5, math.nan, DENSE, True))),
        Report("one step", triplets=tuple(sample_triplets()[:1])),
        Report("all undone", triplets=tuple(t for t in sample_triplets() if not t.accepted)),
        Report("zeros", layers=(LayerRow("a", "add", 0, 0, 0, 0, 0, 0),)),
        Report(
            "no time",
            latency=(LatencyRow("a", 1, 0.0, 0.0, 0.0), LatencyRow("b", 2, 1.0, math.nan, math.nan)),
        ),
        Report("no curve", curves=(Curve("c", "x", "y", {}), Curve("d", "x", "y", {"s": ()}))),
        Report("nan curve", curves=(Curve("c", "x", "y", {"_s": ((0, math.nan), (1, 2.0))}),)),
        Report("no checks", proof=Proof()),
        Report("empty table", tables=(Table("t", ("a",), ()),)),
        Report("deep", layers=tuple(LayerRow(f"l{i}", "conv2d", 64, 9, 900, 9, 99, 9) for i in range(200))),
    ],
    ids=lambda report: report.title,
)
def test_odd_data_is_drawn(report: Report, tmp_path: Path) -> None:
    saved = save(report, tmp_path)
    Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    for path in saved.files:
        if path.suffix == ".png":
            png_size(path.read_bytes())
    show(report, file=io.StringIO())


def test_the_front_line_passes_through_the_front_only() -> None:
    points = [ParetoPoint("a", 10, 0.5), ParetoPoint("b", 20, 0.4), ParetoPoint("c", 30, 0.9, chosen=True)]
    chart = charts.pareto_chart(Report("x", pareto=points), log=False)  # type: ignore[arg-type]
    marks = {mark.tip.split("\n")[0]: mark for mark in chart.marks if mark.tip}
    line = next(line for line in chart.lines if line.style == "frontline").path
    for name, mark in marks.items():
        assert (f"{mark.x:g},{mark.y:g}" in line) is (name != "b")
        assert mark.style.split()[0] == ("off" if name == "b" else "front")
    a, c = marks["a"], marks["c"]
    assert line == f"M{a.x:g},{a.y:g}L{c.x:g},{a.y:g}L{c.x:g},{c.y:g}L100,{c.y:g}"
    assert [mark.shape for mark in chart.marks].count("ring") == 1
    assert marks["a"].x < marks["b"].x < marks["c"].x
    assert marks["c"].y < marks["a"].y < marks["b"].y


def test_the_drop_of_a_single_step_is_not_shown_twice() -> None:
    """Where every triplet starts from the step before it, its drop is what the step cost."""
    several = sample()
    single = sample(triplets=[dataclasses.replace(t, incremental_drop=t.drop) for t in several.triplets])
    assert "This step" in html.render(several)
    assert "This step" not in html.render(single)
    grids = {name: next(g for g in tables.grids(r) if "steps" in g.title) for name, r in
             (("several", several), ("single", single))}
    assert "This step" in grids["several"].columns
    assert "This step" not in grids["single"].columns
    assert all(len(row) == len(grid.columns) for grid in grids.values() for row in grid.rows)
