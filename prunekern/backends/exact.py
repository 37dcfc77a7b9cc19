"""A traced network in fp64, and how far rounding its weights and inputs would move each of its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph
from prunekern.graph.evaluate import evaluate
from prunekern.lower.tolerance import SHAKES, error

Values = dict[str, Tensor]
Kept = tuple[int, tuple[int, ...]]      # an axis, and which of its positions


def run_graph(graph: Graph, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any],
               names: set[str]) -> tuple[Values, list[Any]]:
    """The values of nodes by name (``node.2`` for the third of several), and the leaves of the output."""
    values: Values = {}

    def keep(node: fx.Node, value: Any) -> None:
        several = isinstance(value, (tuple, list))
        for name, each in ((f"{node.name}.{i}", v) for i, v in enumerate(value)) if several else ((node.name, value),):
            if name in names and isinstance(each, Tensor):
                values[name] = each.clone()         # it may be written in place later
    return values, pytree.tree_leaves(evaluate(graph, tensors, args, kwargs, after=keep),
                                      is_leaf=lambda leaf: leaf is None)


def exactly(graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: set[str],
            ) -> tuple[Values | None, list[Any], list[str]]:
    """Like ``run_graph``, in fp64; None and a note where the network does not run in it."""
    try:
        values, flat = _in_fp64(graph, args, kwargs, names, lambda wide, tensor: wide)
    except (RuntimeError, TypeError) as failure:
        return None, [], [f"the network does not run in fp64 ({str(failure).splitlines()[0]}), so it was held to its "
                          "own dtype"]
    return values, flat, []


def _in_fp64(graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: set[str],
             change: Callable[[Tensor, Tensor], Tensor]) -> tuple[Values, list[Any]]:
    """change: makes of a weight or input in fp64, and as it is, what is computed with."""
    def double(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        return change(value.to(torch.complex128 if value.is_complex() else torch.float64), value)
    tensors = {name: double(tensor) for name, tensor in graph.tensors.items()}
    wide_args, wide_kwargs = pytree.tree_map(double, (args, dict(kwargs)))
    return run_graph(widened(graph), tensors, wide_args, wide_kwargs, names)


class Shaken:
    """How far rounding every weight and input, up or down by chance, moves each value (``tolerance.SHAKES``).

    The runs are made when a value is first asked for: hardly any network needs them.
    """

    def __init__(self, graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any], exact: Values,
                 kept: Mapping[str, Kept]) -> None:
        self._call, self._exact, self._kept = (graph, args, kwargs), exact, kept
        self._found: dict[str, float] | None = None

    def of(self, name: str) -> float:
        """``max|shaken - y64| / max|y64|`` of a value; 0 where nothing is known of it."""
        if self._found is None:
            self._found = {}
            generator = torch.Generator().manual_seed(0)
            for _ in range(SHAKES):
                self._draw(generator)
        return self._found.get(name, 0.0)

    def _draw(self, generator: torch.Generator) -> None:
        def shake(wide: Tensor, tensor: Tensor) -> Tensor:
            signs = torch.randint(0, 2, tensor.shape, generator=generator).to(wide) * 2 - 1
            return wide * (1 + torch.finfo(tensor.dtype).eps * signs)
        assert self._found is not None
        try:
            with torch.no_grad():
                values, _ = _in_fp64(*self._call, set(self._exact), shake)
        except RuntimeError:                # the sizes in the network depend on its numbers
            return
        for name, value in values.items():
            moved = error(kept_of(value, self._kept.get(name)), kept_of(self._exact[name], self._kept.get(name)))
            if math.isfinite(moved):
                self._found[name] = max(self._found.get(name, 0.0), moved)


def kept_of(value: Tensor, kept: Kept | None) -> Tensor:
    """What is left of a value in a program that dropped dead channels (``Program.kept``)."""
    return value if kept is None else value.index_select(kept[0], torch.tensor(kept[1], device=value.device))


def widened(graph: Graph) -> Graph:
    """The same graph with every mention of float32 made float64."""
    def wide(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return type(arg)(wide(item) for item in arg) if not hasattr(arg, "_fields") else arg
        return torch.float64 if arg is torch.float32 else arg
    if not any(leaf is torch.float32 for node in graph.nodes for leaf in
               pytree.tree_leaves((list(node.args), dict(node.kwargs)))):
        return graph
    copy, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph.fx, nodes))
    for old, new in nodes.items():
        new.name = old.name                # a copy is renamed where it is called like a builtin, such as ``input``
    for node in copy.nodes:
        node.args = wide(tuple(node.args))
        node.kwargs = {key: wide(arg) for key, arg in node.kwargs.items()}
    return replace(graph, fx=copy)
