"""Calibration data in every spelling users have, as calls of a traced network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph
from prunekern.errors import InputError
from prunekern.graph.inputs import Call

Data = Iterable[Any] | Callable[[], Any]
"""A loader, any iterable of batches, a pair of tensors ``(inputs, targets)``, a Dataset, or a function that
returns one of these. A batch is inputs (tensor, tuple or dict) or ``(inputs, target)``."""

CHUNK = 128  # rows per call where data comes as whole tensors or as a Dataset


def calls(graph: Graph, data: Data) -> Iterator[tuple[Call, Any]]:
    """(inputs, target or None) of every batch, on the network's device.

    Raises InputError where a batch does not fit what the network was traced with, or there is none.
    """
    device = next((t.device for t in graph.tensors.values()), torch.device("cpu"))

    def move(tensor: Tensor) -> Tensor:
        if tensor.is_inference():       # gradients would refuse it
            with torch.inference_mode(False):
                tensor = tensor.clone()
        return tensor.to(device)

    count = 0
    for count, batch in enumerate(_batches(graph, data), 1):
        call, target = _split(graph, batch, count - 1)
        _check_batch_size(graph, call, count - 1)
        yield call.map(move), pytree.tree_map_only(Tensor, move, target)
    if not count:
        raise InputError(
            "the calibration data gave no batch. A generator can be used only once: pass tensors, a "
            "DataLoader, or a function that returns a fresh iterator."
        )


def _batches(graph: Graph, data: Any) -> Iterable[Any]:
    size = CHUNK if graph.free_batch else graph.batch
    if isinstance(data, torch.utils.data.Dataset):
        return torch.utils.data.DataLoader(data, size, drop_last=not graph.free_batch)
    if isinstance(data, Tensor):
        return list(data.split(size))
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, (tuple, list)) and _is_pair(graph, data):
        return list(zip(data[0].split(size), data[1].split(size), strict=True))
    if callable(data) and not hasattr(data, "__iter__"):
        return _batches(graph, data())
    if not isinstance(data, Iterable):
        raise InputError(
            f"calibration data is a {type(data).__name__}; pass tensors, a loader, or a function giving one."
        )
    return data


def _is_pair(graph: Graph, data: tuple[Any, ...] | list[Any]) -> bool:
    """Two tensors of inputs and targets, rather than two batches of inputs."""
    if len(data) != 2 or not all(isinstance(part, Tensor) and part.dim() for part in data):
        return False
    return (
        len(data[0]) == len(data[1])
        and _fits(graph, _as_call(data[0]))
        and (isinstance(data, tuple) or not _fits(graph, _as_call(data[1])))
    )


def _split(graph: Graph, batch: Any, number: int) -> tuple[Call, Any]:
    """A batch is what the network takes, or a pair of that and a target."""
    if _fits(graph, _as_call(batch)):
        return _as_call(batch), None
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and _fits(graph, _as_call(batch[0])):
        return _as_call(batch[0]), batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) == 1 and _fits(graph, _as_call(batch[0])):
        return _as_call(batch[0]), None
    raise InputError(
        f"calibration batch {number} is {_describe(batch)}, but the network was traced with "
        f"({Call(graph.args, graph.kwargs)}); pass such inputs, or (inputs, target) pairs, of any "
        "batch size."
    )


def _as_call(inputs: Any) -> Call:
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    return Call(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def _fits(graph: Graph, call: Call) -> bool:
    """Same structure as the traced call, and tensors of the same shape but for axis 0."""
    given, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    traced, traced_spec = pytree.tree_flatten((graph.args, dict(graph.kwargs)))
    return spec == traced_spec and all(
        isinstance(a, Tensor) == isinstance(b, Tensor)
        and (not isinstance(b, Tensor) or (a.dim() == b.dim() and a.shape[1:] == b.shape[1:]))
        for a, b in zip(given, traced, strict=True)
    )


def _check_batch_size(graph: Graph, call: Call, number: int) -> None:
    if not graph.free_batch and call.batch != Call(graph.args, graph.kwargs).batch:
        raise InputError(
            f"calibration batch {number} has {call.batch} rows, but the forward fixes its batch size at "
            f"{graph.batch}; give batches of that size (drop_last=True in a DataLoader)."
        )


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of ({', '.join(_describe(part) for part in batch[:4])})"
    if isinstance(batch, Mapping):
        return f"a dict of {sorted(map(str, batch))}"
    return f"a tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
