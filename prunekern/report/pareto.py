"""Which points no other point beats in both a cost and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

COSTS = ("macs", "params", "latency", "energy")


class HasCost(Protocol):
    """Anything with costs (lower is better; MACs at least) and an accuracy (higher is better)."""

    @property
    def macs(self) -> int: ...

    @property
    def accuracy(self) -> float: ...


Point = TypeVar("Point", bound=HasCost)


def costs_of(points: Sequence[Any]) -> tuple[str, ...]:
    """The costs that every point has."""
    return tuple(cost for cost in COSTS if points and all(getattr(p, cost, None) is not None for p in points))


def on_front(points: Sequence[HasCost], cost: str = "macs") -> tuple[bool, ...]:
    """For each point, whether it is Pareto-optimal in one cost and accuracy, in the order given.

    A point is off the front when another one is at least as good in both the cost and accuracy and better in
    one of them. So exact duplicates are on the front together, and of two points of equal cost only the
    more accurate stays. A NaN accuracy is never on the front and beats nobody.
    """
    flags = [False] * len(points)
    costs = [getattr(point, cost) for point in points]
    valid = [index for index, point in enumerate(points) if not math.isnan(point.accuracy)]
    best, cheapest = -math.inf, -1.0
    for index in sorted(valid, key=lambda i: (costs[i], -points[i].accuracy)):
        point = points[index]
        duplicate = point.accuracy == best and costs[index] == cheapest
        if point.accuracy > best or duplicate:
            flags[index] = True
            best, cheapest = point.accuracy, costs[index]
    return tuple(flags)


def pareto_front(points: Sequence[Point], cost: str = "macs") -> tuple[Point, ...]:
    """The Pareto-optimal points, cheapest first."""
    front = [point for point, keep in zip(points, on_front(points, cost), strict=True) if keep]
    return tuple(sorted(front, key=lambda point: float(getattr(point, cost))))
