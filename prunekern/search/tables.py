"""Seconds of every step of a lowered network at some widths, and what they say about other widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from torch import fx

from prunekern.core.graph import ShapeOf
from prunekern.graph.groups import Groups

REST = ""               # the name of all that is no step of a node of its own: other steps, the call itself
Widths = Mapping[str, tuple[float, float]]
Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """Seconds of one step. widths: [n, 2] shares of the elements it reads and writes; seconds: [n].

    Where the widths form a grid, values between are interpolated bilinearly; where reading and writing shrink together,
    linearly; else by the bilinear formula with coefficients >= 0 that fits best (least squares). Beyond the widths that
    were measured the last slope goes on, never below 0. All three are exact on what is linear in both widths.
    """

    widths: np.ndarray
    seconds: np.ndarray

    def at(self, read: float, written: float) -> float:
        if self._line is not None:
            axis, x, y = self._line
            return max(_linear(x, y, (read, written)[axis]), 0.0)
        if self._grid is not None:
            xs, ys, values = self._grid
            return max(_linear(xs, [_linear(ys, row, written) for row in values], read), 0.0)
        return float(_terms(read, written) @ self._fit)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_line", self._as_line())
        object.__setattr__(self, "_grid", None if self._line is not None else self._as_grid())
        if self._line is None and self._grid is None:
            from scipy.optimize import nnls
            fit, _ = nnls(np.stack([_terms(*pair) for pair in self.widths]), self.seconds)
            object.__setattr__(self, "_fit", fit)

    _line: Any = None
    _grid: Any = None
    _fit: Any = None

    def _as_line(self) -> Any:
        """(which width, its values, seconds) where there is only one width to speak of."""
        read, written = self.widths[:, 0], self.widths[:, 1]
        for axis, same in ((1, np.allclose(read, written) or np.ptp(read) < 1e-9), (0, np.ptp(written) < 1e-9)):
            if same:
                return (axis, *_means(self.widths[:, axis], self.seconds))
        return None

    def _as_grid(self) -> Any:
        xs, ys = (np.unique(self.widths[:, axis].round(9)) for axis in (0, 1))
        cells: dict[tuple[float, float], list[float]] = {(float(x), float(y)): [] for x, y in product(xs, ys)}
        for (x, y), each in zip(self.widths.round(9), self.seconds, strict=True):
            cells[float(x), float(y)].append(each)
        if not all(cells.values()):
            return None
        return xs, ys, np.array([[np.mean(cells[float(x), float(y)]) for y in ys] for x in xs])


def _terms(read: float, written: float) -> np.ndarray:
    return np.array([1.0, read, written, read * written])


def _means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, inverse = np.unique(x.round(9), return_inverse=True)
    return values, np.bincount(inverse, y) / np.bincount(inverse)


def _linear(xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray, x: float) -> float:
    """Piecewise linear through (xs, ascending; ys), the outer pieces going on."""
    if len(xs) == 1:
        return float(ys[0])
    at = min(max(int(np.searchsorted(xs, x)), 1), len(xs) - 1)
    slope = (ys[at] - ys[at - 1]) / (xs[at] - xs[at - 1])
    return float(ys[at - 1] + slope * (x - xs[at - 1]))


class Corrected:
    """From the share that tables predict to the share that is measured: piecewise linear through what is known; below
    the smallest in proportion, above the largest halfway between that and the line to (1, 1), which can lie beyond a
    jump. Never falls as the prediction rises."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def add(self, predicted: float, measured: float) -> None:
        self.points.append((predicted, measured))

    def at(self, predicted: float) -> float:
        known = dict(sorted(self.points)) or {1.0: 1.0}
        xs = np.array(sorted(known))
        ys = np.maximum.accumulate(np.array([known[x] for x in xs]))
        if predicted <= xs[0]:
            return float(ys[0] * predicted / xs[0]) if xs[0] > 0 else float(ys[0])
        if predicted <= xs[-1]:
            return _linear(xs, ys, predicted)
        rising = float(ys[-1]) * predicted / max(float(xs[-1]), 1e-12)
        if xs[-1] >= 1 - 1e-9 or ys[-1] >= 1:
            return rising
        return (rising + _linear([xs[-1], 1.0], [ys[-1], 1.0], predicted)) / 2


@dataclass(frozen=True)
class Tables:
    """Tables of all steps, by the node of the graph that they compute; ``REST`` is everything else together."""

    groups: Groups
    steps: Mapping[str, Table]
    dense: float

    @classmethod
    def of(cls, groups: Groups, runs: Sequence[tuple[Widths, Seconds]]) -> Tables:
        """runs: (widths of the nodes, seconds of the steps) of each network that was measured."""
        names = [name for name in runs[0][0] if all(name in seconds for _, seconds in runs)]
        steps = {}
        for name in names:
            if name != REST:
                steps[name] = Table(np.array([widths[name] for widths, _ in runs]),
                                    np.array([seconds[name] for _, seconds in runs]))
        rest = [sum(each for name, each in seconds.items() if name not in steps) for _, seconds in runs]
        steps[REST] = Table(np.array([widths[REST] for widths, _ in runs]), np.array(rest))
        bare = cls(groups, steps, 1.0)
        return cls(groups, steps, max(bare.seconds(widths_of(groups, _dense_shapes(groups))), 1e-12))

    def seconds(self, widths: Widths) -> float:
        return math.fsum(table.at(*widths[name]) for name, table in self.steps.items())

    def share(self, shape: ShapeOf) -> float:
        """Of the time of the network that nothing is cut from."""
        return self.seconds(widths_of(self.groups, shape, self.steps)) / self.dense


def widths_of(groups: Groups, shape: ShapeOf, only: Mapping[str, Any] | None = None) -> dict[str, tuple[float, float]]:
    """Node -> shares of the elements that it reads and writes, of those it does where nothing is cut; ``REST``: of all
    that is written. shape: of every node once cut."""
    dense = _dense_shapes(groups)
    found, before, after = {}, 0, 0
    for node in groups.graph.nodes:
        if node.op != "call_function" or not _tensor(groups, node):
            continue
        full, left = math.prod(dense(node)), math.prod(shape(node))
        before, after = before + full, after + left
        if only is None or node.name in only:
            found[node.name] = (_read(groups, node, shape) / max(_read(groups, node, dense), 1), left / max(full, 1))
    share = after / max(before, 1)
    return {**found, REST: (share, share)}


def _read(groups: Groups, node: fx.Node, shape: ShapeOf) -> int:
    return sum(math.prod(shape(arg)) for arg in node.all_input_nodes
               if groups.graph.fqn(arg) is None and _tensor(groups, arg))


def _tensor(groups: Groups, node: fx.Node) -> bool:
    """Whether a node's value is one tensor."""
    dims = groups.graph.dims.get(node.name)
    return isinstance(dims, tuple) and all(hasattr(dim, "at") for dim in dims)


def _dense_shapes(groups: Groups) -> ShapeOf:
    return groups.graph.shapes(1 if groups.graph.free_batch else groups.graph.batch)


# ---- which widths meet ---------------------------------------------------------------------------------------------


def orthogonal(levels: int) -> list[list[int]]:
    """levels squared runs of levels + 1 columns, in each pair of which every pair of levels occurs once; the first run
    is all 0. levels: a prime number. Bush (1952)."""
    return [[a, *((b + a * k) % levels for k in range(levels))] for a in range(levels) for b in range(levels)]


def colours(groups: Groups) -> list[int]:
    """A column of the array for each family, such that families that meet in a tensor have different ones where few
    colours suffice (greedy, in the order of the graph)."""
    tensors: dict[str, set[int]] = {}
    for number, family in enumerate(groups):
        for member in family.members:
            tensors.setdefault(member.name, set()).add(number)
    near: dict[int, set[int]] = {number: set() for number in range(len(groups))}
    for together in tensors.values():
        for number in together:
            near[number] |= together - {number}
    found: list[int] = []
    for number in range(len(groups)):
        taken = {found[other] for other in near[number] if other < number}
        found.append(next(colour for colour in range(len(groups) + 1) if colour not in taken))
    return found
