"""The charts as PNGs (matplotlib, drawn off screen and without touching its global state)."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from prunekern.report import charts, units
from prunekern.report.model import DENSE, LatencyRow, LayerRow, Report, WeightRow
from prunekern.report.pareto import costs_of, on_front, pareto_front
from prunekern.report.scales import Scale, tick_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("pareto.png", "layers.png", "triplets.png", "latency.png", "curves.png", "weights.png", "histograms.png")
PANELS = 48
"""Histograms that are drawn at most: those of the layers with the most weights."""
COLOURS = ("#1b2430", "#0072b2", "#c75a00", "#00805c", "#a3447f", "#8a6d00", "#5650b8")
PALE, SOFT, GRID, BAD = "#c5d6e6", "#566273", "#e4e8ee", "#b03a00"
MARKERS = dict(zip(charts.SHAPES, ("o", "s", "^", "D", "X", "v"), strict=True)) | {"star": "*"}
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,  # a layer may be called "$x"
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def render(report: Report) -> dict[str, bytes]:
    """File name -> PNG for every section that has data. Raises ImportError where matplotlib is missing."""
    import matplotlib

    files: dict[str, bytes] = {}
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for name, figure in _figures(report):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
            files[name] = buffer.getvalue()
    return files


def _figures(report: Report) -> Iterator[tuple[str, Figure]]:
    if report.pareto:
        yield "pareto.png", _pareto(report)
    if report.layers:
        yield "layers.png", _layers(report.layers)
    if report.triplets:
        yield "triplets.png", _triplets(report)
    if report.latency:
        yield "latency.png", _latency(report.latency)
    if report.curves:
        yield "curves.png", _curves(report)
    if report.weights:
        yield "weights.png", _weights(report.weights)
        yield "histograms.png", _histograms(report.weights)


def _new(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _text(text: str, longest: int = 40) -> str:
    """A name fit for a plot: printable, not too long, without the leading underscore that hides entries."""
    text = units.printable(text)
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def _axis(axis: Any, scale: Scale, labels: tuple[str, ...], ticks: tuple[float, ...]) -> None:
    """Hands matplotlib the same axis the page has."""
    from matplotlib.ticker import NullLocator

    if scale.log:
        (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(scale.low, scale.high)
    axis.set_ticks(ticks, labels=labels)
    axis.set_minor_locator(NullLocator())


def _percent_axis(axes: Axes, scale: Scale) -> None:
    ticks = scale.ticks(6)
    _axis(axes.yaxis, scale, tick_labels(ticks, units.percent), ticks)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=9)


def _pareto(report: Report) -> Figure:
    """One panel for each cost that is known of every network."""
    costs = costs_of(report.pareto)
    columns = min(2, len(costs))
    rows = math.ceil(len(costs) / columns)
    figure = _new(8.5, 5.4) if len(costs) == 1 else _new(6.2 * columns, 0.8 + 4.2 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, cost in zip(panels, costs, strict=False):
        _front_panel(axes, report, cost)
    for axes in panels[len(costs):]:
        axes.set_visible(False)
    _legend_below(figure, panels[0])
    return figure


def _front_panel(axes: Axes, report: Report, cost: str) -> None:
    x, y = charts.pareto_scales(report, charts.wants_log(report.pareto, cost), cost)
    front = pareto_front(report.pareto, cost)
    if front:
        corners = [*((charts.cost_of(p, cost), p.accuracy) for p in front), (x.high, front[-1].accuracy)]
        axes.step(*zip(*corners, strict=True), where="post", color=SOFT, lw=1.4, label="Pareto front")
    if report.accuracy_floor is not None:
        label = f"limit {units.percent(report.accuracy_floor, 1)}"
        axes.axhline(report.accuracy_floor, color=BAD, lw=1.2, ls=":", label=label)
    flags = on_front(report.pareto, cost)
    for stage, tone in charts.tones([p.stage for p in report.pareto if p.stage != DENSE]).items():
        group = [(p, flag) for p, flag in zip(report.pareto, flags, strict=True) if p.stage == stage]
        look: dict[str, Any] = {"marker": MARKERS[charts.SHAPES[tone - 1]], "color": COLOURS[tone], "lw": 0}
        for optimal, alpha, label in ((False, 0.4, ""), (True, 1.0, _text(stage or "networks"))):
            values = [charts.cost_of(p, cost) for p, flag in group if flag is optimal]
            accuracies = [p.accuracy for p, flag in group if flag is optimal]
            axes.scatter(values, accuracies, s=34, alpha=alpha, label=label or None, **look)
    _special_points(axes, report, x.log, cost)
    ticks, labels = charts.cost_ticks(x, cost)
    _axis(axes.xaxis, x, labels, ticks)
    _percent_axis(axes, y)
    name = charts.COSTS[cost][0]
    axes.set_xlabel(f"{name} (log scale)" if x.log else name)
    axes.set_ylabel(_text(report.accuracy_label))
    axes.set_title(f"{len(report.pareto)} networks, {sum(flags)} on the Pareto front")


def _special_points(axes: Axes, report: Report, log: bool, cost: str) -> None:
    from matplotlib.patheffects import withStroke

    ink: dict[str, Any] = {"edgecolors": COLOURS[0], "zorder": 4}
    for point in report.pareto:
        at = (charts.cost_of(point, cost), point.accuracy)
        if point.stage == DENSE:
            axes.scatter(*at, marker="*", s=150, facecolors=COLOURS[0], label="dense original", **ink)
        if point.chosen:
            axes.scatter(*at, s=190, facecolors="none", lw=1.8, **ink)
    for label in charts.pareto_chart(report, log=log, cost=cost).labels:
        axes.annotate(
            label.text,
            (label.x / 100, 1 - label.y / 100),
            xycoords="axes fraction",
            xytext=(-10 if label.side == "end" else 10, -18 if label.below else 9),
            textcoords="offset points",
            ha="right" if label.side == "end" else "left",
            weight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _layers(rows: tuple[LayerRow, ...]) -> Figure:
    figure = _new(11, 1.6 + 0.42 * min(len(rows), 120))
    panels = figure.subplots(1, 3, sharey=True)
    positions = range(len(rows))
    quantities = (("Channels", ""), ("MACs", "macs_"), ("Parameters", "params_"))
    for axes, (title, key) in zip(panels, quantities, strict=True):
        before = [getattr(row, f"{key}before") for row in rows]
        after = [getattr(row, f"{key}after") for row in rows]
        axes.barh(positions, before, height=0.74, color=PALE, label="before")
        axes.barh(positions, after, height=0.40, color=COLOURS[1], label="after")
        largest = max(*before, *after, 1)
        for position, old, new in zip(positions, before, after, strict=True):
            text = f"{units.count(old)} → {units.count(new)}"
            axes.text(max(old, new) + 0.02 * largest, position, text, va="center", fontsize=8)
        scale = Scale(0.0, 1.42 * largest)
        ticks = tuple(tick for tick in scale.ticks(4) if tick <= 1.05 * largest)
        _axis(axes.xaxis, scale, tuple(units.short(units.count(tick)) for tick in ticks), ticks)
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(positions, labels=[_text(row.name, 30) for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    _legend_below(figure, panels[0])
    return figure


def _triplets(report: Report) -> Figure:
    steps = report.triplets
    figure = _new(11, 4.8)
    axes = figure.add_subplot()
    x, y = charts.triplet_scales(steps)
    index = range(len(steps))
    for number, (layer, first, last) in enumerate(charts.layer_runs(steps)):
        if number % 2:
            axes.axvspan(first - 0.5, last + 0.5, color="#eef2f7", lw=0)
        middle = (first + last) / 2
        axes.text(middle, y.high, _text(layer, 18), ha="center", va="bottom", fontsize=9, clip_on=False)
    axes.plot(index, [t.before for t in steps], color=COLOURS[3], lw=1.3, ls="--", label="before pruning")
    pruned = [t.after_pruning for t in steps]
    axes.plot(index, pruned, color=COLOURS[2], lw=0, marker="v", ms=4, label="after pruning")
    kept = [(i, t.after_retraining) for i, t in enumerate(steps) if t.accepted]
    undone = [(i, t.after_retraining) for i, t in enumerate(steps) if not t.accepted]
    if kept:
        look: dict[str, Any] = {"color": COLOURS[1], "lw": 1.3, "marker": "o", "ms": 3.5}
        axes.plot(*zip(*kept, strict=True), label="after retraining", **look)
    if undone:
        axes.plot(*zip(*undone, strict=True), color=COLOURS[4], lw=0, marker="X", ms=8, label="undone step")
    ticks = tuple(tick for tick in x.ticks(8) if tick == int(tick) and 0 <= tick < len(steps))
    _axis(axes.xaxis, x, tuple(str(steps[int(tick)].step) for tick in ticks), ticks)
    _percent_axis(axes, y)
    axes.set_xlabel("pruning step")
    axes.set_ylabel("accuracy")
    _legend_below(figure, axes)
    return figure


def _latency(rows: tuple[LatencyRow, ...]) -> Figure:
    ordered = sorted(rows, key=lambda row: row.batch)
    groups = [(batch, list(group)) for batch, group in groupby(ordered, key=lambda row: row.batch)]
    heights = [len(group) + 0.8 for _, group in groups]
    figure = _new(9, 0.6 + 0.36 * sum(heights))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (batch, group) in zip(panels, groups, strict=True):
        medians = [row.p50 for row in group]
        spread = [[row.p50 - row.p20 for row in group], [row.p80 - row.p50 for row in group]]
        colours = ["#a9b1bc" if row.contender == row.baseline else COLOURS[1] for row in group]
        positions = range(len(group))
        axes.barh(positions, medians, height=0.62, color=colours)
        axes.errorbar(medians, positions, xerr=spread, fmt="none", ecolor=COLOURS[0], capsize=2.5, lw=1.1)
        longest = charts.longest(row.p80 for row in group)
        for position, row in enumerate(group):
            text = units.duration(row.p50)
            text += "" if row.speedup is None else f"   {units.times(row.speedup)}"
            axes.text(row.p80 + 0.015 * longest, position, text, va="center", fontsize=8.5)
        scale = Scale(0.0, 1.3 * longest)
        ticks = tuple(tick for tick in scale.ticks(5) if tick <= 1.05 * longest)
        _axis(axes.xaxis, scale, tuple(units.short(units.duration(tick)) for tick in ticks), ticks)
        axes.set_yticks(range(len(group)), labels=[_text(row.contender, 34) for row in group])
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_title(f"Batch {batch}")
        axes.grid(visible=False, axis="y")
    panels[-1].set_xlabel("time per call: median, whiskers p20 to p80")
    return figure


def _curves(report: Report) -> Figure:
    columns = min(2, len(report.curves))
    rows = math.ceil(len(report.curves) / columns)
    figure = _new(5.6 * columns, 3.7 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, curve in zip(panels, report.curves, strict=False):
        for name, tone in charts.tones(list(curve.series)).items():
            points = curve.series[name]
            look: dict[str, Any] = {"color": COLOURS[tone], "ls": "--" if tone % 2 == 0 else "-", "lw": 1.6}
            if len(points) <= 40:
                look |= {"marker": MARKERS[charts.SHAPES[tone - 1]], "ms": 4}
            axes.plot([a for a, _ in points], [b for _, b in points], label=_text(name), **look)
        x, y = charts.curve_scales(curve)
        ticks = x.ticks(6)
        _axis(axes.xaxis, x, tick_labels(ticks, units.fixed), ticks)
        ticks = y.ticks(6)
        _axis(axes.yaxis, y, tick_labels(ticks, units.percent if curve.percent else units.fixed), ticks)
        axes.set_title(_text(curve.name))
        axes.set_xlabel(_text(curve.x_label))
        axes.set_ylabel(_text(curve.y_label))
        if curve.series:
            axes.legend(fontsize=9)
    for axes in list(panels)[len(report.curves) :]:
        axes.set_visible(False)
    return figure


def _weights(rows: tuple[WeightRow, ...]) -> Figure:
    """How many weights each layer has, and how many of them are not zero."""
    figure = _new(9, 1.6 + 0.36 * min(len(rows), 160))
    axes = figure.add_subplot()
    positions, total = range(len(rows)), sum(row.weights for row in rows)
    pruned = any(row.zeros for row in rows)
    axes.barh(positions, [row.weights for row in rows], height=0.74, color=PALE if pruned else COLOURS[1],
              label="weights")
    if pruned:
        axes.barh(positions, [row.weights - row.zeros for row in rows], height=0.40, color=COLOURS[1],
                  label="not zero")
    largest = max(row.weights for row in rows) or 1
    for position, row in enumerate(rows):
        text = f"{units.count(row.weights)}, {units.share(row.weights, total)} of all"
        text += f"; {units.percent(row.zeros / row.weights, 1)} zeros" if pruned and row.weights else ""
        axes.text(row.weights + 0.01 * largest, position, text, va="center", fontsize=8)
    scale = Scale(0.0, 1.45 * largest)
    ticks = tuple(tick for tick in scale.ticks(6) if tick <= 1.05 * largest)
    _axis(axes.xaxis, scale, tuple(units.short(units.count(tick)) for tick in ticks), ticks)
    axes.set_yticks(positions, labels=[_text(row.name, 34) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(f"{units.count(total)} weights in {len(rows)} layers")
    axes.grid(visible=False, axis="y")
    _legend_below(figure, axes)
    return figure


def _histograms(rows: tuple[WeightRow, ...]) -> Figure:
    """The values of each layer's weights before and after, zeros left out."""
    largest = sorted(range(len(rows)), key=lambda index: -rows[index].weights)[:PANELS]
    shown = [rows[index] for index in sorted(largest)]
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = _new(max(6.4, 3.1 * columns), 0.9 + 2.1 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, row in zip(panels, shown, strict=False):
        axes.stairs(row.counts_before, row.edges, fill=True, color=PALE, label="before")
        axes.stairs(row.counts, row.edges, color=COLOURS[1], lw=1.3, label="after")
        scale = Scale(row.edges[0], row.edges[-1])
        ticks = scale.ticks(5)
        _axis(axes.xaxis, scale, tick_labels(ticks, units.fixed), ticks)
        axes.set_yticks([])
        axes.set_title(_text(row.name, 30), fontsize=9)
        axes.set_xlabel(f"{units.percent(row.zeros / row.weights, 1)} zeros" if row.weights else "", fontsize=8)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    left = f"; the {len(shown)} layers with the most of {len(rows)}" if len(shown) < len(rows) else ""
    figure.suptitle(f"Weights that are not zero{left}", fontsize=11, weight="bold")
    _legend_below(figure, panels[0])
    return figure
