"""Accuracy against cost: compress one network to several sizes and see what each costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from prunekern.api import compress
from prunekern.core.notebook import Notebook
from prunekern.cost import energy, profile
from prunekern.errors import InputError, LoweringError, TargetError
from prunekern.graph.inputs import Call
from prunekern.graph.trace import trace
from prunekern.prune.schedule import model_digest
from prunekern.prune.target import Target
from prunekern.report import DENSE, Figure, ParetoPoint, Report, on_front
from prunekern.report.charts import COSTS
from prunekern.report.pareto import costs_of
from prunekern.result import Result, load
from prunekern.search.probe import LoweredProbe
from prunekern.summary import environment

VALIDATION = "validation accuracy, compressed"
ORIGINAL = "validation accuracy, original"
BY = {"macs": "MACs", "params": "parameters", "latency": "latency"}


@dataclass(frozen=True)
class Costs:
    """Of one network. latency: µs of a call of it lowered, at the batch of the example inputs, None where it cannot be
    lowered; energy: µJ for one sample, a proxy (``prunekern.cost.energy``)."""

    accuracy: float
    macs: int
    params: int
    energy: float
    latency: float | None = None

    def point(self, name: str, stage: str) -> ParetoPoint:
        return ParetoPoint(name, self.macs, self.accuracy, stage, params=self.params, latency=self.latency,
                           energy=self.energy)


@dataclass(frozen=True)
class Pareto:
    """One Result and its costs for each reached share of ``by``, and the original's costs. Accuracies are validation
    accuracies."""

    original: Costs
    results: tuple[Result, ...]
    costs: tuple[Costs, ...]
    shares: tuple[float, ...]
    by: str = "macs"
    notes: tuple[str, ...] = ()

    @property
    def dense(self) -> tuple[int, float]:
        """MACs and accuracy of the original."""
        return self.original.macs, self.original.accuracy

    def points(self) -> tuple[ParetoPoint, ...]:
        """The original first, then every result."""
        return (self.original.point("original", DENSE),
                *(each.point(f"{share:.0%} of the {BY[self.by]}", "pruned")
                  for share, each in zip(self.shares, self.costs, strict=True)))

    def front(self, cost: str = "macs") -> tuple[ParetoPoint, ...]:
        """The points that no other beats in both accuracy and a cost: 'macs', 'params', 'latency' or 'energy'.

        Raises InputError for a cost that not all points have.
        """
        points = self.points()
        if cost not in costs_of(points):
            raise InputError(f"the front in {cost!r}: known of every network are {', '.join(costs_of(points))}.")
        return tuple(p for p, keep in zip(points, on_front(points, cost), strict=True) if keep)

    def report(self) -> Report:
        """A panel for each cost, and a table; ``.save(folder)`` writes HTML, JSON and PNG."""
        points = self.points()
        small = min(points, key=lambda point: point.macs)
        words = [COSTS[cost][0] for cost in costs_of(points)]
        return Report(title=f"Accuracy against {', '.join(words[:-1])}{' and ' if words[:-1] else ''}{words[-1]}",
                      pareto=points, accuracy_label="validation accuracy",
                      headline=(Figure("networks", len(self.results)), Figure("smallest", small.macs, "MACs",
                                                                              f"{small.accuracy:.2%}")),
                      notes=self.notes, environment=environment())

    def __str__(self) -> str:
        points, lines = self.points(), []
        fronts = {cost: {point.name for point in self.front(cost)} for cost in costs_of(points)}
        for point in points:
            on = [COSTS[cost][0] for cost, names in fronts.items() if point.name in names]
            further = "  ".join(COSTS[cost][1](getattr(point, cost)) for cost in fronts if cost != "macs")
            lines.append(f"{point.name:<24} {point.macs:>14,} MACs {point.accuracy:>8.2%}  {further}"
                         f"{'  on the front in ' + ', '.join(on) if on else ''}")
        return "\n".join(lines)


def pareto(model: nn.Module, example_inputs: Any = None, shares: Sequence[float] = (0.8, 0.6, 0.4, 0.3, 0.2), *,
           validate: Any, by: str = "macs", on: str | None = None, latency: bool = True,
           checkpoint: str | Path | None = None, tell: Callable[[str], None] = lambda _: None,
           **options: Any) -> Pareto:
    """Compress ``model`` to each share of a cost, and measure MACs, parameters, latency, energy (a proxy) and accuracy.

    by: which cost the shares are of: 'macs', 'params' or 'latency'. on: the device that latency is measured on.
    latency: False leaves it out. checkpoint: a folder; the same call continues from it after a kill, and one with more
    shares adds to it. options: those of ``compress`` (train=, criterion=, calibrate=, ...).
    Latencies are of lowered networks in turns with the lowered original, in its units.

    Shares out of reach are left out and said in ``notes``. Raises InputError without validation data, TargetError where
    no share is in reach, ArtefactError (a checkpoint of another run), and what ``compress`` raises.
    """
    if validate is None:
        raise InputError("pareto needs validate= (data or a function) to measure accuracies.")
    if by not in BY:
        raise TargetError(f"by={by!r}: the shares can be of {', '.join(map(repr, BY))}.")
    if not shares:
        raise TargetError("shares=() asks for no network; pass shares in (0, 1], e.g. (0.8, 0.5, 0.3).")
    study = _Study(model, example_inputs, validate, by, on, latency, Path(checkpoint) if checkpoint else None, tell,
                   options)
    return study.run(tuple(dict.fromkeys(shares)))


class _Study:
    """One call of ``pareto``."""

    def __init__(self, model: nn.Module, example: Any, validate: Any, by: str, on: str | None, latency: bool,
                 folder: Path | None, tell: Callable[[str], None], options: Mapping[str, Any]) -> None:
        self.model, self.example, self.validate, self.by, self.on = model, example, validate, by, on
        self.latency, self.folder, self.tell, self.options = latency, folder, tell, options
        plain = {name: value for name, value in options.items() if isinstance(value, (str, int, float, bool))}
        identity = {"model": model_digest(model) if folder else "", "by": by, "on": on or "", "latency": latency,
                    "options": plain}
        self.notebook = Notebook(folder / "pareto.json" if folder else None, "Pareto points", identity)
        self.notes: list[str] = []
        self.probe: LoweredProbe | None = None
        self.unit = 0.0                 # µs of the original, in which all latencies are

    def run(self, shares: Sequence[float]) -> Pareto:
        found: list[tuple[float, Result, Costs]] = []
        refused: list[str] = []
        original: Costs | None = None
        for number, share in enumerate(shares, 1):
            self.tell(f"{share:.0%} of the {BY[self.by]} ({number}/{len(shares)})")
            try:
                result = self._result(share)
            except TargetError as error:
                refused.append(f"{share:.0%} of the {BY[self.by]}: {error}")
                continue
            original = original or self._original(result)
            found.append((share, result, self._costs(share, result)))
        if original is None:
            raise TargetError("none of the shares is in reach: " + " ".join(refused))
        if any(costs.latency is None for _, _, costs in found):
            original, found = replace(original, latency=None), [(s, r, replace(c, latency=None)) for s, r, c in found]
        return Pareto(original, tuple(r for _, r, _ in found), tuple(c for _, _, c in found),
                      tuple(s for s, _, _ in found), self.by, tuple(dict.fromkeys((*refused, *self.notes))))

    def _result(self, share: float) -> Result:
        folder = self.folder / f"{self.by}-{share:.5f}" if self.folder else None
        if folder is not None and f"{share:.5f}" in self.notebook.known:
            return load(folder / "result", model=self.model)
        target: dict[str, Any] = {self.by: share, **({"on": self.on} if self.by == "latency" else {})}
        result = compress(self.model, self.example, Target(**target), validate=self.validate, tell=self.tell,
                          checkpoint=folder / "steps" if folder else None, **{"lower": False, **self.options})
        if folder is not None:
            result.save(folder / "result")
        return result

    def _original(self, result: Result) -> Costs:
        self.tell("measure the original")
        accuracy = result.metrics[ORIGINAL]

        def measured() -> dict[str, Any]:
            latency = self._probe(result.example).against(self._probe(result.example).dense).dense * 1e6 \
                if self._lowers(result.example) else None
            return asdict(_counted(self.model, result.example, accuracy, latency))
        found = Costs(**self.notebook.get("original", measured))
        self.unit = found.latency or 0.0
        return found

    def _costs(self, share: float, result: Result) -> Costs:
        def measured() -> dict[str, Any]:
            latency = None
            if self._lowers(result.example):
                self.tell(f"{share:.0%} of the {BY[self.by]}: measure latency")
                try:
                    latency = self._probe(result.example).module(result.model).share * self.unit
                except LoweringError as error:
                    self.notes.append(f"latency is left out, as {share:.0%} of the {BY[self.by]} cannot be lowered: "
                                      f"{error}")
            return asdict(_counted(result.model, result.example, result.metrics[VALIDATION], latency))
        return Costs(**self.notebook.get(f"{share:.5f}", measured))

    def _lowers(self, call: Call) -> bool:
        """Whether latency can be measured: asked for, and the original has a lowered form."""
        if self.latency:
            try:
                _ = self._probe(call).dense
            except LoweringError as error:
                self.latency = False
                self.notes.append(f"latency is left out: {error}")
        return self.latency

    def _probe(self, call: Call) -> LoweredProbe:
        self.probe = self.probe or LoweredProbe(self.model, call, self.options.get("backend", "auto"), self.on)
        return self.probe


def _counted(model: nn.Module, call: Call, accuracy: float, latency: float | None) -> Costs:
    graph = trace(model, call)
    counted = profile(graph, batch=1 if graph.free_batch else None)
    return Costs(float(accuracy), counted.macs // counted.batch, counted.params, energy(counted), latency)
