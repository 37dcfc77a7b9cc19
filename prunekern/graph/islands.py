"""Modules that can be exchanged for others without touching the forward of any module around them.

A norm across channels from which some have left has to count them on (``core/counted.py``). Where one module does
nothing else, another takes its place, and the network stays the user's class.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from prunekern.core.counted import CLASSES
from prunekern.core.graph import Graph, owner
from prunekern.core.rule import Registry, aten
from prunekern.graph.parts import Parts

CASTS = frozenset(aten("to"))


@dataclass(frozen=True)
class Island:
    """One call of a module with all its own tensors: one tensor comes in, one goes out, the rest is the module's own.

    nodes: what its forward does, in order. given: the tensor that comes in; result: which of the nodes goes out.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    given: fx.Node
    result: fx.Node


class Exchangeable:
    """Says of a node whether the module that it belongs to can be exchanged."""

    def __init__(self, graph: Graph, registry: Registry) -> None:
        self.graph, self.registry = graph, registry
        self._islands: dict[str, Island | None] = {}
        self._owners = [(owner(node)[0], node) for node in graph.nodes if node.op == "call_function"]

    def __call__(self, node: fx.Node) -> bool:
        """A module whose class is not kept anyway counts as exchangeable."""
        if isinstance(self.graph.module, (Parts, fx.GraphModule)):
            return True
        path = owner(node)[0]
        module = self.module(path)
        return module is not None and (counted_class(module) or self.island(path)) is not None

    def _inside(self, path: str) -> list[fx.Node]:
        """What the module at a path and its children do, in order."""
        return [node for at, node in self._owners if at == path or at.startswith(path + ".")]

    def module(self, path: str) -> nn.Module | None:
        """The module at a path, but for the whole network."""
        try:
            return self.graph.module.get_submodule(path) if self.graph.module is not None and path else None
        except AttributeError:
            return None

    def island(self, path: str) -> Island | None:
        """The module at a path as an island; None where it is none, or where it contracts anything."""
        if path not in self._islands:
            self._islands[path] = self._found(path)
        return self._islands[path]

    def _found(self, path: str) -> Island | None:
        module = self.module(path)
        if module is None or any(True for child in module.children() for _ in child.parameters()):
            return None
        nodes = self._inside(path)
        inside, graph = set(nodes), self.graph
        outside = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside)
        state = [name for name in map(graph.fqn, outside) if name is not None]
        given = [node for node in outside if graph.fqn(node) is None]
        results = [node for node in nodes if any(user not in inside for user in node.users)
                   and not (given and _same(node, given[0]))]
        if len(given) != 1 or len(results) != 1 or not (graph.is_tensor(given[0]) and graph.is_tensor(results[0])):
            return None
        if any(name in graph.constants or name.rpartition(".")[0] != path for name in state) or any(
                (rule := self.registry.find(node.target)) is None or rule.macs(node, graph.shapes()) for node in nodes):
            return None
        return Island(path, tuple(nodes), given[0], results[0])


def _same(node: fx.Node, given: fx.Node) -> bool:
    """Whether a node is its module's input as it was: ``x.to(torch.float32)`` gives x itself where it is that, and what
    reads x later then reads the node in a graph."""
    return node.target in CASTS and node.args[0] is given and node.meta["val"].dtype == given.meta["val"].dtype


def counted_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that counts, for a module that is one of torch's norms with torch's own forward; else None."""
    forward = type(module).forward
    return next((counted for plain, counted in CLASSES if forward in (plain.forward, counted.forward)), None)
