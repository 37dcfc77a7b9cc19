"""Runs of a traced network over calibration data: forwards, losses, rows one at a time, labels drawn from outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph
from prunekern.errors import InputError
from prunekern.graph.evaluate import evaluate
from prunekern.graph.inputs import Call

Loss = Callable[..., Tensor]
Batch = tuple[Call, Any]


def run(graph: Graph, tensors: Mapping[str, Tensor], call: Call, number: int, **how: Any) -> list[Any]:
    """``evaluate`` on a calibration batch; raises InputError, with the batch's number, where the network fails."""
    try:
        return evaluate(graph, tensors, call.args, call.kwargs, **how)
    except Exception as error:
        raise InputError(
            f"the network fails on calibration batch {number} ({call}): {type(error).__name__}: {error}. "
            "Pass batches like the example inputs."
        ) from error


def output_of(graph: Graph, tensors: Mapping[str, Tensor], call: Call, number: int, **how: Any) -> Any:
    """The model's output, structured as the model gives it, through operators that gradients can pass."""
    return pytree.tree_unflatten(run(graph, tensors, call, number, out_of_place=True, **how), graph.out_spec)


def loss_of(loss: Loss | None, output: Any, target: Any, number: int) -> Tensor:
    """``loss(output, target)``, or ``loss(output)`` without a target, as one number. None: cross-entropy.

    Raises InputError where it fails, or is no number that depends on the weights.
    """
    try:
        value = (loss or F.cross_entropy)(output, *(() if target is None else (target,)))
    except Exception as error:
        name = getattr(loss, "__name__", type(loss).__name__) if loss else "cross-entropy"
        raise InputError(
            f"the loss ({name}) fails on calibration batch {number}: {type(error).__name__}: "
            f"{error}. Pass loss=function(output, target) that fits the model's output."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise InputError(
            "the loss must be one number that depends on the weights through differentiable "
            f"operators; got {f'shape {tuple(value.shape)}' if isinstance(value, Tensor) else value!r}."
        )
    return value.reshape(())


def differentiable(graph: Graph, weights: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state with copies (sharing memory) of all parameters that collect gradients, and those copies."""
    state = {name: tensor.detach() for name, tensor in graph.tensors.items()}
    own = set(weights)
    leaves = {
        name: state[name].requires_grad_()
        for name, tensor in graph.tensors.items()
        if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or name in own)
    }
    return state, leaves


def drawn(output: Any, generator: torch.Generator) -> Tensor:
    """Labels drawn from what the model itself believes: classes along axis 1 of scores [N, C, ...] -> [N, ...].

    Squared gradients under such labels average to the Fisher information, where true ones would be needed for
    nothing else (Martens 2020, 'New Insights and Perspectives on the Natural Gradient Method', section 5).
    Raises InputError where the output is not one tensor of class scores.
    """
    if not (isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2 and output.shape[1] > 1):
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise InputError(
            f"the calibration data holds no targets, and the output is {what}, not class scores [N, C, ...] to draw "
            "labels from; pass batches of (inputs, target), or loss=function of the output."
        )
    chances = output.detach().to("cpu", torch.float64).softmax(1).movedim(1, -1)
    labels = torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1, generator=generator)
    return labels.reshape(chances.shape[:-1]).to(output.device)


def first(batches: Iterable[Batch], rows: int | None) -> Iterator[Batch]:
    """The first ``rows`` rows; the last batch is cut where its rows can be told apart (``splits``)."""
    left = rows
    for call, target in batches:
        size = call.batch or 1
        if left is not None and size > left and splits(call):
            call, target = part(call, target, 0, left)
        yield call, target
        left = None if left is None else left - size
        if left is not None and left <= 0:
            return


def splits(call: Call) -> bool:
    """Whether rows can be run on their own: the nodes of one graph, say, belong together."""
    return call.batch is not None and not call.whole


def part(call: Call, target: Any, start: int, stop: int) -> Batch:
    """Rows start..stop of a batch, and of its target."""
    size = call.batch

    def cut(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.dim() and tensor.shape[0] == size else tensor

    return call.map(cut), pytree.tree_map_only(Tensor, cut, target)
