"""Walk a graph once, letting each operator's rule write labels; then group them into what leaves together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph, place
from prunekern.core.labels import FIXED, Frozen, Planes, Tape, spread, varying
from prunekern.core.rule import Registry


@dataclass(frozen=True)
class Labels:
    """Which channel every position of every tensor belongs to. ``group[label]`` is its group; group 0 stays.

    axes:     (state name, axis) -> label of each index; only axes longer than one.
    tables:   (state name, axis) -> labels [rows, n] for an axis of which each row of axis 0 has its own.
    balanced: groups [rows, n]; after any choice every row keeps equally many.
    masked:   node -> the arguments at which removed channels count as zeros.
    frozen:   what stays because of an operator, and why.
    """

    graph: Graph
    group: Tensor
    groups: int
    axes: Mapping[tuple[str, int], Tensor]
    tables: Mapping[tuple[str, int], Tensor]
    balanced: tuple[Tensor, ...]
    planes: Mapping[fx.Node, Any]
    masked: Mapping[fx.Node, tuple[fx.Node, ...]]
    frozen: tuple[Frozen, ...]

    def axis_groups(self, name: str, axis: int) -> Tensor:
        """Group of each index of a parameter's axis; [rows, n] where rows differ."""
        table = self.tables.get((name, axis))
        return self.group[self.axes[name, axis] if table is None else table]

    def alive(self, node: fx.Node, axis: int, keep: Tensor) -> Tensor:
        """Boolean vector: which old indices of an activation's axis remain, for ``keep`` [groups] boolean."""
        return self._alive(self.planes.get(node, ()), self.graph.shape(node)[axis], axis, keep)

    def _alive(self, planes: Planes, size: int, axis: int, keep: Tensor) -> Tensor:
        alive = torch.ones(size, dtype=torch.bool)
        for plane in planes:
            if axis in varying(plane):
                rows = keep[self.group[plane]] if len(varying(plane)) > 1 else None
                if rows is None:
                    vector = plane.transpose(0, axis).reshape(size, -1)[:, 0]
                    alive &= keep[self.group[vector]]
                else:
                    alive &= rows.transpose(0, axis).reshape(size, -1).any(1)
        return alive

    def mask(self, node: fx.Node, keep: Tensor) -> Tensor | None:
        """Boolean tensor that broadcasts to an activation: which elements remain; None where all do."""
        mask: Tensor | None = None
        for plane in self.planes.get(node, ()):
            live = varying(plane)
            for axis in range(plane.dim()):
                if axis not in live:
                    plane = plane.narrow(axis, 0, 1)
            alive = keep[self.group[plane]]
            if not bool(alive.all()):
                mask = alive if mask is None else mask & alive
        return mask


def label(graph: Graph, registry: Registry, *, keep_outputs: bool = True) -> Labels:
    """Label every channel of a graph. An operator without a rule freezes what reaches it and is named."""
    tape = Tape(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            _state(tape, node)
        elif node.op == "output":
            for leaf in pytree.tree_leaves(list(node.args)):
                if keep_outputs and isinstance(leaf, fx.Node):
                    tape.freeze_planes(leaf, tape.planes(leaf), "")
        else:
            _step(tape, node, registry)
    return _finish(tape)


def _state(tape: Tape, node: fx.Node) -> None:
    """A parameter or buffer: fresh labels along each axis longer than one, once per tensor."""
    name = tape.graph.fqn(node)
    if name is None or not tape.graph.is_tensor(node):
        return
    shape = tape.shape(node)
    planes = []
    for axis, size in enumerate(shape):
        if size > 1:
            if (name, axis) not in tape.axes:
                tape.axes[name, axis] = tape.fresh(size)
            planes.append(spread(tape.axes[name, axis], axis, shape))
    tape.memory[node] = tuple(planes)


def _step(tape: Tape, node: fx.Node, registry: Registry) -> None:
    rule = registry.find(node.target)
    if rule is not None:
        try:
            rule.label(node, tape)
            return
        except (RuntimeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
            reason = f"its rule cannot handle this call ({type(error).__name__}: {error})"
    elif tape.graph.dims.get(node.name) is None or not _has_tensor(tape, node):
        return                                        # sizes, guards: no channels
    else:
        reason = "no rule for this operator"
    for arg in node.all_input_nodes:
        planes = tape.memory.get(arg, ())
        for item in planes if isinstance(planes, list) else [planes]:
            tape.freeze_planes(node, item, reason)


def _has_tensor(tape: Tape, node: fx.Node) -> bool:
    return any(tape.memory.get(arg) for arg in node.all_input_nodes)


def _finish(tape: Tape) -> Labels:
    group, count = _components(tape)
    for table in tape.joint:
        if not _rectangular(group[table]):
            # Keep the same positions in every row: the last axis is free, all others run together.
            first = table.reshape(-1, table.shape[-1])[:1].view((1,) * (table.dim() - 1) + (-1,))
            tape.unify(table, first.expand_as(table))
            group, count = _components(tape)
    return Labels(
        graph=tape.graph, group=group, groups=count, axes=dict(tape.axes), tables=dict(tape.tables),
        balanced=tuple(group[table] for table in tape.balanced), planes=dict(tape.memory),
        masked={node: tuple(args) for node, args in tape.masked.items()}, frozen=tuple(tape.frozen))


def _rectangular(groups: Tensor) -> bool:
    """Whether the groups of a table vary along one axis only, so that any choice leaves a rectangle."""
    for axis in range(groups.dim()):
        vector = groups
        for other in range(groups.dim()):
            if other != axis:
                vector = vector.narrow(other, 0, 1)
        if bool((groups == vector).all()):
            return True
    return False


def _components(tape: Tape) -> tuple[Tensor, int]:
    """Connected components of the recorded edges; the component of FIXED is number 0."""
    if tape.edges:
        pairs = torch.cat([edges.reshape(2, -1) for edges in tape.edges], dim=1).numpy()
        tape.edges = [torch.from_numpy(pairs)]
    else:
        pairs = np.zeros((2, 0), dtype=np.int64)
    ones = np.ones(pairs.shape[1], dtype=np.int8)
    count, component = connected_components(
        coo_matrix((ones, (pairs[0], pairs[1])), shape=(tape.count, tape.count)), directed=False)
    swap = component[FIXED]
    component = np.where(component == swap, 0, np.where(component == 0, swap, component))
    return torch.from_numpy(component.astype(np.int64)), int(count)


def frozen_report(labels: Labels) -> list[str]:
    """One line per operator that holds channels back: where and why."""
    lines = dict.fromkeys(f"{place(item.node)}: {item.reason}; its channels stay as they are" for item in labels.frozen)
    return list(lines)
