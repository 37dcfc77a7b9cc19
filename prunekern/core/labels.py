"""The tape on which operator rules record which channels live and die together.

Every element of an axis that could be pruned has an integer label. An activation carries *planes*: integer
tensors of its own shape, stride 0 along the axes where they do not vary; an element exists while the labels
of all its planes are kept. Rules only record edges between labels; groups are the connected components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from prunekern.core.counted import COUNTED
from prunekern.core.graph import Graph, Shape
from prunekern.core.policy import DEFAULT, Policy

FIXED = 0
Plane = Tensor
Planes = tuple[Plane, ...]
Operand = tuple[Iterable[Plane], str, Shape]     # planes, a letter for each axis, sizes


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


@dataclass(frozen=True)
class Site:
    """A product of two activations at which channels could leave by rows (heads) or by columns (widths).

    table: labels [rows, columns], the rows being an axis that both activations have and the result keeps.
    """

    node: fx.Node
    table: Tensor


class Tape:
    """What rules write to while a graph is walked in order. Not used after the walk."""

    def __init__(self, graph: Graph, policy: Policy = DEFAULT,
                 exchangeable: Callable[[fx.Node], bool] = lambda node: False) -> None:
        """exchangeable: whether the module of a norm can be exchanged for one that counts what is gone."""
        self.graph, self.policy, self.exchangeable = graph, policy, exchangeable
        self.restart(scouting=True)

    def restart(self, scouting: bool = False) -> None:
        """Forget everything, for another walk."""
        self.scouting, self.ambiguous = scouting, False
        self.count = 1
        self.edges: list[Tensor] = []
        self.alike: list[Tensor] = []
        self.frozen: list[Frozen] = []
        self.joint: list[Tensor] = []
        self.balanced: list[Tensor] = []
        self.facing: list[tuple[Tensor, Tensor]] = []       # balanced, too, unless the rows can leave in pairs
        self.tables: dict[tuple[str, int], Tensor] = {}
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.produced: dict[tuple[str, int], None] = {}
        self.consumed: dict[tuple[str, int], None] = {}
        self.masked: dict[fx.Node, list[fx.Node]] = {}
        self.lookups: dict[str, Tensor] = {}
        self.restricted: dict[fx.Node, str] = {}
        self.counted: dict[fx.Node, None] = {}
        self.sites: list[Site] = []
        self.made: list[tuple[int, int]] = []
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

    def free(self, count: int) -> Tensor:
        """Labels of positions that an operator makes: they belong to nobody and leave with what they meet."""
        labels = self.fresh(count)
        self.made.append((int(labels[0]), self.count))
        return labels

    def is_free(self, plane: Plane) -> bool:
        label = int(compact(plane).reshape(-1)[0])
        return any(first <= label < end for first, end in self.made)

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
        for plane in self._without_copies(node, [normalise(raw) for raw in planes if raw.numel()]):
            live = varying(plane)
            if not live:
                self.freeze(node, plane)
                continue
            if len(live) > 1:
                self.joint.append(compact(plane).squeeze())
            kept.append(plane)
        return tuple(kept)

    def _without_copies(self, node: fx.Node, planes: list[Plane]) -> list[Plane]:
        """Copies that an ``expand`` made of channels (key heads for groups of query heads) stay: the channels
        that they are copies of may go."""
        own = [plane for plane in planes if not (varying(plane) and self.is_free(plane))]
        copies = [plane for plane in planes if all(plane is not other for other in own)]
        for plane in copies:
            if any(varying(plane) & varying(other) for other in own):
                self.freeze(node, plane)
            else:
                own.append(plane)
        return own

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
        vector = self._uniform(hits[0], varying(hits[0]) - {axis})
        return compact(vector, (axis,)).reshape(-1), rest

    def across(self, node: fx.Node, planes: Planes, axes: Iterable[int], reason: str, *, inexact: bool = False,
               counts: bool = False) -> list[Plane]:
        """The planes that pass an operator which looks at all positions of its first argument's axes at once.

        What varies along these axes alone stays; what varies elsewhere, too, leaves as whole rows. Where the policy
        takes it, the former passes, too: if the operator can count what is gone as zeros (counts), or if it means
        something on fewer positions (inexact).
        """
        looked = frozenset(axes)
        passing = []
        for plane in planes:
            live = varying(plane)
            if live & looked and not live <= looked:
                plane = self._uniform(plane, live & looked)
            elif live and live <= looked:
                if counts and self._counts(node, looked):
                    if node not in self.counted:
                        self.counted[node] = None
                        self.masked.setdefault(node, []).append(node.args[0])  # type: ignore[arg-type]
                elif inexact and self.policy.norms == "remaining":
                    self.restricted[node] = reason
                else:
                    self.freeze(node, plane, reason)
                    continue
            passing.append(plane)
        return passing

    def _counts(self, node: fx.Node, looked: frozenset[int]) -> bool:
        """Whether the policy has this operator count, and there is a number to count to."""
        x: Any = node.args[0]
        how, dims = self.policy.norms, self.graph.dims[x.name]
        if how == "fixed" or any(dims[axis].scale or dims[axis].measured for axis in looked):
            return False
        return how == "counted" or node.target in COUNTED or (how == "auto" and self.exchangeable(node))

    def contract(self, node: fx.Node, operands: Sequence[Operand], out: str) -> Planes:
        """Multiply tensors, then sum: an einsum. Gives the planes of the output, whose axes are the letters ``out``.

        The product is elementwise in the space of all letters, so that what meets there runs together; the letters
        that ``out`` lacks are then summed over. A plane along an axis that operands share (heads) and along another
        one (widths) gives up the shared one here: the same widths are kept in every head.
        """
        letters = out + "".join(dict.fromkeys(x for _, term, _ in operands for x in term if x not in out))
        shared = {x for x in out if sum(x in term for _, term, _ in operands) > 1}
        pairs: list[tuple[list[Plane], Shape]] = []
        full = [1] * len(letters)
        for planes, term, sizes in operands:
            order = [term.index(x) for x in letters if x in term]
            where = tuple(slice(None) if x in term else None for x in letters)
            shape = tuple(sizes[term.index(x)] if x in term else 1 for x in letters)
            full = [max(pair) for pair in zip(full, shape, strict=True)]
            pairs.append(([self._columns(node, plane, term, shared).permute(order)[where] for plane in planes], shape))
        summed = frozenset(range(len(out), len(letters)))
        passing = []
        for plane in self.combine(node, pairs, tuple(full)):
            if varying(plane) & summed:
                self._uniform(plane, varying(plane) - summed)
            else:
                for _ in summed:
                    plane = plane.select(-1, 0)
                passing.append(plane)
        return tuple(passing)

    def _columns(self, node: fx.Node, plane: Plane, term: str, shared: set[str]) -> Plane:
        live = varying(plane)
        rows = [axis for axis in live if term[axis] in shared]
        if not rows or len(rows) == len(live):
            return plane
        self._site(node, plane, rows, sorted(live - set(rows)))
        return self._uniform(plane, set(rows))

    def _site(self, node: fx.Node, plane: Plane, rows: list[int], columns: list[int]) -> None:
        others = (a for a in range(plane.dim()) if a not in rows and a not in columns)
        small = compact(plane).permute(*rows, *columns, *others)
        self.sites.append(Site(node, small.reshape(-1, int(np.prod([plane.shape[a] for a in columns])))))

    def _uniform(self, plane: Plane, axes: Iterable[int]) -> Plane:
        """The plane with all its positions along some axes running together."""
        row = plane
        for axis in axes:
            row = row.narrow(axis, 0, 1)
        self.unify(plane, row)
        return row.expand(plane.shape)

    def consume(self, node: fx.Node, arg: fx.Node, axis: int) -> tuple[Tensor | None, Planes]:
        """Like ``along``, for a contraction: removed channels count as zeros at this input."""
        self.masked.setdefault(node, []).append(arg)
        axis %= len(self.shape(arg))
        for plane in self.planes(arg):
            rows = sorted(varying(plane) - {axis})
            if axis in varying(plane) and rows and rows[-1] < axis:       # a layer that all heads share
                self._site(node, plane, rows, [axis])
        return self.along(node, self.planes(arg), axis)

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

    def lookup(self, node: fx.Node, name: str, labels: Tensor) -> None:
        """A constant tensor of integers names positions among these channels; it is renumbered when they go."""
        known = self.lookups.setdefault(name, labels)
        if known.shape == labels.shape:
            self.unify(known, labels)
        else:
            for vector in (known, labels):
                self.freeze(node, vector, "one index picks among different numbers of channels")

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
        result, planes = ([self._apart(node, plane, others) for plane in own]
                          for own, others in ((result, planes), (planes, result)))
        met: set[int] = set()
        extra: list[Plane] = []
        for plane in planes:
            partners = [i for i, other in enumerate(result) if varying(other) & varying(plane)]
            for i in partners:
                result[i] = self._together(result[i], plane)
            met.update(partners)
            if not partners:
                extra += self._beside(node, plane, covered)
        kept = [[other] if i in met else self._beside(node, other, full) for i, other in enumerate(result)]
        return [plane for planes in kept for plane in planes] + extra

    def _apart(self, node: fx.Node, plane: Plane, others: Sequence[Plane]) -> Plane:
        """A plane along two axes that meets one operand's planes along each (heads and widths of a parameter) keeps
        the same widths in every head: together they would make all its channels one."""
        axes = [varying(other) for other in others if varying(other) < varying(plane)]
        if len(axes) < 2 or any(a & b for i, a in enumerate(axes) for b in axes[:i]):
            return plane
        columns = max(axes, key=max)
        names = "abcdefghijklmnopqrstuvwxyz"[:plane.dim()]
        return self._columns(node, plane, names, {names[axis] for axis in varying(plane) - columns})

    def _together(self, left: Plane, right: Plane) -> Plane:
        """The plane of two that run together: that which varies less, as the other is now uniform where it does not.

        Scouts keep the other one: the first walk is there to see where heads could leave, and what is of one head.
        """
        recorded = len(self.edges)
        self.unify(left, right)
        a, b = varying(left), varying(right)
        if not (a < b or b < a):
            if len(a) > 1:
                self.alike += self.edges[recorded:]
            return left
        self.ambiguous = True
        return (left if a > b else right) if self.scouting else (left if a < b else right)

    def _beside(self, node: fx.Node, plane: Plane, always: frozenset[int]) -> list[Plane]:
        """What is left of a plane next to an operand that always has all positions along some axes."""
        hit = varying(plane) & always
        if not hit:
            return [plane]
        if hit == varying(plane):
            self.freeze(node, plane)
            return []
        return [self._uniform(plane, hit)]

    def execute(self, node: fx.Node, plane: Plane, source: fx.Node) -> Any:
        """Run the operator itself on a label plane put in the place of one tensor argument."""
        def swap(arg: fx.Node) -> Any:
            return plane if arg is source else self.value(arg)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), swap)
        return node.target(*args, **kwargs)  # type: ignore[operator]
