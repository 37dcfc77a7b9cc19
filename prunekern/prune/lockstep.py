"""Two networks walked side by side, all calibration batches at a time, each value freed after its last use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from prunekern.core.graph import mutates, pure


class Walker:
    """Runs the nodes of a graph in any order that respects its edges; every node has one value per batch.

    inputs: placeholder name -> its value in each batch. state: placeholder name -> the tensor it stands for.
    ``keep`` holds on to a value until it is dropped. In-place operators run out of place, since values are looked at
    later: what they would have written through a view is lost (``outputs`` shows it).
    """

    def __init__(self, graph: fx.Graph, inputs: Mapping[str, Sequence[Any]], state: Mapping[str, Tensor]) -> None:
        self.nodes = tuple(graph.nodes)
        self.batches = len(next(iter(inputs.values())))
        self._module: Any = graph.owning_module
        self._inputs, self._state = inputs, state
        self._values: dict[fx.Node, list[Any]] = {}
        self._left = {node: len(node.users) for node in self.nodes}
        self._held: dict[fx.Node, int] = {}
        self._next = 0

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._values

    def __getitem__(self, node: fx.Node) -> list[Any]:
        return self._values[node]

    def keep(self, node: fx.Node) -> None:
        self._held[node] = self._held.get(node, 0) + 1

    def drop(self, node: fx.Node) -> None:
        self._held[node] -= 1
        self._free(node)

    def reach(self, node: fx.Node) -> list[Any]:
        """The node's values, everything before it in the graph's order being run if it was not yet."""
        while node not in self._values:
            self.run(self.nodes[self._next])
            self._next += 1
        return self._values[node]

    def outputs(self) -> list[list[Any]]:
        """What the network gives, flat, for every batch; nothing must have been run yet."""
        *nodes, last = self.nodes
        for arg in last.all_input_nodes:
            self.keep(arg)
        for node in nodes:
            self.run(node)
        found = [[self[leaf][batch] if isinstance(leaf, fx.Node) else leaf for leaf in last.args[0]]
                 for batch in range(self.batches)]
        self.run(last)
        for arg in last.all_input_nodes:
            self.drop(arg)
        return found

    def run(self, node: fx.Node) -> None:
        if node.op != "output":
            self._values[node] = [self._value(node, batch) for batch in range(self.batches)]
            self._free(node)
        for arg in node.all_input_nodes:
            self._left[arg] -= 1
            self._free(arg)

    def _free(self, node: fx.Node) -> None:
        if self._left[node] <= 0 and not self._held.get(node):
            self._values.pop(node, None)

    def _value(self, node: fx.Node, batch: int) -> Any:
        if node.op == "placeholder":
            return self._inputs[node.name][batch] if node.name in self._inputs else self._state[node.name]
        if node.op == "get_attr":
            found: Any = self._module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        mapped: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: self._values[arg][batch])
        if node.op == "call_module":
            return self._module.get_submodule(node.target)(*mapped[0], **mapped[1])
        target: Any = pure(node.target)
        args = mapped[0]
        if mutates(target) and args and isinstance(args[0], Tensor):      # it has no other form
            args = (args[0].clone(), *args[1:])             # values of others are never written
        return target(*args, **mapped[1])


def ordered(nodes: Sequence[fx.Node], wanted: Mapping[fx.Node, Sequence[fx.Node]]) -> list[fx.Node]:
    """The nodes in an order in which each comes after its arguments and, where that is possible, after what it wants.

    What a node wants comes first unless it needs the node itself, or one that is being placed for its sake.
    """
    rank = {node: i for i, node in enumerate(nodes)}
    order: dict[fx.Node, None] = {}

    def missing(node: fx.Node) -> set[fx.Node]:
        found, stack = set[fx.Node](), [node]
        while stack:
            current = stack.pop()
            if current not in order and current not in found:
                found.add(current)
                stack += current.all_input_nodes
        return found

    def place(node: fx.Node, busy: frozenset[fx.Node]) -> None:
        for current in sorted(missing(node), key=rank.__getitem__):
            mine = busy | {current}
            for other in wanted.get(current, ()):
                if mine.isdisjoint(missing(other)):
                    place(other, mine)
            order.setdefault(current)
    for node in nodes:
        place(node, frozenset())
    return list(order)
