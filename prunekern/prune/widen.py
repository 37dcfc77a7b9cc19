"""fp64 all the way, also where a forward asks for a narrower type by name (``x.float()``, ``dtype=torch.float32``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from prunekern.core.graph import Graph

NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Widened(TorchDispatchMode):
    """Every operator that is asked for a narrower floating type gives fp64 instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide_args, wide_kwargs = pytree.tree_map_only(torch.dtype, _wide, (args, kwargs or {}))
        return func(*wide_args, **wide_kwargs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in NARROW else dtype


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What ``torch.zeros(3)`` and the like make, in a forward and in its graph."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def widened(graph: Graph) -> AbstractContextManager[Any]:
    """``Widened`` where some operator of the graph names a type, else nothing (the mode costs time)."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype in NARROW and any(
                isinstance(arg, torch.dtype) for arg in pytree.tree_leaves((node.args, dict(node.kwargs)))):
            return Widened()  # type: ignore[no-untyped-call]
    return contextlib.nullcontext()
