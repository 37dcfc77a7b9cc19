"""Zeros that a recurrent layer begins with: traced with the dtype and device of the example, made to follow the layer.

A network is proven in fp64 and may be moved; torch promotes dtypes in arithmetic, but not in recurrent layers.
For packed sequences there are as many of them as the first time step has sequences, which is a value, not a size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode

from prunekern.core.rule import aten

ops = torch.ops.aten
CREATED = {ops.zeros.default: ops.new_zeros.default, ops.ones.default: ops.new_ones.default,
           ops.full.default: ops.new_full.default}
SAME = frozenset(aten("to", "_to_copy", "clone", "contiguous"))     # of a creation: values as they were
SHAPED = frozenset(aten("expand", "index_select"))
RECURRENT = {kind: place for place, kinds in ((1, ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input",
                                                   "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")),
                                              (2, ("lstm.data", "gru.data", "rnn_tanh.data", "rnn_relu.data")))
             for kind in aten(*kinds)}
"""Recurrent operator -> place of its states among the arguments; the weights come next."""


UNWRITTEN = {ops.empty.memory_format: ops.zeros.default, ops.empty_like.default: ops.zeros_like.default,
             ops.new_empty.default: ops.new_zeros.default}


def write_all(graph: fx.Graph) -> None:
    """Memory that a forward takes as it is holds zeros, so that every run of the graph finds the same. In place."""
    for node in graph.nodes:
        if node.target in UNWRITTEN:
            node.target = UNWRITTEN[node.target]
            if node.target is ops.zeros.default:
                node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}


def follow_weights(graph: fx.Graph) -> None:
    """Make every state of one value anew, like the weights of the layer that reads it. The graph is changed."""
    for node in list(graph.nodes):
        place = RECURRENT.get(node.target)
        if place is None:
            continue
        weight: Any = node.args[place + 1]
        weight = weight[0] if isinstance(weight, (list, tuple)) else weight
        with graph.inserting_before(node):
            states = fx.node.map_arg(node.args[place], lambda state: _again(graph, state, weight))  # noqa: B023
        old = list(node.all_input_nodes)
        node.args = (*node.args[:place], states, *node.args[place + 1:])
        for state in old:
            _erase_unread(graph, state)


class PackedCounts(TorchFunctionMode):
    """While make_fx records: how many sequences a packed batch begins with is a value, which recurrent layers want as a
    number; it is that of the example input."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[Tensor] = []           # of sequences: by time step, then at the first

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if func in (torch.zeros, Tensor.__int__) and any(map(self._is_count, args)):
            with disable_proxy_modes_tracing():
                args = tuple(int(arg) if self._is_count(arg) else arg for arg in args)
            if func is not torch.zeros:
                return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch._VF._pack_padded_sequence:
            self.counts.append(result[1])
        elif func is Tensor.__getitem__ and self._is_count(args[0]):
            self.counts.append(result)
        return result

    def _is_count(self, value: Any) -> bool:
        return any(value is count for count in self.counts)


def _again(graph: fx.Graph, state: fx.Node, weight: fx.Node) -> fx.Node:
    """A state made like the weight, where it is made of one value; itself where it is not."""
    links = [state]
    while links[-1].target in SAME | SHAPED:
        links.append(links[-1].all_input_nodes[0])
    if links[-1].target not in CREATED:
        return state
    made: fx.Node | None = None
    for link in reversed(links):
        if made is None:
            made = graph.call_function(CREATED[link.target], (weight, *link.args))  # type: ignore[index]
        elif link.target in SHAPED:
            made = graph.call_function(link.target, (made, *link.args[1:]), dict(link.kwargs))  # type: ignore[arg-type]
        made.meta.update(link.meta)
    assert made is not None
    return made


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    while node.op == "call_function" and not node.users and node.target in (*CREATED, *SAME, *SHAPED):
        before = [arg for arg in node.all_input_nodes if arg.op == "call_function"]
        graph.erase_node(node)
        if not before:
            return
        node = before[0]
