"""The training loop: fine-tuning after pruning, or training from scratch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from prunekern.errors import InputError, ModelError
from prunekern.train.augment import Augmentation, as_augmentation
from prunekern.train.batching import Data, scores
from prunekern.train.distil import Distil, Teaching, as_distil
from prunekern.train.evaluate import Loss, cross_entropy, device_of, kept_modes
from prunekern.train.history import History
from prunekern.train.progress import shown
from prunekern.train.run import PRECISIONS, EpochHook, Hook, Methods, Regulariser, Run
from prunekern.train.seeding import forked_rng
from prunekern.train.settings import Settings
from prunekern.train.sparsity import Sparsity


def fit(
    model: nn.Module,
    train: Data,
    validate: Data | None = None,
    *,
    epochs: int,
    lr: float,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
    schedule: Literal["cosine", "step", "constant"] = "cosine",
    milestones: tuple[float, ...] = (0.5, 0.75),
    gamma: float = 0.1,
    batch_size: int = 128,
    patience: int | None = None,
    restore_best: bool | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    loss: Loss | None = None,
    warmup: float = 0.0,
    clip: float | None = None,
    label_smoothing: float = 0.0,
    ema: float | None = None,
    augment: Mapping[str, Any] | Augmentation | None = None,
    teacher: nn.Module | None = None,
    distil: Mapping[str, Any] | Distil | bool | None = None,
    sparsity: Sparsity | None = None,
    regularise: Regulariser | None = None,
    before_step: Hook | None = None,
    after_epoch: EpochHook | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    amp: bool | Literal["bf16", "fp16"] = False,
    progress: bool = True,
) -> History:
    """Train `model` **in place** and return what happened, epoch by epoch.

    Data: `(inputs, labels)` tensors (fastest; put them on the device beforehand if they fit), a torch
    `Dataset`, any iterable of `(input, target)` batches, or a function returning one of these, called once
    per epoch. A batch's input may be a tensor, a tuple or a dict. `batch_size` is for tensors and datasets.

    `loss(output, target)` averages over the batch (default: cross-entropy of class scores).
    `label_smoothing` softens the targets of the default loss (Szegedy et al. 2016); validation is measured
    without. `regularise(model)` is added to the loss if it gives a tensor. `clip`: gradients are scaled down to
    that norm at most. `sparsity` (`GroupLasso`, `GrowingReg`, `SoftPruning`) adds its penalty to the gradients, or
    acts after each epoch. `before_step(model)` then runs between backward and step: change gradients there.
    `after_epoch(model, index)` runs before validation.

    The learning rate moves with every batch where the number of batches is known, else with every epoch:
    `warmup` epochs in a straight line up, then "cosine" to zero, "step" by `gamma` at each share of the rest in
    `milestones`, or "constant". `momentum` and `nesterov` are SGD's. Parameters with `requires_grad=False`
    stay as they are.

    `augment`: `{"crop": 4, "flip": True}` shifts and mirrors images at random (`Augment`), or a function of
    (input, generator). `teacher`: the model also learns what that one says, as `distil` describes (the fields of
    `Distil`); the data may then be inputs without labels. `ema`: the weights are averaged with that decay
    (`Average`); the average is what is validated and what the model holds in the end.

    `patience`: stop after that many epochs without a better validation accuracy; the best weights are then
    restored (`restore_best` asks for that by itself). `amp`: mixed precision; "bf16" (CUDA or CPU), "fp16" with
    scaled gradients (CUDA only), True for the better of them on a CUDA device. `device`: train there and move the
    model back afterwards; by default it is trained where it is.

    Reproducible: orders and dropout follow `seed`, and no global generator is disturbed. With `checkpoint`
    the state is written to that file after every epoch; the same call, with the model as it was at first,
    continues after a kill and ends as if it had never stopped (but for data with random state of its own).
    A finished checkpoint gives its result at once.

    Train/eval modes are left as found. Raises `InputError` (data or settings), `ModelError` (nothing to
    train; or the loss is no longer finite, then the weights are put back as they were), `ArtefactError`
    (checkpoint damaged, or of another run), `UnknownName` (optimizer or schedule).
    """
    keep = patience is not None if restore_best is None else restore_best
    _check(model, validate, patience, keep)
    settings = Settings(epochs, lr, optimizer, momentum, nesterov, weight_decay, schedule, tuple(milestones), gamma,
                        batch_size, patience, keep, seed, _precision(amp, model, device), warmup, clip,
                        label_smoothing, ema)
    measure = loss or cross_entropy
    trained = _smoothed(loss, label_smoothing)
    methods = Methods(trained, _teaching(model, teacher, distil, trained), as_augmentation(augment), sparsity,
                      regularise, before_step, after_epoch)
    _check_sparsity(sparsity, model, ema)
    with kept_modes(model, train=True), _placed(model, device) as place, forked_rng(place, seed), \
            methods.taught.ready(place) if methods.taught else nullcontext():
        run = Run(model, settings, place, methods, measure)
        if checkpoint is not None:
            run.resume(checkpoint)
        with shown(epochs, progress) as bar:
            while not run.over():
                run.epoch(train, validate, bar)
                if checkpoint is not None:
                    run.save(checkpoint)
        return run.finish()


def _check(model: nn.Module, validate: Data | None, patience: int | None, restore_best: bool) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"fit: {type(model).__name__} is not a torch.nn.Module; pass the model itself.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("fit: the model has no parameter with requires_grad=True; nothing can be trained.")
    if validate is None and (patience is not None or restore_best):
        raise InputError("fit: patience and restore_best need validation data; pass validate=.")


def _precision(amp: Any, model: nn.Module, device: torch.device | str | None) -> str:
    """'' for full precision, 'bf16' or 'fp16'. Raises InputError for what the device does not do."""
    if not amp:
        return ""
    place = torch.device(device) if device is not None else device_of(model)
    if amp not in (True, *PRECISIONS):
        raise InputError(f"fit: amp={amp!r}; it is False, True, 'bf16' or 'fp16'.")
    if place.type == "cpu" and amp == "bf16":
        return "bf16"
    if place.type != "cuda":
        raise InputError(f"fit: amp={amp!r} works on CUDA only, the model trains on {place}. Drop amp, or say "
                         "amp='bf16' on a CPU.")
    if amp is True:
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return str(amp)


def _smoothed(loss: Loss | None, smoothing: float) -> Loss:
    if not smoothing:
        return loss or cross_entropy
    if loss is not None:
        raise InputError("fit: label_smoothing is for the default loss; leave it out, or smooth in your own.")
    return lambda output, target: F.cross_entropy(scores(output), target, label_smoothing=smoothing)


def _teaching(model: nn.Module, teacher: nn.Module | None, distil: Any, loss: Loss) -> Teaching | None:
    if teacher is None:
        if distil:
            raise InputError("fit: distil= needs a teacher to learn from; pass teacher=.")
        return None
    return None if distil is False else Teaching(model, teacher, as_distil(distil), loss)


def _check_sparsity(sparsity: Sparsity | None, model: nn.Module, ema: float | None) -> None:
    if sparsity is None:
        return
    if not isinstance(sparsity, Sparsity):
        raise InputError(f"fit: sparsity is a {type(sparsity).__name__}; pass a GroupLasso, GrowingReg, SoftPruning "
                         "or another Sparsity.")
    sparsity.check(model)
    if ema is not None and not sparsity.averages:
        raise InputError(f"fit: ema would average away the zeros of {type(sparsity).__name__}; drop one of the two.")


@contextmanager
def _placed(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    home = device_of(model)
    place = torch.device(device) if device is not None else home
    try:
        model.to(place) if place != home else None
        yield place
    finally:
        model.to(home) if place != home else None
