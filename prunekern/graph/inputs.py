"""Example inputs in every spelling users have, as one frozen call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunekern.core import structure
from prunekern.errors import InputError


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        leaves, _ = pytree.tree_flatten_with_path((self.args, dict(self.kwargs)))
        return [(_path(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int | None:
        """The size of axis 0 of the first tensor that has axes; None where no input has any."""
        return next((t.shape[0] for _, t in self.named_tensors() if t.dim()), None)

    def map(self, fn: Callable[[Tensor], Any]) -> Call:
        args, kwargs = pytree.tree_map_only(Tensor, fn, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)

    def has_batch(self, tensor: Tensor) -> bool:
        """Whether axis 0 of an input is as long as the batch, and so taken for it."""
        return tensor.dim() > 0 and tensor.shape[0] == self.batch

    def doubled(self) -> Call:
        """A batch of one, repeated: size 1 cannot be told from a broadcast axis."""
        if self.batch != 1:
            return self
        return self.map(lambda t: torch.cat((t, t)) if self.has_batch(t) else t)

    @property
    def whole(self) -> bool:
        """Whether the rows belong together: integers of another leading size (the edges of a graph) may be their
        numbers."""
        return any(t.dim() > 0 and not t.is_floating_point() and not self.has_batch(t)
                   for _, t in self.named_tensors())

    def resized(self, batch: int) -> Call:
        """The same inputs at another batch size, rows repeated or dropped; themselves where that makes no sense."""
        if self.batch in (None, batch) or self.whole:
            return self
        rows = torch.arange(batch) % (self.batch or 1)
        return self.map(lambda t: t.index_select(0, rows.to(t.device)) if self.has_batch(t) else t)

    def dynamic_shapes(self, model: nn.Module, dim: Any) -> Any:
        """The torch.export spec that frees axis 0 of every tensor with the batch; None where there is none."""
        if self.batch is None:
            return None

        def spec(leaf: Any) -> Any:
            if dataclasses.is_dataclass(leaf):                # export wants a list of its fields
                return [tree(child) for field in dataclasses.fields(leaf)
                        if (child := getattr(leaf, field.name)) is not None]
            return {0: dim} if isinstance(leaf, Tensor) and self.has_batch(leaf) else None

        def tree(value: Any) -> Any:
            return pytree.tree_map(spec, value, is_leaf=dataclasses.is_dataclass)
        bound = inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments
        return {name: tree(value) for name, value in bound.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name}: {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
                         for name, t in self.named_tensors()) or "no tensors"


def as_call(model: nn.Module, example_inputs: Any) -> Call:
    """A tensor, a tuple or list (positional), a dict (keywords), or a ``Call``.

    Raises InputError where inputs are missing or do not fit the forward's signature.
    """
    if isinstance(example_inputs, Call):
        call = example_inputs
    elif example_inputs is None:
        raise InputError(f"example inputs are missing: pass one batch that {type(model).__name__}.forward accepts, "
                         "as a tensor, a tuple or a dict.")
    elif isinstance(example_inputs, Mapping):
        call = Call((), dict(example_inputs))
    elif isinstance(example_inputs, (tuple, list)):
        call = Call(tuple(example_inputs), {})
    else:
        call = Call((example_inputs,), {})
    try:
        inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__}.forward does not take these inputs: {error}. "
                         "Pass a tensor, a tuple of positional or a dict of keyword arguments.") from error
    structure.register((call.args, dict(call.kwargs)))
    if not call.named_tensors():
        raise InputError(f"example inputs hold no tensor (got {type(example_inputs).__name__}).")
    return call


def from_loader(loader: Iterable[Any]) -> Any:
    """The inputs of a loader's first batch: ``(inputs, target)`` pairs give inputs, anything else itself."""
    batch = next(iter(loader), None)
    if batch is None:
        raise InputError("the loader is empty, so no example inputs can be taken from it.")
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def infer(model: nn.Module) -> Tensor:
    """Example inputs from an unambiguous first layer: a Linear fixes them; nothing else does.

    Raises InputError where the first layer does not say its whole input shape.
    """
    first = next((m for m in model.modules() if not list(m.children()) and list(m.parameters(recurse=False))), None)
    parameter = next(iter(model.parameters()), None)
    if isinstance(first, nn.Linear) and parameter is not None:
        return torch.randn(2, first.in_features, device=parameter.device, dtype=parameter.dtype)
    kind = type(first).__name__ if first is not None else "a model without layers"
    raise InputError(f"example inputs are missing and cannot be inferred from {kind} (its spatial size is free): "
                     "pass one batch, e.g. example_inputs=torch.randn(2, 3, 224, 224).")


def _path(path: Any) -> str:
    """``args[0]`` or the keyword, with the way further in where a leaf lies deeper."""
    which, first, *rest = path
    where = f"args[{first.idx}]" if which.idx == 0 else str(first.key)
    return where + pytree.keystr(tuple(rest))
