"""What counts as data: two tensors, a torch dataset, an iterable of batches, or a function giving one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.data.dataset import Batches
from prunekern.errors import InputError

Data = Iterable[Any] | Callable[[], Any]
"""`(inputs, labels)` tensors, a torch `Dataset`, any iterable of `(input, target)` batches, or a function
returning one of these (called once per pass). Where no labels are needed: inputs alone, or batches of them."""


def passes(data: Data, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Any]:
    """One pass over `data` as an iterable of `(input, target)` batches.

    Tensors and map-style datasets are cut into batches of `batch_size`, in a fresh order drawn from
    `generator` if there is one; iterables bring their own batches and order. Raises `InputError`.
    """
    if isinstance(data, nn.Module) or data is None:
        raise InputError(f"data is a {type(data).__name__}; pass (inputs, labels) tensors or a loader.")
    if callable(data) and not isinstance(data, torch.utils.data.Dataset) and not hasattr(data, "__iter__"):
        return passes(data(), batch_size, generator)
    if isinstance(data, Tensor):
        return Rows(data, batch_size, generator)
    if isinstance(data, torch.utils.data.TensorDataset) and len(data.tensors) == 2:
        data = tuple(data.tensors)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        inputs, labels = data
        if not len(inputs) == len(labels) > 0:
            raise InputError(
                f"data: {len(inputs)} inputs and {len(labels)} labels; pass as many of each, at least one."
            )
        return Batches(inputs, labels, batch_size, generator is not None, generator)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        raise InputError(
            f"data: inputs are {_kind(data[0])}; for models with several inputs pass an iterable of "
            "((input, input, …), target) batches."
        )
    if isinstance(data, torch.utils.data.IterableDataset):
        return torch.utils.data.DataLoader(data, batch_size)
    if isinstance(data, torch.utils.data.Dataset):
        return torch.utils.data.DataLoader(data, batch_size, shuffle=generator is not None, generator=generator)
    if not isinstance(data, Iterable):
        raise InputError(
            f"data is a {type(data).__name__}; pass (inputs, labels) tensors, a loader, or a function giving one."
        )
    return data


def length(batches: Iterable[Any]) -> int | None:
    """The number of batches of a pass, where it is known beforehand."""
    try:
        return len(batches) or None  # type: ignore[arg-type]
    except TypeError:
        return None


def each(batches: Iterable[Any], device: torch.device, *, labelled: bool = True) -> Iterator[tuple[Any, Any]]:
    """`(input, target)` on `device`; not `labelled`: the target is None where a batch is an input alone.

    Raises `InputError` for a batch of another form, or if there is none.
    """
    count = 0
    for count, batch in enumerate(batches, 1):
        if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
            yield to_device(batch[0], device), batch[1].to(device, non_blocking=True)
        elif labelled:
            raise InputError(f"batch {count - 1} is {_kind(batch)}; it must be (input, target) with a tensor target.")
        else:
            alone = isinstance(batch, (tuple, list)) and len(batch) == 1
            yield to_device(batch[0] if alone else batch, device), None
    if not count:
        raise InputError(
            "the data gave no batch. A generator can be used once only: pass tensors, a DataLoader, or a "
            "function that returns a fresh iterator."
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """Batches of inputs without labels, each iteration one pass; in a fresh order with a `generator`."""

    inputs: Tensor
    batch_size: int
    generator: torch.Generator | None = None

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.generator is None:
            yield from self.inputs.split(self.batch_size)
            return
        order = torch.randperm(len(self.inputs), generator=self.generator)
        for part in order.split(self.batch_size):
            yield self.inputs.index_select(0, part.to(self.inputs.device))


def rows(value: Any) -> int:
    """How many samples a batch's input holds: the length of its first tensor."""
    if isinstance(value, Tensor):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for found in map(rows, parts) if found), 0)


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        inside = ", ".join(type(part).__name__ for part in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({inside})"
    return f"a {type(value).__name__}"


def to_device(value: Any, device: torch.device) -> Any:
    """Every tensor inside tuples, lists and dicts of `value` on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(to_device(part, device) for part in value)
    return value


def call(model: Callable[..., Any], value: Any) -> Any:
    """`model` on one input: a tensor, a tuple or list of positional, or a dict of keyword arguments."""
    if isinstance(value, Mapping):
        return model(**value)
    return model(*value) if isinstance(value, (tuple, list)) else model(value)


def scores(output: Any) -> Tensor:
    """The class scores in a model's output: a tensor, something with `.logits`, or the first of a tuple."""
    found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise InputError(
            f"the model returned {_kind(output)}, in which no class scores are found. Pass loss=, or wrap "
            "the model so that it returns a tensor."
        )
    return found


def correct(output: Any, target: Tensor) -> Tensor | None:
    """How many predictions are right (a scalar tensor), or None where targets are not class indices.

    Scores are `[N, classes, ...]` with targets `[N, ...]`.
    """
    if target.is_floating_point() or target.is_complex():
        return None
    found = scores(output)
    if found.ndim != target.ndim + 1:
        return None
    return (found.argmax(1) == target).sum()
