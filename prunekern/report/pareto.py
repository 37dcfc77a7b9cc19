"""Which points no other point beats in both cost and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar


class HasCost(Protocol):
    """Anything with a cost (lower is better) and an accuracy (higher is better)."""

    @property
    def macs(self) -> int: ...

    @property
    def accuracy(self) -> float: ...


Point = TypeVar("Point", bound=HasCost)


def on_front(points: Sequence[HasCost]) -> tuple[bool, ...]:
    """For each point, whether it is Pareto-optimal, in the order given.

    A point is off the front when another one is at least as good in both MACs and accuracy and better in
    one of them. So exact duplicates are on the front together, and of two points with equal MACs only the
    more accurate stays. A NaN accuracy is never on the front and beats nobody.
    """
    flags = [False] * len(points)
    valid = [index for index, point in enumerate(points) if not math.isnan(point.accuracy)]
    best, best_macs = -math.inf, -1
    for index in sorted(valid, key=lambda i: (points[i].macs, -points[i].accuracy)):
        point = points[index]
        duplicate = point.accuracy == best and point.macs == best_macs
        if point.accuracy > best or duplicate:
            flags[index] = True
            best, best_macs = point.accuracy, point.macs
    return tuple(flags)


def pareto_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The Pareto-optimal points, cheapest first."""
    front = [point for point, keep in zip(points, on_front(points), strict=True) if keep]
    return tuple(sorted(front, key=lambda point: point.macs))
