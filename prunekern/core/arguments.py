"""Arguments of an ATen call in JSON-able form, for the operators that stay what they are.

Tensors become references to a Step's inputs and weights, sizes become Dims; a device is always "where the
Program runs". Operators are found by name among ``torch.ops``, so a file can name no other code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from prunekern.core.graph import Dim
from prunekern.errors import LoweringError


def by_name(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by their name in the operator's schema."""
    names = (argument.name for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def per_axis(value: Any, rank: int) -> list[int]:
    """One number for every spatial axis."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * rank if len(values) == 1 else values


def operator_name(target: Any) -> str:
    """``aten.conv2d.default`` of an operator. Raises LoweringError for anything else."""
    if not isinstance(target, torch._ops.OpOverload):
        raise LoweringError(f"{getattr(target, '__name__', target)} is no operator that can be stored by name")
    namespace, name = target._schema.name.split("::")
    return f"{namespace}.{name}.{target._overloadname}"


def find_operator(name: str) -> Any:
    """The operator of that name. Raises LoweringError where this torch has none."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError as error:
        raise LoweringError(f"this torch ({torch.__version__}) has no operator {name!r}; use the version that "
                            "the Program was made with, or import the library that registers it.") from error
    if not isinstance(found, torch._ops.OpOverload):
        raise LoweringError(f"{name!r} is not an operator.")
    return found


def encode(arg: Any, tensor: Callable[[Any], dict[str, Any] | None]) -> Any:
    """An argument as JSON; ``tensor`` gives the reference for whatever stands for a tensor, else None."""
    reference = tensor(arg)
    if reference is not None:
        return reference
    if isinstance(arg, (list, tuple)):
        return [encode(item, tensor) for item in arg]
    if arg is None or isinstance(arg, (bool, int, str)):
        return arg
    if isinstance(arg, float):
        return arg if math.isfinite(arg) else {"float": repr(arg)}
    if isinstance(arg, Dim):
        return {"dim": [arg.scale, arg.offset]}
    if isinstance(arg, torch.device):
        return {"device": "same"}
    for kind in (torch.dtype, torch.memory_format, torch.layout):
        if isinstance(arg, kind):
            return {kind.__name__: str(arg).removeprefix("torch.")}
    raise LoweringError(f"an argument of type {type(arg).__name__} cannot be stored as JSON")


def decode(tree: Any, inputs: Sequence[Any], weights: Mapping[str, Tensor], batch: int, device: torch.device) -> Any:
    """The inverse, with the tensors put in."""
    if isinstance(tree, (list, tuple)):
        return [decode(item, inputs, weights, batch, device) for item in tree]
    if not isinstance(tree, dict):
        return tree
    (kind, value), = tree.items()
    match kind:
        case "input":
            return inputs[value]
        case "weight":
            return weights[value]
        case "dim":
            return Dim(*value).at(batch)
        case "float":
            return float(value)
        case "device":
            return device
        case "dtype" | "memory_format" | "layout":
            return getattr(torch, value)
    raise LoweringError(f"unknown kind of argument {kind!r} in a Program")
