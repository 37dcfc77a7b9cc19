"""Charts as geometry in percent of the plot area; the page's template draws them at any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prunekern.report import units
from prunekern.report.model import DENSE, Curve, ParetoPoint, Report, Triplet
from prunekern.report.pareto import costs_of, on_front, pareto_front
from prunekern.report.scales import Scale, tick_labels

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "down")
LOG_FROM = 4.0
"""The ratio of largest to smallest cost from which the Pareto plot opens with a logarithmic axis."""
COSTS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "macs": ("MACs", units.count), "params": ("parameters", units.count), "latency": ("latency", units.duration),
    "energy": ("energy (proxy)", units.energy)}
"""What each cost is called, and how it is written."""


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis; `spare` ones are left out on narrow screens."""

    at: float
    label: str
    spare: bool = False


@dataclass(frozen=True)
class Mark:
    """One marker: position, shape, colour number, extra CSS classes, hover text (lines)."""

    x: float
    y: float
    shape: str
    tone: int
    style: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Line:
    """A polyline as an SVG path in a 100 x 100 box."""

    path: str
    tone: int
    style: str = ""


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the x axis with a name."""

    start: float
    width: float
    label: str
    odd: bool


@dataclass(frozen=True)
class Label:
    """Text next to a point: it starts or ends there ("start", "end"), above the point or below."""

    x: float
    y: float
    text: str
    side: str
    below: bool = False


@dataclass(frozen=True)
class Key:
    """One legend entry: a marker (`shape`) or a line (empty shape)."""

    text: str
    tone: int
    shape: str = ""
    style: str = ""


@dataclass(frozen=True)
class Chart:
    """One plot. `pick` says how the pointer finds a mark: the nearest in "xy", or by "x" alone."""

    summary: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    bands: tuple[Band, ...] = ()
    labels: tuple[Label, ...] = ()
    legend: tuple[Key, ...] = ()
    pick: str = "xy"


def x_axis(scale: Scale, labels: Sequence[str], ticks: Sequence[float]) -> tuple[Tick, ...]:
    """Ticks of which every second one is spare, counted so that the last one stays."""
    last = len(ticks) - 1
    return tuple(
        Tick(scale.at(tick), label, (last - index) % 2 == 1)
        for index, (tick, label) in enumerate(zip(ticks, labels, strict=True))
    )


def y_axis(scale: Scale, *, percent: bool) -> tuple[Tick, ...]:
    """Ticks of a vertical axis, in percent or as plain numbers."""
    ticks = scale.ticks(6)
    labels = tick_labels(ticks, units.percent if percent else units.fixed)
    return tuple(Tick(scale.at(tick), label) for tick, label in zip(ticks, labels, strict=True))


def path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    """The polyline through all points that can be drawn."""
    drawn = [(a, b) for a, b in points if x.holds(a) and y.holds(b)]
    return "M" + "L".join(f"{x.at(a):g},{round(100 - y.at(b), 2):g}" for a, b in drawn) if drawn else ""


def wants_log(points: Sequence[ParetoPoint], cost: str = "macs") -> bool:
    """Whether a cost spreads so far that a logarithmic axis reads better."""
    values = [cost_of(point, cost) for point in points]
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


def cost_of(point: ParetoPoint, cost: str) -> float:
    """A cost by name; NaN where the point does not have it."""
    value = getattr(point, cost)
    return math.nan if value is None else value


def tones(names: Sequence[str]) -> dict[str, int]:
    """A colour number (1 to 6) per distinct name, in order of appearance."""
    return {name: 1 + index % len(SHAPES) for index, name in enumerate(dict.fromkeys(names))}


def cost_ticks(scale: Scale, cost: str = "macs") -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Tick positions and labels of an axis of a cost."""
    ticks = tuple(tick for tick in scale.ticks(6) if tick >= 0)
    return ticks, tuple(units.short(COSTS[cost][1](tick)) for tick in ticks)


def _pareto_tip(point: ParetoPoint, report: Report, front: bool) -> str:
    lines = [point.name]
    lines.append(f"{units.count(point.macs)} MACs ({units.exact(point.macs)})")
    lines += [f"{COSTS[cost][0]} {COSTS[cost][1](cost_of(point, cost))}" for cost in costs_of(report.pareto)
              if cost != "macs"]
    lines.append(f"{report.accuracy_label} {units.percent(point.accuracy)}")
    marks = [f"stage {point.stage}" if point.stage else "", "on the front" if front else ""]
    lines.append(", ".join(mark for mark in [*marks, "chosen" if point.chosen else ""] if mark))
    return "\n".join(line for line in [*lines, point.detail] if line)


def _front_path(report: Report, x: Scale, y: Scale, cost: str) -> str:
    """The front as steps: between two networks, the cheaper one is what a budget buys."""
    corners: list[tuple[float, float]] = []
    for point in pareto_front(report.pareto, cost):
        if corners:
            corners.append((cost_of(point, cost), corners[-1][1]))
        corners.append((cost_of(point, cost), point.accuracy))
    if corners:
        corners.append((x.high, corners[-1][1]))
    return path(corners, x, y)


def pareto_scales(report: Report, log: bool, cost: str = "macs") -> tuple[Scale, Scale]:
    """The two axes of the Pareto plot; the accuracy floor is in view."""
    accuracies = [point.accuracy for point in report.pareto]
    if report.accuracy_floor is not None:
        accuracies.append(report.accuracy_floor)
    return (
        Scale.around([cost_of(point, cost) for point in report.pareto], log=log, pad=0.05),
        Scale.around(accuracies, pad=0.07),
    )


def roomiest(x: float, y: float, text: str, marks: Sequence[Mark]) -> Label:
    """The label on that side of its point where it covers the fewest marks (sizes as at common widths)."""
    length = 1.1 * len(text)

    def covered(label: Label) -> float:
        left = label.x - length - 1 if label.side == "end" else label.x + 1
        top = label.y + 1 if label.below else label.y - 6
        if left < 0 or left + length > 100 or top + 5 > 100:
            return math.inf
        return sum(left <= mark.x <= left + length and top <= mark.y <= top + 5 for mark in marks)

    sides = (Label(x, y, text, side, below) for below in (False, True) for side in ("start", "end"))
    return min(sides, key=covered)


def pareto_chart(report: Report, *, log: bool, cost: str = "macs") -> Chart:
    """A cost against accuracy, every network a marker, the front a stepped line."""
    x, y = pareto_scales(report, log, cost)
    stage_tones = tones([p.stage for p in report.pareto if p.stage != DENSE])
    marks: list[Mark] = []
    labelled: list[tuple[float, float, str]] = []
    flags = on_front(report.pareto, cost)
    # Plain points first, so that the front, the dense and the chosen network are drawn on top of them.
    pairs = list(zip(report.pareto, flags, strict=True))
    pairs.sort(key=lambda pair: (pair[0].chosen, pair[0].stage == DENSE, pair[1]))
    for point, front in pairs:
        if not (x.holds(cost_of(point, cost)) and y.holds(point.accuracy)):
            continue
        tone = stage_tones.get(point.stage, 0)
        shape = SHAPES[tone - 1] if tone else "star"
        at = (x.at(cost_of(point, cost)), round(100 - y.at(point.accuracy), 2))
        style = " ".join(["front" if front else "off", *(["chosen"] if point.chosen else [])])
        if point.chosen:
            marks.append(Mark(*at, "ring", 0, "chosen"))
        marks.append(Mark(*at, shape, tone, style, _pareto_tip(point, report, front)))
        if point.chosen or point.stage == DENSE:
            text = f"{'chosen' if point.chosen else 'dense'}: {units.percent(point.accuracy)}"
            labelled.append((*at, text))
    lines = [Line(_front_path(report, x, y, cost), 0, "frontline")]
    legend = [Key("Pareto front", 0, style="frontline")]
    if report.accuracy_floor is not None:
        floor = [(x.low, report.accuracy_floor), (x.high, report.accuracy_floor)]
        lines.append(Line(path(floor, x, y), 0, "limit"))
        legend.append(Key(f"limit {units.percent(report.accuracy_floor, 1)}", 0, style="limit"))
    if any(point.stage == DENSE for point in report.pareto):
        legend.append(Key("dense original", 0, "star"))
    legend += [Key(stage or "networks", tone, SHAPES[tone - 1]) for stage, tone in stage_tones.items()]
    ticks, tick_texts = cost_ticks(x, cost)
    name = COSTS[cost][0]
    return Chart(
        summary=f"{len(report.pareto)} networks, {sum(flags)} of them on the Pareto front; "
        f"{name} on the x axis, {report.accuracy_label} on the y axis.",
        x_title=f"{name} (log scale)" if log else name,
        y_title=report.accuracy_label,
        x_ticks=x_axis(x, tick_texts, ticks),
        y_ticks=y_axis(y, percent=True),
        lines=tuple(lines),
        marks=tuple(marks),
        labels=tuple(roomiest(left, top, text, marks) for left, top, text in labelled),
        legend=tuple(legend),
    )


def layer_runs(triplets: Sequence[Triplet]) -> list[tuple[str, int, int]]:
    """Stretches of consecutive steps on one layer: (layer, first index, last index)."""
    runs: list[tuple[str, int, int]] = []
    for index, step in enumerate(triplets):
        if runs and runs[-1][0] == step.layer:
            runs[-1] = (step.layer, runs[-1][1], index)
        else:
            runs.append((step.layer, index, index))
    return runs


def _triplet_tip(step: Triplet) -> str:
    lines = [
        f"step {step.step}: {step.layer}, {step.channels_left} channels left",
        f"before {units.percent(step.before)}",
        f"after pruning {units.percent(step.after_pruning)}",
        f"after retraining {units.percent(step.after_retraining)}",
        f"drop {units.points(step.drop)} points"
        + f", this step {units.points(step.incremental_drop)}" * step.cumulative,
        f"{units.count(step.macs)} MACs",
    ]
    return "\n".join(lines + ([] if step.accepted else ["undone"]))


def triplet_scales(triplets: Sequence[Triplet]) -> tuple[Scale, Scale]:
    """Steps by position (half a step of margin) and the accuracies of all three moments."""
    values = [v for t in triplets for v in (t.before, t.after_pruning, t.after_retraining)]
    return Scale(-0.75, len(triplets) - 0.25), Scale.around(values, pad=0.06)


def triplet_chart(report: Report) -> Chart:
    """Accuracy over the steps: before, right after pruning, after retraining; undone steps crossed."""
    steps = report.triplets
    x, y = triplet_scales(steps)
    marks = []
    for index, step in enumerate(steps):
        at = x.at(index)
        if y.holds(step.after_pruning):
            marks.append(Mark(at, round(100 - y.at(step.after_pruning), 2), "down", 2, "small"))
        if y.holds(step.after_retraining):
            shape, tone, style = ("circle", 1, "small") if step.accepted else ("cross", 4, "front")
            height = round(100 - y.at(step.after_retraining), 2)
            marks.append(Mark(at, height, shape, tone, style, _triplet_tip(step)))
    kept = [(index, step.after_retraining) for index, step in enumerate(steps) if step.accepted]
    before = [(index, step.before) for index, step in enumerate(steps)]
    bands = []
    for number, (layer, first, last) in enumerate(layer_runs(steps)):
        start = x.at(first - 0.5)
        bands.append(Band(start, round(x.at(last + 0.5) - start, 2), layer, number % 2 == 1))
    positions = [round(tick) for tick in x.ticks(8) if tick == int(tick) and 0 <= tick < len(steps)]
    undone = sum(not step.accepted for step in steps)
    return Chart(
        summary=f"Validation accuracy over {len(steps)} pruning steps, {undone} of them undone.",
        x_title="pruning step",
        y_title="accuracy",
        x_ticks=x_axis(x, [str(steps[position].step) for position in positions], positions),
        y_ticks=y_axis(y, percent=True),
        lines=(Line(path(before, x, y), 3, "dashed"), Line(path(kept, x, y), 1)),
        marks=tuple(marks),
        bands=tuple(bands),
        legend=(
            Key("before pruning", 3, style="dashed"),
            Key("after pruning", 2, "down"),
            Key("after retraining", 1, "circle"),
            *([Key("undone step", 4, "cross")] if undone else []),
        ),
        pick="x",
    )


def _dash(tone: int) -> str:
    """Every second series is dashed, so that colour is not all that tells them apart."""
    return "dashed" if tone % 2 == 0 else ""


def curve_scales(curve: Curve) -> tuple[Scale, Scale]:
    """Axes that hold every point of every series."""
    points = [point for series in curve.series.values() for point in series]
    return Scale.around([a for a, _ in points], pad=0.02), Scale.around([b for _, b in points], pad=0.07)


def curve_chart(curve: Curve) -> Chart:
    """Lines over a common x axis, one per series."""
    x, y = curve_scales(curve)
    colours = tones(list(curve.series))
    lines: list[Line] = []
    marks: list[Mark] = []
    for name, series in curve.series.items():
        lines.append(Line(path(series, x, y), colours[name], _dash(colours[name])))
        few = "small" if len(series) <= 40 else "ghost"
        for a, b in series:
            if x.holds(a) and y.holds(b):
                height = units.percent(b) if curve.percent else units.significant(b, 4)
                tip = f"{name}\n{curve.x_label} {units.significant(a, 4)}\n{curve.y_label} {height}"
                at = (x.at(a), round(100 - y.at(b), 2))
                marks.append(Mark(*at, SHAPES[colours[name] - 1], colours[name], few, tip))
    ticks = x.ticks(6)
    return Chart(
        summary=f"{curve.name}: {curve.y_label} over {curve.x_label}; series {', '.join(curve.series)}.",
        x_title=curve.x_label,
        y_title=curve.y_label,
        x_ticks=x_axis(x, tick_labels(ticks, units.fixed), ticks),
        y_ticks=y_axis(y, percent=curve.percent),
        lines=tuple(lines),
        marks=tuple(marks),
        legend=tuple(Key(name, tone, style=_dash(tone)) for name, tone in colours.items()),
    )


def histogram_path(counts: Sequence[int], most: int) -> str:
    """A histogram's outline in a 100 x 100 box, from the baseline to the baseline; nothing where there is nothing."""
    if not any(counts):
        return ""
    width = 100.0 / len(counts)
    tops = [round(100.0 - 96.0 * count / most, 2) for count in counts]
    corners = [f"{index * width:.4g},{top:g}H{(index + 1) * width:.4g}" for index, top in enumerate(tops)]
    return f"M0,100V{tops[0]:g}" + "L".join(["", *corners]) + "V100Z"


def longest(values: Iterable[float]) -> float:
    """The largest finite value, or 1 where there is nothing to draw."""
    return max((value for value in values if math.isfinite(value)), default=0.0) or 1.0


def bar(value: float, largest: float) -> float:
    """A bar's length in percent of the longest one."""
    return round(100.0 * value / largest, 2) if largest > 0 and math.isfinite(value) else 0.0
