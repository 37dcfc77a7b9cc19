"""Accuracy against cost: compress one network to several sizes and see what each costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekern.api import compress
from prunekern.errors import InputError, TargetError
from prunekern.prune.target import Target
from prunekern.report import DENSE, Figure, ParetoPoint, Report, on_front
from prunekern.result import Result
from prunekern.summary import environment

VALIDATION, TEST = "validation accuracy, compressed", "test accuracy, compressed"


@dataclass(frozen=True)
class Pareto:
    """One Result per reached share of the MACs, and the original's (MACs, accuracy)."""

    dense: tuple[int, float]
    results: tuple[Result, ...]
    shares: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def points(self) -> tuple[ParetoPoint, ...]:
        """The original first, then every result; accuracies are validation accuracies."""
        rows = [ParetoPoint("original", self.dense[0], self.dense[1], DENSE)]
        rows += [ParetoPoint(f"{share:.0%} of the MACs", result.plan.costs["macs"][1],
                             result.metrics[VALIDATION], "pruned")
                 for share, result in zip(self.shares, self.results, strict=True)]
        return tuple(rows)

    def front(self) -> tuple[ParetoPoint, ...]:
        """The points that no other beats in both MACs and accuracy."""
        points = self.points()
        return tuple(p for p, keep in zip(points, on_front(points), strict=True) if keep)

    def report(self) -> Report:
        """Plot and table; ``.save(folder)`` writes HTML, JSON and PNG."""
        small = min(self.points(), key=lambda point: point.macs)
        return Report(title="Accuracy against MACs", pareto=self.points(), accuracy_label="validation accuracy",
                      headline=(Figure("networks", len(self.results)), Figure("smallest", small.macs, "MACs",
                                                                              f"{small.accuracy:.2%}")),
                      notes=self.notes, environment=environment())

    def __str__(self) -> str:
        front = {point.name for point in self.front()}
        return "\n".join(f"{point.name:<20} {point.macs:>14,} MACs {point.accuracy:>8.2%}"
                         f"{'  on the front' if point.name in front else ''}" for point in self.points())


def pareto(model: nn.Module, example_inputs: Any = None, shares: Sequence[float] = (0.8, 0.6, 0.4, 0.3, 0.2), *,
           validate: Any, tell: Callable[[str], None] = lambda _: None, **options: Any) -> Pareto:
    """Compress ``model`` to each share of its MACs. options: those of ``compress`` (train=, criterion=, ...).

    Shares out of reach are left out and said in ``notes``. Raises InputError without validation data, and what
    ``compress`` raises.
    """
    if validate is None:
        raise InputError("pareto needs validate= (data or a function) to measure accuracies.")
    results: list[Result] = []
    reached: list[float] = []
    notes: list[str] = []
    for share in shares:
        tell(f"{share:.0%} of the MACs")
        try:
            results.append(compress(model, example_inputs, Target(macs=share), validate=validate,
                                    **{"lower": False, **options}))
            reached.append(share)
        except TargetError as error:
            notes.append(f"{share:.0%} of the MACs: {error}")
    if not results:
        raise TargetError("none of the shares is in reach: " + " ".join(notes))
    first = results[0]
    dense = first.plan.costs["macs"][0], first.metrics["validation accuracy, original"]
    return Pareto(dense, tuple(results), tuple(reached), tuple(notes))
