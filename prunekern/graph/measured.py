"""Sizes that depend on the data: how many edges are no loops, how many graphs a batch holds.

Where operators make them (``x[mask]``), they are free in a capture, and what the example has is written down beside
them. Where the forward reads them out of integers (``int(index.max()) + 1``), those of the example are assumed; what it
reads out of constants of its own (``torch.ones(n).all()``) is what it always reads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from prunekern.core.graph import Dim, Graph
from prunekern.graph.evaluate import After, evaluate
from prunekern.graph.inputs import Call
from prunekern.graph.parts import ghost

NUMBERS = frozenset((Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__index__, Tensor.__float__, Tensor.__bool__))
READS = NUMBERS | {Tensor.__contains__}
LEAKS: frozenset[Any] = frozenset((Tensor.numpy, Tensor.__array__))       # what leaves torch is not followed
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


@dataclass(frozen=True)
class Read:
    """What was asked of a tensor of which rank, on which line; the answer, and whether it may be another one for other
    inputs or weights."""

    where: tuple[Any, ...]
    answer: Any
    varies: bool


def assumed(reads: Iterable[Read]) -> tuple[str, ...]:
    """What to say of answers that hold for the example."""
    count = sum(read.varies for read in reads)
    return (ASSUMED.format(count),) if count else ()


class Reading(TorchFunctionMode):
    """Writes down what a forward reads out of tensors; or, given such a list, answers from it.

    given: inputs and state. ``plain``: whether nothing but integers was read of them and of what is computed from them.
    """

    def __init__(self, known: tuple[Read, ...] | None = None, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known, self.reads, self.plain = known, list[Read](), True
        self._derived = WeakIdKeyDictionary(dict.fromkeys(given, True))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and isinstance(args[0], Tensor):
            return self._read(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self.known is None and any(self._derives(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            self._follow(func, args, result)
        return result

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        where = (func.__name__, args[0].dim(), *_line())
        if self.known is None:
            varies = self._derives(args[0])
            self.plain &= not varies or (args[0].dtype in (torch.int32, torch.int64) and func in NUMBERS)
            self.reads.append(Read(where, func(*args, **kwargs), varies))
        elif len(self.reads) < len(self.known) and self.known[len(self.reads)].where == where:
            self.reads.append(self.known[len(self.reads)])
        else:                               # code that knows that it is captured takes another way
            raise RuntimeError(f"the forward reads other numbers while it is captured: {where}")
        return self.reads[-1].answer

    def _derives(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._derived

    def _follow(self, func: Any, args: Any, result: Any) -> None:
        """What is computed from given tensors, or has them written to it, is of them."""
        name = getattr(func, "__name__", "")
        self.plain &= func not in LEAKS
        written = args[:1] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else ()
        for leaf in pytree.tree_leaves((result, written)):
            if isinstance(leaf, Tensor):
                self._derived[leaf] = True
                if written and leaf._base is not None:
                    self._derived[leaf._base] = True


def _line() -> tuple[str, int]:
    """The line outside torch and this file that is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (frame.f_code.co_filename == __file__
                                        or f"{os.sep}torch{os.sep}" in frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def read_numbers(model: nn.Module, call: Call) -> tuple[Read, ...]:
    """What one forward reads out of tensors of integers and out of constants; nothing where it reads anything else, too
    (a branch taken on a value is not assumed), or where such a constant follows the batch."""
    reads = _reads(model, call)
    constants = [(read.where, read.answer) for read in reads if not read.varies]
    for batch in (1, call.batch + 1) if constants and call.batch is not None else ():
        other = _reads(model, call.resized(batch))
        if constants != [(read.where, read.answer) for read in other if not read.varies]:
            return ()
    return reads


def _reads(model: nn.Module, call: Call) -> tuple[Read, ...]:
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    given = call.map(lambda tensor: tensor.clone())
    reading = Reading(given=(*state.values(), *(tensor for _, tensor in given.named_tensors())))
    try:
        with reading, torch.no_grad():
            torch.func.functional_call(ghost(model), state, given.args, dict(given.kwargs), tie_weights=False)
    except Exception:                                # it will be said why where the forward is tried again
        return ()
    return tuple(reading.reads) if reading.plain else ()
