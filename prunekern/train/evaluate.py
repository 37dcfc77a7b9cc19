"""Loss and accuracy of a model on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.errors import InputError
from prunekern.train.batching import Data, call, correct, each, passes, scores

Loss = Callable[[Any, Tensor], Tensor]


class Evaluation(NamedTuple):
    """Mean loss per sample, and the share of right predictions, 0..1 (nan where targets are no classes)."""

    loss: float
    accuracy: float


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """The default loss: softmax cross-entropy of the class scores, averaged over the batch."""
    return F.cross_entropy(scores(output), target)


def evaluate(
    model: Callable[..., Any],
    data: Data,
    *,
    batch_size: int = 1000,
    loss: Loss | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Loss and accuracy of `model` on `data`, in eval mode and without gradients.

    `model` is a module or any callable; a module's train/eval modes are put back afterwards. `data` is
    `(inputs, labels)`, a torch `Dataset`, an iterable of batches or a function giving one. `loss` must
    average over the batch. Raises `InputError` if the data has no batch or a batch of another form.
    """
    place = torch.device(device) if device is not None else device_of(model)
    measure = loss or cross_entropy
    total, right, seen, classes = torch.zeros((), dtype=torch.float64), 0, 0, True
    with kept_modes(model, train=False), torch.no_grad():
        for value, target in each(passes(data, batch_size), place):
            output = call(model, value)
            hits = correct(output, target)
            total += float(measure(output, target)) * len(target)
            right += 0 if hits is None else int(hits)
            classes = classes and hits is not None
            seen += target.numel() if hits is not None else len(target)
    return Evaluation(float(total) / seen, right / seen if classes else float("nan"))


def accuracy(
    model: Callable[..., Any],
    data: Data,
    *,
    batch_size: int = 1000,
    device: torch.device | str | None = None,
) -> float:
    """The share of right predictions of `model` on `data`, 0..1; see `evaluate`.

    Raises `InputError` if the targets are not class indices.
    """
    found = evaluate(model, data, batch_size=batch_size, loss=_no_loss, device=device).accuracy
    if math.isnan(found):
        raise InputError("accuracy needs integer class targets [N] and scores [N, classes]; use evaluate(loss=…).")
    return found


def _no_loss(output: Any, target: Tensor) -> Tensor:
    return torch.zeros(())


def device_of(model: Any) -> torch.device:
    """Where a model's first parameter or buffer lives; the CPU if it has none."""
    if isinstance(model, nn.Module):
        for tensors in (model.parameters(), model.buffers()):
            for tensor in tensors:
                return tensor.device
    return torch.device("cpu")


@contextmanager
def kept_modes(model: Any, *, train: bool) -> Iterator[None]:
    """Set a module to train or eval mode, and put back every submodule's own flag afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(train)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
