"""Run a Graph node by node on real tensors: the masked reference, calibration and per-layer checks use it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph, mutates, pure

Before = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]]
After = Callable[[fx.Node, Any], None]
Instead = Callable[[fx.Node, tuple[Any, ...]], Any]


@contextlib.contextmanager
def same_dice() -> Iterator[None]:
    """Random numbers as in every other run under it (a forward may mask at random), and nobody else's are drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def evaluate(graph: Graph, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any],
             before: Before | None = None, after: After | None = None, instead: Instead | None = None,
             out_of_place: bool = False) -> list[Any]:
    """The flat outputs of the traced network with its state taken from ``tensors``.

    before(node, args) may replace a call's positional arguments; instead(node, args) may give the result itself (or
    NotImplemented); after(node, value) sees every result.
    out_of_place replaces in-place operators by their pure forms (needed for gradients through them).
    Values are freed after their last use. The given state is never written: in-place calls on it are made
    on a copy.
    """
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    given = dict(zip(graph.inputs, leaves, strict=True))
    last = {arg: node for node in graph.nodes for arg in node.all_input_nodes}
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = graph.state.get(node.name)
            env[node] = given[node.name] if name is None else tensors[name]
        elif node.op == "get_attr":                    # a region that an operator runs, under autocasting say
            env[node] = getattr(graph.fx.owning_module, str(node.target))
        elif node.op == "output":
            outputs: Any = fx.node.map_arg(node.args[0], env.__getitem__)
            return list(outputs)
        else:
            env[node] = _call(node, env, before, instead, out_of_place)
        if after is not None:
            after(node, env[node])
        for arg in node.all_input_nodes:
            if last[arg] is node:
                del env[arg]
    raise AssertionError("a graph ends with its output")


def _call(node: fx.Node, env: dict[fx.Node, Any], before: Before | None, instead: Instead | None,
          out_of_place: bool) -> Any:
    mapped: Any = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
    call_args, call_kwargs = mapped
    if before is not None:
        call_args = before(node, call_args)
    if instead is not None and (given := instead(node, call_args)) is not NotImplemented:
        return given
    target: Any = pure(node.target) if out_of_place else node.target
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and first.op == "placeholder" and target is node.target and mutates(target):
        call_args = (call_args[0].clone(), *call_args[1:])   # nobody's tensors are written, not even inputs
        env[first] = call_args[0]
    return target(*call_args, **call_kwargs)
