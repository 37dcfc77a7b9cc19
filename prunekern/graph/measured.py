"""Sizes that depend on the data: how many edges are no loops, how many graphs a batch holds.

Where operators make them (``x[mask]``), they are free in a capture, and what the example has is written down beside
them. Where the forward reads them out of integers (``int(index.max()) + 1``), the numbers of the example are assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from prunekern.core.graph import Dim, Graph
from prunekern.graph.evaluate import After, evaluate
from prunekern.graph.inputs import Call
from prunekern.graph.parts import ghost

READS = frozenset((Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__index__, Tensor.__float__, Tensor.__bool__))
ASSUMED = ("the forward reads {} numbers out of its integer inputs (sizes, most likely); the graph holds for those of "
           "the example inputs only")


def measured(graph: Graph) -> dict[Any, int]:
    """The value on the example inputs of every symbol that stands for a size made by the data (runs the graph).

    At least 2: an axis of 1 could be taken for a broadcast one, and one of 0 holds no labels.
    """
    if not any(symbol for node in graph.nodes for symbol in _symbols(node.meta.get("val"))):
        return {}
    found: dict[Any, int] = {}

    def after(node: torch.fx.Node, value: Any) -> None:
        for symbol, number in zip(_sizes(node.meta.get("val")), _sizes(value), strict=False):
            if isinstance(symbol, torch.SymInt) and free_unbacked_symbols(symbol) == {symbol.node.expr}:
                found.setdefault(symbol.node.expr, max(2, int(number)))
    _run(graph, after)
    return found


def has_measured(graph: Graph) -> bool:
    """Whether some size depends on the data."""
    return any(isinstance(dims, tuple) and any(dim.measured for dim in dims) for dims in graph.dims.values())


def settled(graph: Graph) -> Graph:
    """The graph for the example inputs alone: every size that the data makes is what it is there (runs the graph)."""
    if not has_measured(graph):
        return graph
    dims = dict(graph.dims)

    def after(node: torch.fx.Node, value: Any) -> None:
        old = dims.get(node.name)
        if isinstance(value, Tensor) and isinstance(old, tuple):
            dims[node.name] = tuple(Dim(0, size, measured=True) if dim.measured else dim
                                    for dim, size in zip(old, value.shape, strict=True))
        elif isinstance(old, Dim) and old.measured:
            dims[node.name] = Dim(0, int(value), measured=True)
    _run(graph, after)
    return replace(graph, dims=dims)


def _run(graph: Graph, after: After) -> None:
    """The graph on its example inputs; ``after`` sees every value."""
    state = {name: tensor.detach() for name, tensor in graph.tensors.items()}
    with torch.no_grad():
        evaluate(graph, state, graph.args, graph.kwargs, after=after)


def _sizes(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, (list, tuple)):
        return [size for item in value for size in _sizes(item)]
    return [value]


def _symbols(value: Any) -> Iterator[Any]:
    for size in _sizes(value):
        if isinstance(size, torch.SymInt):
            yield from free_unbacked_symbols(size)


class Reading(TorchFunctionMode):
    """Writes down what a forward reads out of tensors; or, given such a list, answers from it."""

    def __init__(self, known: tuple[Any, ...] | None = None) -> None:
        super().__init__()
        self.known = known
        self.numbers: list[Any] = []
        self.integers = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in READS or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        answer = func(*args, **(kwargs or {})) if self.known is None else self.known[len(self.numbers)]
        self.integers &= args[0].dtype in (torch.int32, torch.int64)
        self.numbers.append(answer)
        return answer


def read_numbers(model: nn.Module, call: Call) -> tuple[Any, ...]:
    """What one forward reads out of tensors of integers; nothing where it reads anything else, too: a branch taken
    on a value is not assumed."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    given = call.map(lambda tensor: tensor.clone())
    reading = Reading()
    try:
        with reading, torch.no_grad():
            torch.func.functional_call(ghost(model), state, given.args, dict(given.kwargs))
    except Exception:                                # it will be said why where the forward is tried again
        return ()
    return tuple(reading.numbers) if reading.integers else ()
