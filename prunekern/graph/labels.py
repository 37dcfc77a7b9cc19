"""Walk a graph once, letting each operator's rule write labels; then group them into what leaves together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunekern.core.graph import Dim, Graph, owner, place, target_name
from prunekern.core.labels import FIXED, Frozen, Tape, compact, spread
from prunekern.core.policy import DEFAULT, Policy
from prunekern.core.rule import Registry
from prunekern.graph.heads import candidates, held, merged
from prunekern.graph.islands import Exchangeable

Live = tuple[tuple[int, Tensor], ...]
LISTED = 3        # operators of a kind that a report names one by one


@dataclass(frozen=True)
class Labels:
    """Which group every index of every axis belongs to. Group 0 always stays.

    axes:     (state name, axis) -> group of each index; [rows, n] where each row of axis 0 has its own.
    live:     node -> (axis, group of each index) for every axis with channels; a list for several tensors.
    produced: the parameter axes that contractions issue channels from ("out" axes), in order of the graph.
    consumed: the parameter axes that contractions read channels with ("in" axes).
    balanced: groups [rows, n]; after any choice every row keeps equally many.
    lookups:  constant tensor of integers -> groups of the channels that it picks from, by number.
    masked:   node -> the arguments at which removed channels count as zeros.
    frozen:   what stays because of an operator, and why.
    restricted: nodes that look at all channels at once and run on what remains of them -> what they do.
    counted: such nodes that count what is gone as zeros instead.
    policy:   which kinds of channels may leave.
    """

    graph: Graph
    groups: int
    axes: Mapping[tuple[str, int], Tensor]
    live: Mapping[fx.Node, Any]
    produced: tuple[tuple[str, int], ...]
    consumed: frozenset[tuple[str, int]]
    balanced: tuple[Tensor, ...]
    lookups: Mapping[str, Tensor]
    masked: Mapping[fx.Node, tuple[fx.Node, ...]]
    frozen: tuple[Frozen, ...]
    restricted: Mapping[fx.Node, str]
    counted: frozenset[fx.Node]
    policy: Policy

    def alive(self, node: fx.Node, axis: int, keep: Tensor) -> Tensor:
        """Boolean vector: which old indices of an activation's axis remain, for ``keep`` [groups] boolean."""
        rank = len(self.graph.dims[node.name])
        size = self.graph.shape(node)[axis]
        return _alive(self.live.get(node, ()), size, axis % rank, keep)

    def mask(self, node: fx.Node, keep: Tensor) -> Tensor | None:
        """Boolean tensor that broadcasts to an activation: which elements remain; None where all do."""
        mask: Tensor | None = None
        rank = len(self.graph.dims[node.name])
        for axis, groups in self.live.get(node, ()):
            vector = keep[groups]
            if not bool(vector.all()):
                spread_out = vector.view([-1 if a == axis else 1 for a in range(rank)])
                mask = spread_out if mask is None else mask & spread_out
        return mask

    def dims(self, node: fx.Node, keep: Tensor) -> Any:
        """The predicted shape of a node (Dims; a list of shapes for several tensors)."""
        old, live = self.graph.dims[node.name], self.live.get(node)
        if not live:
            return old
        if isinstance(old, list):
            return [_shrunk(shape, item, keep) for shape, item in zip(old, live, strict=True)]
        name = self.graph.fqn(node)
        if name is not None:
            return tuple(dim if (name, axis) not in self.axes else Dim(0, kept_count(self.axes[name, axis], keep))
                         for axis, dim in enumerate(old))
        return _shrunk(old, live, keep)


def kept_count(groups: Tensor, keep: Tensor) -> int:
    """How many indices of an axis remain; of a [rows, n] axis, how many each remaining row keeps."""
    alive = keep[groups]
    return int(alive.sum() if alive.dim() == 1 else alive.sum(1).max())


def _alive(live: Live, size: int, axis: int, keep: Tensor) -> Tensor:
    alive = torch.ones(size, dtype=torch.bool)
    for a, groups in live:
        if a == axis:
            alive = alive & keep[groups]
    return alive


def _shrunk(old: tuple[Dim, ...], live: Live, keep: Tensor) -> tuple[Dim, ...]:
    new = list(old)
    for axis in {axis for axis, _ in live}:
        size = next(len(groups) for a, groups in live if a == axis)
        count = int(_alive(live, size, axis, keep).sum())
        if not old[axis].scale:
            new[axis] = Dim(0, count)
        elif not old[axis].offset:                 # a batch of heads, in one axis
            new[axis] = Dim(old[axis].scale * count // size, 0)
    return tuple(new)


def label(graph: Graph, registry: Registry, *, policy: Policy = DEFAULT, tape: Tape | None = None) -> Labels:
    """Label every channel of a graph. An operator without a rule freezes what reaches it and is named.

    policy: which kinds of channels may leave. tape: one of the graph (with the policy) to write on, for callers that
    want to look at it afterwards.
    """
    tape = tape or Tape(graph, policy, Exchangeable(graph, registry))
    _walk(tape, registry)
    sites, first, alike, count = candidates(tape), dict(tape.axes), tape.alike, tape.count
    if tape.ambiguous and not sites:
        tape.restart()
        _walk(tape, registry)
    while sites:
        tape.restart()
        _walk(tape, registry, merged(first, sites, alike, count))
        labels = _finish(tape)
        stuck = [site for site in held(sites, first, labels.axes, labels.balanced, count)
                 if tape.policy.attention_of(owner(site.node)[0]) == "auto"]
        if not stuck:
            return labels
        sites = [site for site in sites if all(site is not other for other in stuck)]
        if not sites:
            tape.restart()
            _walk(tape, registry)
    return _finish(tape)


def _walk(tape: Tape, registry: Registry,
          heads: Mapping[tuple[str, int], Tensor] = MappingProxyType({})) -> None:
    unread = unread_parameters(tape.graph)
    for node in tape.graph.nodes:
        if node.op == "placeholder":
            _state(tape, node, heads)
            if tape.graph.fqn(node) in unread:
                tape.freeze_planes(node, tape.planes(node))
        elif node.op == "output":
            for leaf in pytree.tree_leaves(list(node.args)):
                if not tape.policy.outputs and isinstance(leaf, fx.Node):
                    tape.freeze_planes(leaf, tape.planes(leaf), "")
        else:
            _step(tape, node, registry)


def _state(tape: Tape, node: fx.Node, heads: Mapping[tuple[str, int], Tensor]) -> None:
    """A parameter or buffer: fresh labels along each axis longer than one, once per tensor.

    heads: axes on which several channels are one, with the index of the first of each.
    """
    name = tape.graph.fqn(node)
    if name is None or not tape.graph.is_tensor(node):
        return
    shape = tape.shape(node)
    planes = []
    for axis, size in enumerate(shape):
        if size > 1:
            if (name, axis) not in tape.axes:
                labels = tape.fresh(size)
                tape.axes[name, axis] = labels[heads[name, axis]] if (name, axis) in heads else labels
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
    while _bend(tape, group) or _tie_rows(tape, group):
        group, count = _components(tape)
    balanced = [*tape.balanced, *(table for pair in tape.facing if not _in_rows(pair, group) for table in pair)]
    axes = {key: group[tape.tables.get(key, labels)] for key, labels in tape.axes.items()}
    return Labels(
        graph=tape.graph, groups=count, axes=axes,
        live={node: _live_of(item, group) for node, item in tape.memory.items() if item},
        produced=tuple(tape.produced), consumed=frozenset(tape.consumed),
        balanced=tuple(group[table] for table in balanced),
        lookups={name: group[labels] for name, labels in tape.lookups.items()},
        masked={node: tuple(args) for node, args in tape.masked.items()}, frozen=tuple(tape.frozen),
        restricted=dict(tape.restricted), counted=frozenset(tape.counted), policy=tape.policy)


def _bend(tape: Tape, group: Tensor) -> bool:
    """Make the first joint table rectangular that is not; False where all are."""
    for table in tape.joint:
        if _free_axis(group[table]) is None:
            # Keep the same positions in every row: the last axis is free, all others run together.
            first = table.reshape(-1, table.shape[-1])[:1].view((1,) * (table.dim() - 1) + (-1,))
            tape.unify(table, first.expand_as(table))
            return True
    return False


def _tie_rows(tape: Tape, group: Tensor) -> bool:
    """Groups of a convolution whose channels are held together on both sides (by group norms, say) leave as a whole:
    a row of the one side with that of the other. False where there are no more of them."""
    found = False
    for pair in tape.facing:
        left, right = (table[:, :1] for table in pair)
        if _in_rows(pair, group) and bool((group[left] != group[right]).any()):
            tape.unify(left, right)
            found = True
    return found


def _in_rows(pair: tuple[Tensor, Tensor], group: Tensor) -> bool:
    return all(bool((group[table] == group[table[:, :1]]).all()) for table in pair)


def _live_of(item: Any, group: Tensor) -> Any:
    """Planes (or a list of them) as (axis, group of each index) pairs; axes whose every index stays are left out."""
    if isinstance(item, list):
        return [_live_of(planes, group) for planes in item]
    found = []
    for plane in item:
        groups = group[compact(plane)]
        if bool((groups == groups.reshape(-1)[0]).all()):
            continue                                  # one group is all there is of an axis: it cannot leave
        axis = _free_axis(groups)
        if axis is None:
            raise AssertionError("a plane is left without a rectangular choice")
        vector = groups.transpose(0, axis).reshape(groups.shape[axis], -1)[:, 0]
        if bool((vector != FIXED).any()):
            # A joint plane of atomic rows has one group along its other axes, which then never shrink.
            found.append((axis, vector))
    return tuple(found)


def _free_axis(groups: Tensor) -> int | None:
    """The axis along which alone the groups of a table vary, so that any choice leaves a rectangle."""
    for axis in range(groups.dim()):
        vector = groups
        for other in range(groups.dim()):
            if other != axis:
                vector = vector.narrow(other, 0, 1)
        if bool((groups == vector).all()):
            return axis
    return None


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


def unread_parameters(graph: Graph) -> list[str]:
    """Parameters that the forward does not use on the example inputs (auxiliary heads, say): nothing is known
    about what they run with, so they stay as they are."""
    read = {graph.fqn(arg) for node in graph.nodes for arg in node.all_input_nodes}
    return [name for name, tensor in graph.tensors.items() if isinstance(tensor, nn.Parameter) and name not in read]


def frozen_report(labels: Labels) -> list[str]:
    """What holds channels back: where and why, operators of a kind together where they are many (``prunekern doctor``
    lists each); what is inexact, as asked; and what the forward never reads."""
    held: dict[tuple[str, str], dict[str, None]] = {}
    for item in labels.frozen:
        held.setdefault((target_name(item.node), item.reason), {})[place(item.node)] = None
    lines = [line for (_, reason), places in held.items()
             for line in _together(list(places), reason + "; {} channels stay as they are")]
    lines += _together([place(node) for node in labels.restricted],
                       "inexact, as asked: this runs on the channels that remain, not on all")
    unread = dict.fromkeys(name.rpartition(".")[0] or name for name in unread_parameters(labels.graph))
    return [*lines, *([f"{', '.join(map(repr, unread))}: the forward does not read these parameters on the example "
                       "inputs; they stay as they are, also where they belong to layers that shrink"]
                      if unread else [])]


def _together(places: list[str], said: str) -> list[str]:
    if len(places) <= LISTED:
        return [f"{where}: {said.format('its')}" for where in places]
    return [f"{places[0]} and {len(places) - 1} more like it: {said.format('their')}"]
