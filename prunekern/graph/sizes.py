"""The symbolic sizes of a traced graph as functions of its batch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from prunekern.core.graph import Dim

LABEL_BATCH = 2         # what labels are computed for where the batch is free


class NotAffine(Exception):
    """A size is not of the form a * batch + b."""


class Sizes:
    """Turns the symbolic sizes of one trace into Dims."""

    def __init__(self, batch: int | None, measured: Mapping[Any, int] = MappingProxyType({})) -> None:
        self.cache: dict[Any, Dim] = {}
        self.batch, self.measured = batch, measured

    def dim(self, size: Any) -> Dim:
        if not isinstance(size, torch.SymInt):
            return Dim(0, int(size))
        data = free_unbacked_symbols(size)
        if not data <= self.measured.keys():
            raise NotAffine(f"size {size} depends on the data")
        expr = size.node.expr
        if expr not in self.cache:
            first, second, third = (
                int(expr.xreplace({**dict.fromkeys(expr.free_symbols, n), **self.measured}))
                for n in (2, 4, 6))
            scale = (second - first) // 2
            if third - second != second - first or (second - first) % 2:
                raise NotAffine(f"size {expr} is not a multiple of the batch")
            self.cache[expr] = Dim(scale, first - 2 * scale, bool(data))
        return self.cache[expr]

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(self.dim(size) for size in value.shape)
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return self.dim(value)
        return value


def dims_of(graph: fx.Graph, sizes: Sizes) -> dict[str, Any]:
    found = {}
    for node in graph.nodes:
        try:
            if node.op != "output":
                found[node.name] = sizes.of(node.meta.get("val"))
        except NotAffine as error:
            raise NotAffine(f"{error}\n{node.meta.get('stack_trace', '')}") from None
    return found
