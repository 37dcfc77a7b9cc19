"""The report as neutral text tables, for any terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prunekern.report import units
from prunekern.report.charts import COSTS, layer_runs
from prunekern.report.html import check_number, limit_text, numeric
from prunekern.report.model import DENSE, Report, Triplet
from prunekern.report.pareto import costs_of, pareto_front

SHORT = 12
"""Rows of a long section that are printed unless everything is asked for."""


@dataclass(frozen=True)
class Grid:
    """One table: header cells, which columns are numbers, rows of text, one style per row.

    Styles: "" plain, "good", "bad", "strong", "dim".
    """

    title: str
    columns: tuple[str, ...]
    numbers: frozenset[int]
    rows: tuple[tuple[str, ...], ...]
    styles: tuple[str, ...]
    caption: str = ""


Rows = list[tuple[str, tuple[str, ...]]]
"""(style, cells) of each row."""


def _grid(title: str, columns: Sequence[str], numbers: Sequence[int], rows: Rows, caption: str = "") -> Grid:
    clean = tuple(tuple(units.printable(cell) for cell in cells) for _, cells in rows)
    return Grid(title, tuple(columns), frozenset(numbers), clean, tuple(style for style, _ in rows), caption)


def grids(report: Report, *, full: bool = False) -> Iterator[Grid]:
    """Every section that has data, in reading order; `full` keeps the long ones whole."""
    if report.layers:
        yield _layers(report)
    if report.pareto:
        yield _front(report, full)
    if report.triplets:
        yield _triplets(report, full)
    if report.proof:
        yield _proof(report)
    if report.latency:
        yield _latency(report)
    for table in report.tables:
        rows: Rows = [("", tuple(units.plain(cell) for cell in row)) for row in table.rows]
        rows, caption = _cut(rows, full, table.caption)
        columns = [index for index in range(len(table.columns)) if numeric(table, index)]
        yield _grid(table.title, table.columns, columns, rows, caption)


def _cut(rows: Rows, full: bool, caption: str) -> tuple[Rows, str]:
    if full or len(rows) <= SHORT:
        return rows, caption
    left_out = f"{len(rows) - SHORT} more rows with full=True or in the saved report"
    return rows[:SHORT], f"{caption}; {left_out}" if caption else left_out


def _layers(report: Report) -> Grid:
    rows: Rows = [
        (
            "",
            (
                row.name,
                row.op,
                f"{row.before} → {row.after}",
                units.share(row.after, row.before),
                f"{units.count(row.macs_before)} → {units.count(row.macs_after)}",
                units.share(row.macs_after, row.macs_before),
                f"{units.count(row.params_before)} → {units.count(row.params_after)}",
                units.share(row.params_after, row.params_before),
            ),
        )
        for row in report.layers
    ]
    names = ("Layer", "Op", "Channels", "kept", "MACs", "kept", "Params", "kept")
    return _grid("Layers", names, range(2, 8), rows)


def _front(report: Report, full: bool) -> Grid:
    front = pareto_front(report.pareto)
    special = [p for p in report.pareto if (p.chosen or p.stage == DENSE) and p not in front]
    further = [cost for cost in costs_of(report.pareto) if cost != "macs"]
    rows: Rows = []
    for point in sorted([*front, *special], key=lambda point: point.macs):
        remarks = ["chosen"] if point.chosen else []
        remarks += ["off the front"] if point in special else []
        written = (COSTS[cost][1](getattr(point, cost)) for cost in ("macs", *further))
        cells = (point.name, point.stage, *written, units.percent(point.accuracy))
        rows.append(("strong" if point.chosen else "", (*cells, ", ".join(remarks))))
    rows, caption = _cut_around_chosen(rows, full)
    names = ("Network", "Stage", "MACs", *(COSTS[cost][0] for cost in further), report.accuracy_label, "")
    numbers = range(2, len(names) - 1)
    return _grid(f"Pareto front ({len(report.pareto)} networks measured)", names, numbers, rows, caption)


def _cut_around_chosen(rows: Rows, full: bool) -> tuple[Rows, str]:
    """The stretch of the front that holds the chosen network."""
    if full or len(rows) <= SHORT:
        return rows, ""
    centre = next((index for index, (style, _) in enumerate(rows) if style), len(rows) // 2)
    first = min(max(0, centre - SHORT // 2), len(rows) - SHORT)
    caption = f"{len(rows) - SHORT} more on the front with full=True or in the saved report"
    return rows[first : first + SHORT], caption


def _telling(triplets: Sequence[Triplet]) -> list[Triplet]:
    """The first and last step on each layer, the last accepted one, and every undone step."""
    keep: set[int] = set()
    for _, first, last in layer_runs(triplets):
        accepted = [index for index in range(first, last + 1) if triplets[index].accepted]
        keep |= {first, last, *accepted[-1:]}
    keep |= {index for index, step in enumerate(triplets) if not step.accepted}
    return [triplets[index] for index in sorted(keep)]


def _percent(fraction: float | None) -> str:
    """The number alone: eleven columns have to fit into a terminal."""
    return units.percent(fraction).removesuffix(f"{units.NBSP}%")


def _triplets(report: Report, full: bool) -> Grid:
    steps = list(report.triplets) if full or len(report.triplets) <= SHORT else _telling(report.triplets)
    cumulative = any(step.cumulative for step in report.triplets)
    rows: Rows = [
        (
            "" if step.accepted else "bad",
            (
                str(step.step),
                step.layer,
                str(step.channels_left),
                _percent(step.before),
                _percent(step.after_pruning),
                _percent(step.after_retraining),
                units.points(step.drop),
                *([units.points(step.incremental_drop)] * cumulative),
                units.count(step.macs),
                _percent(step.test_accuracy),
                "kept" if step.accepted else "undone",
            ),
        )
        for step in steps
    ]
    accuracies = ("Before", "Pruned", "Retrained")
    names = ("Step", "Layer", "Left", *accuracies, "Drop", *["This step"] * cumulative, "MACs", "Test", "")
    hidden = len(report.triplets) - len(steps)
    caption = "accuracies in %, drops in points"
    caption += f"; {hidden} more steps with full=True or in triplets.csv" if hidden else ""
    return _grid(f"Pruning steps ({len(report.triplets)})", names, (0, *range(2, len(names) - 1)), rows, caption)


def _proof(report: Report) -> Grid:
    assert report.proof is not None
    words = {True: ("good", "passed"), False: ("bad", "FAILED"), None: ("dim", "for information")}
    rows: Rows = []
    for name, check in report.proof.checks.items():
        style, word = words[check.passed]
        cells = (name, check_number(check.value, check.unit), limit_text(check), word, check.explanation)
        rows.append((style, cells))
    return _grid("Verification", ("Check", "Value", "Limit", "Outcome", "What it says"), (1, 2), rows)


def _latency(report: Report) -> Grid:
    rows: Rows = []
    for row in sorted(report.latency, key=lambda item: item.batch):
        times = (units.duration(row.p20), units.duration(row.p50), units.duration(row.p80))
        style = "dim" if row.contender == row.baseline else ""
        rows.append((style, (str(row.batch), row.contender, *times, units.times(row.speedup), row.note)))
    baselines = dict.fromkeys(row.baseline for row in report.latency if row.baseline)
    caption = f"speed-up relative to {', '.join(baselines)}" if baselines else ""
    names = ("Batch", "Contender", "p20", "p50", "p80", "Speed-up", "Note")
    return _grid("Latency per call", names, (0, 2, 3, 4, 5), rows, caption)
