"""``with torch.no_grad():`` inside a forward: torch.export makes such a part a graph of its own; here it joins."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx


def inline_grad_modes(module: fx.GraphModule) -> fx.Graph:
    """The module's graph, in place, with every region of another gradient mode made part of it.

    Gradient modes change no value, so the graph computes what it did.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled":
            _inline(graph, node, getattr(module, str(node.args[1].target)))
    return graph


def _inline(graph: fx.Graph, node: fx.Node, region: fx.GraphModule) -> None:
    given: Iterator[Any] = iter(node.args[2:])
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
            raise NotImplementedError(f"{user} reads a whole region of another gradient mode")
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    handle = node.args[1]
    graph.erase_node(node)
    if isinstance(handle, fx.Node) and not handle.users:
        graph.erase_node(handle)
