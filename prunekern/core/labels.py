"""The tape on which operator rules record which channels live and die together.

Every element of an axis that could be pruned has an integer label. An activation carries *planes*: integer
tensors of its own shape, stride 0 along the axes where they do not vary; an element exists while the labels
of all its planes are kept. Rules only record edges between labels; groups are the connected components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from prunekern.core.graph import Graph, Shape

FIXED = 0
Plane = Tensor
Planes = tuple[Plane, ...]


def varying(plane: Plane) -> frozenset[int]:
    """The axes along which a plane changes."""
    return frozenset(a for a, (n, s) in enumerate(zip(plane.shape, plane.stride(), strict=True)) if n > 1 and s)


def compact(plane: Plane, keep: Iterable[int] = ()) -> Plane:
    """The plane with size 1 along every axis where it does not vary (but for those in ``keep``)."""
    live = varying(plane) | set(keep)
    for axis in range(plane.dim()):
        if axis not in live and plane.shape[axis] > 1:
            plane = plane.narrow(axis, 0, 1)
    return plane


def normalise(plane: Plane) -> Plane:
    """Give stride 0 to every axis along which the plane turns out to be constant."""
    shape, small = plane.shape, compact(plane)
    for axis in varying(small):
        first = small.narrow(axis, 0, 1)
        if bool((small == first).all()):
            small = first
    return small.expand(shape)


def spread(labels: Tensor, axis: int, shape: Shape) -> Plane:
    """A vector of labels along one axis, as a plane of the whole shape."""
    view = [1] * len(shape)
    view[axis] = -1
    return labels.view(view).expand(shape)


@dataclass(frozen=True)
class Frozen:
    """Channels that stay because of an operator, and why."""

    node: fx.Node
    reason: str
    labels: Tensor


class Tape:
    """What rules write to while a graph is walked in order. Not used after the walk."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.count = 1
        self.edges: list[Tensor] = []
        self.frozen: list[Frozen] = []
        self.joint: list[Tensor] = []
        self.balanced: list[Tensor] = []
        self.tables: dict[tuple[str, int], Tensor] = {}
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.produced: dict[tuple[str, int], None] = {}
        self.consumed: dict[tuple[str, int], None] = {}
        self.masked: dict[fx.Node, list[fx.Node]] = {}
        self.memory: dict[fx.Node, Any] = {}

    # ---- reading -------------------------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> Shape:
        return self.graph.shape(node)

    def value(self, arg: Any) -> Any:
        return self.graph.value(arg)

    def planes(self, node: Any) -> Planes:
        """The planes of a tensor argument (none for numbers, None and plain inputs)."""
        return self.memory.get(node, ()) if isinstance(node, fx.Node) else ()

    # ---- recording -----------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Tensor:
        labels = torch.arange(self.count, self.count + count)
        self.count += count
        return labels

    def unify(self, left: Tensor, right: Tensor) -> None:
        """The two labels at each position are one channel. Shapes broadcast."""
        if left is right:
            return
        left, right = torch.broadcast_tensors(left, right)
        fixed = [a for a in range(left.dim()) if a not in varying(left) | varying(right)]
        for axis in fixed:
            left, right = left.narrow(axis, 0, 1), right.narrow(axis, 0, 1)
        pairs = torch.stack((left.reshape(-1), right.reshape(-1)))
        self.edges.append(pairs[:, pairs[0] != pairs[1]])

    def freeze(self, node: fx.Node, labels: Tensor, reason: str = "") -> None:
        """These channels must stay. An empty reason means it is natural and not worth a report."""
        labels = compact(labels).reshape(-1).unique()
        self.unify(labels, torch.zeros_like(labels))
        if reason:
            self.frozen.append(Frozen(node, reason, labels))

    def freeze_planes(self, node: fx.Node, planes: Planes, reason: str = "") -> None:
        for plane in planes:
            self.freeze(node, plane, reason)

    def give(self, node: fx.Node, planes: Iterable[Plane]) -> None:
        """Set the planes of a node. Whole-tensor planes are frozen: a tensor cannot vanish."""
        self.memory[node] = self.settle(node, planes)

    def give_list(self, node: fx.Node, items: Iterable[Iterable[Plane]]) -> None:
        self.memory[node] = [self.settle(node, planes) for planes in items]

    def settle(self, node: fx.Node, planes: Iterable[Plane]) -> Planes:
        kept = []
        for raw in planes:
            plane = normalise(raw)
            live = varying(plane)
            if not live:
                self.freeze(node, plane)
                continue
            if len(live) > 1:
                self.joint.append(compact(plane).squeeze())
            kept.append(plane)
        return tuple(kept)

    # ---- what rules are made of ----------------------------------------------------------------------------

    def along(self, node: fx.Node, planes: Planes, axis: int) -> tuple[Tensor | None, Planes]:
        """The labels along one axis that is about to be mixed, and the planes that have nothing to do with it.

        A plane that also varies elsewhere is made uniform there (all pixels of a channel leave together).
        """
        hits = [p for p in planes if axis in varying(p)]
        rest = tuple(p for p in planes if axis not in varying(p))
        if not hits:
            return None, rest
        if len(hits) > 1:
            self.freeze_planes(node, tuple(hits), "two kinds of channels share the mixed axis")
            return None, rest
        plane = hits[0]
        vector = compact(plane, (axis,))
        for other in varying(plane) - {axis}:
            vector = vector.narrow(other, 0, 1)
        self.unify(plane, vector)
        return vector.reshape(-1), rest

    def consume(self, node: fx.Node, arg: fx.Node, axis: int) -> tuple[Tensor | None, Planes]:
        """Like ``along``, for a contraction: removed channels count as zeros at this input."""
        self.masked.setdefault(node, []).append(arg)
        return self.along(node, self.planes(arg), axis % len(self.shape(arg)))

    def axis(self, node: fx.Node, arg: Any, axis: int) -> Tensor | None:
        """The labels along one axis of a weight, its other axes being free to hold planes of their own."""
        if not isinstance(arg, fx.Node) or self.shape(arg)[axis] == 1:
            return None
        return self.along(node, self.planes(arg), axis)[0]

    def produce(self, node: fx.Node, arg: Any, axis: int) -> Tensor | None:
        """Like ``axis``, for the axis of a contraction's weight that issues channels."""
        self._note(self.produced, arg, axis)
        return self.axis(node, arg, axis)

    def read(self, node: fx.Node, arg: Any, axis: int) -> Tensor | None:
        """Like ``axis``, for the axis of a contraction's weight that reads channels."""
        self._note(self.consumed, arg, axis)
        return self.axis(node, arg, axis)

    def _note(self, where: dict[tuple[str, int], None], arg: Any, axis: int) -> None:
        name = self.graph.fqn(arg)
        if name is not None:
            where[name, axis] = None

    def tie(self, node: fx.Node, left: Tensor | None, right: Tensor | None) -> None:
        """Two axes that run together: unify them; an axis without labels always stays, and so does its partner."""
        if left is not None and right is not None:
            self.unify(left, right)
        elif left is not None or right is not None:
            self.freeze(node, left if left is not None else right)  # type: ignore[arg-type]

    def elementwise(self, node: fx.Node, operands: Sequence[Any], out: Shape | None = None) -> Planes:
        """Broadcasting elementwise combination: unify what runs together, never across a broadcast axis."""
        pairs = [(self.planes(arg), self.shape(arg)) for arg in operands if self.graph.is_tensor(arg)]
        return self.combine(node, pairs, self.shape(node) if out is None else out)

    def combine(self, node: fx.Node, operands: Iterable[tuple[Iterable[Plane], Shape]], out: Shape) -> Planes:
        """``elementwise`` on (planes, shape) pairs, for operators that first change the shape of their operands."""
        result: list[Plane] = []
        covered: frozenset[int] = frozenset()
        for planes, shape in operands:
            shift = len(out) - len(shape)
            full = frozenset(shift + a for a, size in enumerate(shape) if size > 1)
            result = self._merge(node, result, covered, [p.expand(out) for p in planes], full)
            covered |= full
        return tuple(result)

    def _merge(self, node: fx.Node, result: list[Plane], covered: frozenset[int],
               planes: list[Plane], full: frozenset[int]) -> list[Plane]:
        met: set[int] = set()
        extra: list[Plane] = []
        for plane in planes:
            partners = [i for i, other in enumerate(result) if varying(other) & varying(plane)]
            for i in partners:
                self.unify(result[i], plane)
            met.update(partners)
            if not partners:
                if varying(plane) & covered:   # the other operand always has these channels
                    self.freeze(node, plane)
                else:
                    extra.append(plane)
        for i, other in enumerate(result):
            if i not in met and varying(other) & full:
                self.freeze(node, other)
        return result + extra

    def execute(self, node: fx.Node, plane: Plane, source: fx.Node) -> Any:
        """Run the operator itself on a label plane put in the place of one tensor argument."""
        def swap(arg: fx.Node) -> Any:
            return plane if arg is source else self.value(arg)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), swap)
        return node.target(*args, **kwargs)  # type: ignore[operator]
