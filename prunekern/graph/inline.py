"""``with torch.no_grad():`` or ``torch.autocast(..., enabled=False)`` inside a forward: torch.export makes such a
part a graph of its own; here it joins."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx


def inline_grad_modes(module: fx.GraphModule) -> fx.Graph:
    """The module's graph, in place, with every region of another gradient mode or without autocasting made part of it.

    Neither changes a value (a network is captured outside of autocasting), so the graph computes what it did.
    """
    graph = module.graph
    for node in list(graph.nodes):
        kind = getattr(node.target, "__name__", "")
        place = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(kind)
        if place is not None and not (kind == "wrap_with_autocast" and node.args[2]):
            _inline(graph, node, place, getattr(module, str(node.args[place].target)))
    return graph


def _inline(graph: fx.Graph, node: fx.Node, place: int, region: fx.GraphModule) -> None:
    """place: of the region among the node's arguments; its inputs come after it."""
    given: Iterator[Any] = iter(node.args[place + 1:])
    values: dict[fx.Node, fx.Node] = {}
    outputs: tuple[fx.Node, ...] = ()
    with graph.inserting_before(node):
        for inner in inline_grad_modes(region).nodes:
            if inner.op == "placeholder":
                values[inner] = next(given)
            elif inner.op == "output":
                outputs = fx.node.map_arg(inner.args[0], values.__getitem__)
            else:
                values[inner] = graph.node_copy(inner, values.__getitem__)
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise NotImplementedError(f"{user} reads a whole region of another mode")
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    handle = node.args[place]
    graph.erase_node(node)
    if isinstance(handle, fx.Node) and not handle.users:
        graph.erase_node(handle)
