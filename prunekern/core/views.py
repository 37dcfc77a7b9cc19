"""What nodes stand for, which of them share memory, and how a write to a view becomes a pure write to its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from prunekern.core.graph import Dim

aten = torch.ops.aten


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the inputs: the name of a weight."""

    name: str


@dataclass(frozen=True)
class Broken:
    """A value that was written through a view in a way that has no pure form here."""

    message: str


def relation(node: fx.Node) -> str:
    """``itself``, ``view`` or ``new``: what a call's first result is to its first argument.

    The operator is run on meta tensors with the traced strides, so ``reshape``, ``contiguous`` and ``to`` are
    told apart as they are at run time.
    """
    source = node.args[0]
    try:
        meta = {n: _meta(n.meta["val"]) for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), meta.__getitem__)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        return "view" if any(r.alias_info is not None for r in returns) else "new"
    first, given = (result[0] if isinstance(result, (list, tuple)) else result), meta[source]  # type: ignore[index]
    if not isinstance(first, Tensor) or not isinstance(given, Tensor) or _storage(first) != _storage(given):
        return "new"
    return "itself" if _layout(first) == _layout(given) else "view"


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(_numbers(value.shape), _numbers(value.stride()), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return [_meta(item) for item in value]
    return _number(value)


def _numbers(sizes: Any) -> tuple[int, ...]:
    return tuple(_number(size) for size in sizes)


def _number(size: Any) -> Any:
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _layout(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


BASE, VALUE = object(), object()     # stand for the base's old and the view's new value in a call
_ORDERS = (aten.permute, aten.transpose, aten.t, aten.movedim, aten.swapaxes)
_SHAPES = (aten.view, aten.reshape, aten.flatten, aten.unsqueeze, aten.squeeze, aten.unflatten, aten.alias)


def scatter(view: fx.Node, shape: tuple[Dim, ...]) -> tuple[Any, tuple[Any, ...]] | None:
    """(operator, arguments) that give the new value of the base (of that shape) once its view became VALUE;
    None where there is no pure form here."""
    packet, args = getattr(view.target, "overloadpacket", None), view.args
    if packet is aten.slice:
        return aten.slice_scatter.default, (BASE, VALUE, *args[1:])
    if packet is aten.select:
        return aten.select_scatter.default, (BASE, VALUE, *args[1:])
    if packet is aten.diagonal:
        return aten.diagonal_scatter.default, (BASE, VALUE, *args[1:])
    if packet is aten.narrow and isinstance(args[2], int) and isinstance(args[3], int):
        return aten.slice_scatter.default, (BASE, VALUE, args[1], args[2], args[2] + args[3])
    if packet in _ORDERS:
        order = _order(view, len(shape))
        return aten.permute.default, (VALUE, [order.index(axis) for axis in range(len(shape))])
    if packet in _SHAPES:
        return aten.reshape.default, (VALUE, list(shape))
    return None


def _order(view: fx.Node, rank: int) -> list[int]:
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    out = view.target(probe, *view.args[1:], **view.kwargs)  # type: ignore[operator]
    return [size - 2 for size in out.shape]
