"""Where activations live and for how long: buffers by aliasing, peak memory and traffic by liveness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph, Shape, ShapeOf, owner
from prunekern.core.rule import argument, numel

PASSED_ON = ("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default",
             "aten.feature_alpha_dropout.default")
"""Operators that return their very argument outside training, which a trace does not show."""


@dataclass(frozen=True)
class Peak:
    """The moment of largest activation memory: its bytes, the operator that runs then, and what is live.

    live: (name of the operator or input that made the buffer, bytes), largest first.
    """

    bytes: int
    node: str
    module: str
    live: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Buffer:
    """One piece of activation memory: output ``index`` of ``maker``, an element size, and its last reader."""

    maker: fx.Node
    index: int
    itemsize: int
    first: int
    last: int

    def bytes(self, shape: ShapeOf) -> int:
        return self.itemsize * numel(shapes_of(shape(self.maker))[self.index])


@dataclass(frozen=True)
class Memory:
    """The activation buffers of a graph, and which of them every node reads from or points into.

    Views and in-place operators share the buffer of their input; parameters and other state are in none.
    The network's inputs count from the start to their last use, its outputs to the end.
    """

    buffers: tuple[Buffer, ...]
    of: Mapping[fx.Node, tuple[int | None, ...]]

    def peak(self, graph: Graph, shape: ShapeOf) -> Peak:
        """The largest sum of buffers live at once; an operator's inputs and outputs are while it runs."""
        if not self.buffers:
            return Peak(0, "", "", ())
        sizes = [buffer.bytes(shape) for buffer in self.buffers]
        change = [0] * (len(graph.nodes) + 1)
        for buffer, size in zip(self.buffers, sizes, strict=True):
            change[buffer.first] += size
            change[buffer.last + 1] -= size
        top = now = where = 0
        for position, step in enumerate(change[:-1]):
            now += step
            if now > top:
                top, where = now, position
        live = [(buffer.maker.name, size) for buffer, size in zip(self.buffers, sizes, strict=True)
                if buffer.first <= where <= buffer.last]
        node = graph.nodes[where]
        return Peak(top, node.name, owner(node)[0], tuple(sorted(live, key=lambda item: -item[1])))

    def traffic(self, node: fx.Node, shape: ShapeOf) -> tuple[int, int]:
        """Bytes of activations that a call reads and writes; a view does neither.

        A tensor that was expanded from a smaller one is read once, not once per copy.
        """
        mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        made = [index for index in self.of[node] if index is not None and self.buffers[index].maker is node]
        if not made and not mutates:
            return 0, 0
        written = sum(self.buffers[index].bytes(shape) for index in made) or self._seen(node, shape)
        return sum(self._seen(arg, shape) for arg in node.all_input_nodes), written

    def _seen(self, node: fx.Node, shape: ShapeOf) -> int:
        """Bytes of the tensors a node stands for, at most those of the buffers behind them."""
        indices = self.of.get(node, ())
        if not any(index is not None for index in indices):
            return 0
        return sum(min(self.buffers[index].itemsize * numel(size), self.buffers[index].bytes(shape))
                   for index, size in zip(indices, shapes_of(shape(node)), strict=True) if index is not None)


def shapes_of(shape: Any) -> list[Shape]:
    """The shapes of all tensors a node stands for: one for a tensor, several for a list of them."""
    if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape):
        return [shape]
    if isinstance(shape, (list, tuple)):
        return [leaf for item in shape for leaf in shapes_of(item)]
    return []


def tensors_of(node: fx.Node) -> list[Tensor]:
    """The (fake) tensors that a traced node stands for."""
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def memory(graph: Graph) -> Memory:
    """Find the activation buffers of a graph from the storages that its trace shares."""
    of: dict[fx.Node, tuple[int | None, ...]] = {}
    made: list[tuple[fx.Node, int, int]] = []
    for node in graph.nodes:
        if graph.fqn(node) is not None:
            of[node] = (None,) * len(tensors_of(node))
        elif node.op != "output" and tensors_of(node):
            of[node] = tuple(_place(node, of, made))
    ends = [0] * len(made)
    starts = {node: position for position, node in enumerate(graph.nodes)}
    for node, indices in of.items():
        readers = [starts[user] for user in node.users] or [starts[node]]
        for index in indices:
            if index is not None:
                ends[index] = max(ends[index], *readers)
    return Memory(tuple(Buffer(node, index, size, starts[node], end)
                        for (node, index, size), end in zip(made, ends, strict=True)), of)


def _place(node: fx.Node, of: Mapping[fx.Node, tuple[int | None, ...]],
           made: list[tuple[fx.Node, int, int]]) -> Iterator[int | None]:
    """For each tensor of a node the buffer it lies in (None for state): an argument's, else a new one."""
    known: dict[int, int | None] = {}
    for arg in node.all_input_nodes:
        known.update(zip(map(_storage, tensors_of(arg)), of.get(arg, ()), strict=False))
    passed_on = str(node.target) in PASSED_ON and not argument(node, 2, "train", False)
    for index, tensor in enumerate(tensors_of(node)):
        storage = _storage(node.args[0].meta["val"]) if passed_on else _storage(tensor)  # type: ignore[union-attr]
        if storage not in known:
            known[storage] = len(made)
            made.append((node, index, tensor.element_size()))
        yield known[storage]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak(graph: Graph, shape: ShapeOf | None = None) -> Peak:
    """Peak activation memory of one forward, without parameters and without operators' workspaces.

    shape: shapes of all nodes (default: the graph's own at the batch of its example).
    Source: live-variable analysis (Aho, Lam, Sethi, Ullman, "Compilers", section 9.2.5), in the order of the
    trace.
    """
    return memory(graph).peak(graph, shape or graph.shapes(graph.example_batch))
