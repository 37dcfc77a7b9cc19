"""The report as one HTML file that needs nothing else: no network, no font, no library."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from numbers import Integral
from typing import Any

from prunekern.report import charts, units
from prunekern.report.model import DENSE, Check, LatencyRow, LayerRow, Report, Table, WeightRow
from prunekern.report.pareto import costs_of, pareto_front


@dataclass(frozen=True)
class Change:
    """A quantity before and after, as text and as bar lengths in percent of the largest."""

    before: str
    after: str
    kept: str
    title: str
    outer: float
    inner: float


def _change(before: int, after: int, largest: int) -> Change:
    return Change(
        before=units.count(before),
        after=units.count(after),
        kept=units.share(after, before),
        title=f"{units.exact(before)} to {units.exact(after)}",
        outer=charts.bar(before, largest),
        inner=charts.bar(after, largest),
    )


def _layers(rows: tuple[LayerRow, ...]) -> dict[str, Any]:
    largest = {
        key: max(max(getattr(row, f"{key}before"), getattr(row, f"{key}after")) for row in rows)
        for key in ("", "macs_", "params_")
    }
    body = [
        {
            "name": row.name,
            "op": row.op,
            "channels": _change(row.before, row.after, largest[""]),
            "macs": _change(row.macs_before, row.macs_after, largest["macs_"]),
            "params": _change(row.params_before, row.params_after, largest["params_"]),
        }
        for row in rows
    ]
    macs = sum(row.macs_before for row in rows), sum(row.macs_after for row in rows)
    params = sum(row.params_before for row in rows), sum(row.params_after for row in rows)
    return {"rows": body, "macs": _change(*macs, macs[0]), "params": _change(*params, params[0])}


def _pareto(report: Report) -> dict[str, Any]:
    log_possible = all(point.macs > 0 for point in report.pareto)
    log_first = charts.wants_log(report.pareto)
    plots = {"linear": charts.pareto_chart(report, log=False)}
    if log_possible:
        plots["log"] = charts.pareto_chart(report, log=True)
    return {
        "plots": plots,
        "opens": "log" if log_first else "linear",
        "panels": [(charts.COSTS[cost][0],
                    charts.pareto_chart(report, log=charts.wants_log(report.pareto, cost), cost=cost))
                   for cost in costs_of(report.pareto) if cost != "macs"],
        "further": [(cost, *charts.COSTS[cost]) for cost in costs_of(report.pareto) if cost != "macs"],
        "front": pareto_front(report.pareto),
        "chosen": [point for point in report.pareto if point.chosen],
        "dense": next((point for point in report.pareto if point.stage == DENSE), None),
    }


def _latency(rows: tuple[LatencyRow, ...]) -> list[dict[str, Any]]:
    batches = []
    for batch, group in groupby(sorted(rows, key=lambda row: row.batch), key=lambda row: row.batch):
        members = list(group)
        longest = charts.longest(row.p80 for row in members)
        lines = [
            {
                "row": row,
                "p20": charts.bar(row.p20, longest),
                "p50": charts.bar(row.p50, longest),
                "p80": charts.bar(row.p80, longest),
                "is_baseline": row.contender == row.baseline,
            }
            for row in members
        ]
        batches.append({"batch": batch, "lines": lines})
    return batches


def _weights(rows: tuple[WeightRow, ...]) -> dict[str, Any]:
    largest, total = max(row.weights for row in rows), sum(row.weights for row in rows)
    before, after = (sum(row.weights - zeros for row, zeros in zip(rows, found, strict=True))
                     for found in ([row.zeros_before for row in rows], [row.zeros for row in rows]))
    body = []
    for row in rows:
        most = max(*row.counts_before, *row.counts, 1)
        body.append({
            "name": row.name,
            "share": units.share(row.weights, total),
            "change": _change(row.weights - row.zeros_before, row.weights - row.zeros, largest),
            "before": charts.histogram_path(row.counts_before, most),
            "after": charts.histogram_path(row.counts, most),
            "low": units.significant(row.edges[0], 2),
            "high": units.significant(row.edges[-1], 2),
        })
    return {"rows": body, "change": _change(before, after, max(before, 1))}


def limit_text(check: Check) -> str:
    """The limit with its relation, such as "≤ 1e-10"."""
    if check.limit is None:
        return "stated"
    sign = {"<=": "≤", ">=": "≥", "==": "="}.get(check.relation, check.relation)
    return f"{sign}{units.NBSP}{check_number(check.limit, check.unit)}"


def check_number(value: float | int, unit: str) -> str:
    """A verification figure: exact counts, short floats, a unit where there is one."""
    if unit == "fraction":
        return units.percent(value)
    text = units.exact(value) if isinstance(value, Integral) else units.compact(value)
    return f"{text}{units.NBSP}{unit}" if unit else text


def numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers only, so that it is set flush right."""
    cells = [row[column] for row in table.rows if row[column] is not None]
    return bool(cells) and not any(isinstance(cell, str) for cell in cells)


def _sections(report: Report) -> list[tuple[str, str]]:
    """(anchor, name) of every section that has something to show, in reading order."""
    present = (
        ("pareto", "MACs and accuracy", report.pareto),
        ("layers", "Layers", report.layers),
        ("triplets", "Pruning steps", report.triplets),
        ("curves", "Curves", report.curves),
        ("proof", "Verification", report.proof),
        ("latency", "Latency", report.latency),
        ("weights", "Weights", report.weights),
        ("tables", "Details", report.tables),
        ("notes", "Notes", report.notes),
        ("environment", "Environment", report.environment or report.command),
    )
    return [(anchor, name) for anchor, name, content in present if content]


def render(report: Report) -> str:
    """The whole page. Raises ImportError where jinja2 is missing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("prunekern.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=units.count,
        exact=units.exact,
        percent=units.percent,
        points=units.points,
        duration=units.duration,
        times=units.times,
        plain=units.plain,
        limit=limit_text,
    )
    return environment.get_template("report.html").render(
        report=report,
        sections=dict(_sections(report)),
        cards=[(figure, units.quantity(figure.value, figure.unit)) for figure in report.headline],
        pareto=_pareto(report) if report.pareto else None,
        layers=_layers(report.layers) if report.layers else None,
        triplets=charts.triplet_chart(report) if report.triplets else None,
        cumulative=any(step.cumulative for step in report.triplets),
        curves=[(curve, charts.curve_chart(curve)) for curve in report.curves],
        latency=_latency(report.latency),
        weights=_weights(report.weights) if report.weights else None,
        check_number=check_number,
        numeric=numeric,
    )
