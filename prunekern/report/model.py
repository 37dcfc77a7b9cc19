"""What a report says, as plain frozen data; every section is optional.

Units, everywhere in this file: accuracies are fractions in 0..1; drops are in points (100 x a difference of
two fractions, so 0.912 -> 0.905 is a drop of 0.7 points); times are in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TextIO

from prunekern.errors import PrunekernError

if TYPE_CHECKING:
    from prunekern.report.save import Saved

DENSE = "dense"
"""The stage of the Pareto point that stands for the original network."""

Relation = Literal["<=", "<", ">=", ">", "=="]


def _fraction(where: str, name: str, value: float | None) -> None:
    if value is not None and not math.isnan(value) and not 0.0 <= value <= 1.0:
        raise PrunekernError(
            f"{where}: {name} is {value!r}, which is no fraction between 0 and 1. "
            "Divide percentages by 100 before they go into a report."
        )


@dataclass(frozen=True)
class Figure:
    """One headline number.

    `unit` decides the formatting of a number: "MACs", "FLOPs", "params", "bytes" get k/M/G; "fraction" is
    shown in percent (0.912 -> 91.20 %); "µs" becomes µs, ms or s; "×", "points" and any other unit follow the
    number. A string is shown as it is.
    """

    label: str
    value: float | int | str
    unit: str = ""
    detail: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One layer: output channels, MACs and parameters in the original and in the pruned network."""

    name: str
    op: str
    before: int
    after: int
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


@dataclass(frozen=True)
class ParetoPoint:
    """One network: its MACs and accuracy (a fraction). `stage` groups points by colour; see `DENSE`.

    Further costs where they are known: parameters, latency in µs, energy in µJ. A cost that all points of a report have
    gets a panel of its own.
    """

    name: str
    macs: int
    accuracy: float
    stage: str = ""
    chosen: bool = False
    detail: str = ""
    params: int | None = None
    latency: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        _fraction(f"Pareto point {self.name!r}", "accuracy", self.accuracy)


@dataclass(frozen=True, kw_only=True)
class Triplet:
    """One pruning step: accuracy before pruning, after pruning, and after retraining (fractions).

    `incremental_drop` (points) is what this step alone cost, by the caller's definition; `drop` (points) is
    `before - after_retraining`. A step with `accepted=False` was recorded and undone.
    """

    step: int
    layer: str
    channels_left: int
    before: float
    after_pruning: float
    after_retraining: float
    incremental_drop: float
    macs: int
    accepted: bool = True
    test_accuracy: float | None = None
    detail: str = ""

    derived: ClassVar[tuple[str, ...]] = ("drop",)

    def __post_init__(self) -> None:
        where = f"triplet of step {self.step} ({self.layer})"
        for name in ("before", "after_pruning", "after_retraining", "test_accuracy"):
            _fraction(where, name, getattr(self, name))

    @property
    def drop(self) -> float:
        """The pruning drop in points: before pruning minus after retraining."""
        return 100.0 * (self.before - self.after_retraining)

    @property
    def cumulative(self) -> bool:
        """Whether the drop is that of several steps, so that what this one cost is another figure."""
        return self.incremental_drop != self.drop


@dataclass(frozen=True)
class Check:
    """One verification figure and the limit it is held to; without a limit it is stated, not judged."""

    value: float | int
    limit: float | int | None = None
    explanation: str = ""
    relation: Relation = "<="
    unit: str = ""

    derived: ClassVar[tuple[str, ...]] = ("passed",)

    @property
    def passed(self) -> bool | None:
        """Whether `value relation limit` holds (a NaN never passes); None where there is no limit."""
        if self.limit is None:
            return None
        value, limit = self.value, self.limit
        match self.relation:
            case "<=":
                return bool(value <= limit)
            case "<":
                return bool(value < limit)
            case ">=":
                return bool(value >= limit)
            case ">":
                return bool(value > limit)
            case "==":
                return bool(value == limit)
        raise PrunekernError(f"check with relation {self.relation!r}; use one of <=, <, >=, >, ==.")


@dataclass(frozen=True)
class Proof:
    """All verification figures by name, in the order they are to be read."""

    checks: dict[str, Check] = field(default_factory=dict)

    derived: ClassVar[tuple[str, ...]] = ("passed",)

    @property
    def judged(self) -> tuple[Check, ...]:
        """The checks that have a limit."""
        return tuple(check for check in self.checks.values() if check.passed is not None)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that missed their limit."""
        return tuple(name for name, check in self.checks.items() if check.passed is False)

    @property
    def passed(self) -> bool:
        """Whether something was judged and nothing missed its limit."""
        return bool(self.judged) and not self.failed


@dataclass(frozen=True)
class LatencyRow:
    """One contender at one batch size: quantiles in µs, and how many times faster than `baseline` it is."""

    contender: str
    batch: int
    p20: float
    p50: float
    p80: float
    speedup: float | None = None
    baseline: str = ""
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One chart of lines, such as loss over epochs: series name -> (x, y) points.

    With `percent=True` the y values are fractions and are shown in percent.
    """

    name: str
    x_label: str
    y_label: str
    series: dict[str, tuple[tuple[float, float], ...]]
    percent: bool = False

    def __post_init__(self) -> None:
        frozen = {name: tuple((x, y) for x, y in points) for name, points in self.series.items()}
        object.__setattr__(self, "series", frozen)


@dataclass(frozen=True)
class WeightRow:
    """One weight tensor: how many values it has, how many of them are zero before and after, and where the others lie.

    `edges` are those of the histograms' n bins (n + 1 of them), `counts_before` and `counts` what is in each.
    """

    name: str
    weights: int
    zeros_before: int
    zeros: int
    edges: tuple[float, ...]
    counts_before: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        for field_name in ("edges", "counts_before", "counts"):
            object.__setattr__(self, field_name, tuple(getattr(self, field_name)))
        if not len(self.edges) - 1 == len(self.counts_before) == len(self.counts) > 0:
            raise PrunekernError(
                f"weights of {self.name!r}: {len(self.edges)} edges for {len(self.counts_before)} and "
                f"{len(self.counts)} bins. Pass one edge more than bins, at least one bin."
            )


@dataclass(frozen=True)
class Table:
    """Any other table worth showing (lowered steps, counters, frozen channels): cells are text or numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise PrunekernError(
                    f"table {self.title!r}, row {number}: {len(row)} cells for {len(self.columns)} columns. "
                    "Pass None for an empty cell."
                )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Report:
    """Everything one run has to say. `accuracy_floor` (a fraction) and `drop_limit` (points) are drawn as
    lines in the Pareto and triplet charts; `accuracy_label` says which accuracy the Pareto points hold."""

    title: str
    subtitle: str = ""
    headline: tuple[Figure, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()
    triplets: tuple[Triplet, ...] = ()
    curves: tuple[Curve, ...] = ()
    proof: Proof | None = None
    latency: tuple[LatencyRow, ...] = ()
    weights: tuple[WeightRow, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    accuracy_label: str = "accuracy"
    accuracy_floor: float | None = None
    drop_limit: float | None = None
    created: str = field(default_factory=_now)
    command: str = ""

    def __post_init__(self) -> None:
        for item in fields(self):  # lists are welcome; what is kept is immutable and compares equal
            value = getattr(self, item.name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, item.name, tuple(value))
            elif isinstance(value, Mapping):
                object.__setattr__(self, item.name, dict(value))
        _fraction(f"report {self.title!r}", "accuracy_floor", self.accuracy_floor)

    def to_json(self) -> str:
        """The report as versioned JSON text; `from_json` gives an equal report back."""
        from prunekern.report.codec import dumps

        return dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what `to_json` wrote. Raises `ArtefactError` on damaged text or another version."""
        from prunekern.report.codec import loads

        return loads(text)

    def show(self, *, full: bool = False, file: TextIO | None = None) -> None:
        """Prints the report as tables; see `prunekern.report.show`."""
        from prunekern.report.terminal import show

        show(self, full=full, file=file)

    def save(self, folder: str | Path) -> Saved:
        """Writes HTML, JSON, CSV and PNGs into `folder`; see `prunekern.report.save`."""
        from prunekern.report.save import save

        return save(self, folder)
