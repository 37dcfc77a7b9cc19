"""The training loop: fine-tuning after pruning, or training from scratch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekern.errors import ArtefactError, InputError, ModelError
from prunekern.train import checkpoint as store
from prunekern.train.batching import Data, call, correct, each, length, passes
from prunekern.train.evaluate import Loss, cross_entropy, device_of, evaluate, kept_modes
from prunekern.train.history import Epoch, History
from prunekern.train.progress import Progress, shown
from prunekern.train.seeding import forked_rng, rng_states, set_rng_states
from prunekern.train.settings import Settings

Hook = Callable[[nn.Module], object]
Regulariser = Callable[[nn.Module], Tensor | None]


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
    regularise: Regulariser | None = None,
    before_step: Hook | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    amp: bool = False,
    progress: bool = True,
) -> History:
    """Train `model` **in place** and return what happened, epoch by epoch.

    Data: `(inputs, labels)` tensors (fastest; put them on the device beforehand if they fit), a torch
    `Dataset`, any iterable of `(input, target)` batches, or a function returning one of these, called once
    per epoch. A batch's input may be a tensor, a tuple or a dict. `batch_size` is for tensors and datasets.

    `loss(output, target)` averages over the batch (default: cross-entropy of class scores).
    `regularise(model)` is added to it if it gives a tensor. `before_step(model)` runs between backward and
    step: change gradients there. The learning rate moves with every batch where the number of batches is
    known, else with every epoch: "cosine" to zero, "step" by `gamma` at each share of the run in
    `milestones`, or "constant". `momentum` and `nesterov` are SGD's. Parameters with `requires_grad=False`
    stay as they are.

    `patience`: stop after that many epochs without a better validation accuracy; the best weights are then
    restored (`restore_best` asks for that by itself). `amp`: bfloat16 autocast, CUDA only. `device`: train
    there and move the model back afterwards; by default it is trained where it is.

    Reproducible: orders and dropout follow `seed`, and no global generator is disturbed. With `checkpoint`
    the state is written to that file after every epoch; the same call, with the model as it was at first,
    continues after a kill and ends as if it had never stopped (but for data with random state of its own).
    A finished checkpoint gives its result at once.

    Train/eval modes are left as found. Raises `InputError` (data or settings), `ModelError` (nothing to
    train; or the loss is no longer finite, then the weights are put back as they were), `ArtefactError`
    (checkpoint damaged, or of another run), `UnknownName` (optimizer or schedule).
    """
    keep = patience is not None if restore_best is None else restore_best
    settings = Settings(
        epochs,
        lr,
        optimizer,
        momentum,
        nesterov,
        weight_decay,
        schedule,
        tuple(milestones),
        gamma,
        batch_size,
        patience,
        keep,
        seed,
        amp,
    )
    _check(model, validate, settings, device)
    with kept_modes(model, train=True), _placed(model, device) as place, forked_rng(place, seed):
        run = _Run(model, settings, place, loss or cross_entropy, regularise, before_step)
        if checkpoint is not None:
            run.resume(checkpoint)
        with shown(epochs, progress) as bar:
            while not run.over():
                run.epoch(train, validate, bar)
                if checkpoint is not None:
                    run.save(checkpoint)
        return run.finish()


def _check(model: nn.Module, validate: Data | None, settings: Settings, device: torch.device | str | None) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"fit: {type(model).__name__} is not a torch.nn.Module; pass the model itself.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("fit: the model has no parameter with requires_grad=True; nothing can be trained.")
    if validate is None and (settings.patience is not None or settings.restore_best):
        raise InputError("fit: patience and restore_best need validation data; pass validate=.")
    place = torch.device(device) if device is not None else device_of(model)
    if settings.amp and place.type != "cuda":
        raise InputError(f"fit: amp=True works on CUDA only, the model trains on {place}. Drop amp.")


@contextmanager
def _placed(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    home = device_of(model)
    place = torch.device(device) if device is not None else home
    try:
        model.to(place) if place != home else None
        yield place
    finally:
        model.to(home) if place != home else None


class _Run:
    """A run between two epochs: everything a checkpoint has to hold."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        device: torch.device,
        loss: Loss,
        regularise: Regulariser | None,
        before_step: Hook | None,
    ) -> None:
        self.model, self.settings, self.device = model, settings, device
        self.loss, self.regularise, self.before_step = loss, regularise, before_step
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = settings.build(self.parameters)
        self.records: list[Epoch] = []
        self.entry = store.state_of(model)
        self.identity: str | None = None
        self.best: dict[str, Tensor] = {}

    def over(self) -> bool:
        return len(self.records) >= self.settings.epochs or self._stalled()

    def _stalled(self) -> bool:
        best = self._best()
        return (
            self.settings.patience is not None
            and best is not None
            and len(self.records) - 1 - best >= self.settings.patience
        )

    def _best(self) -> int | None:
        scored = [(e.validation_accuracy, -e.epoch) for e in self.records if e.validation_accuracy is not None]
        return -max(scored)[1] if scored else None

    def epoch(self, train: Data, validate: Data | None, bar: Progress) -> None:
        start, index = time.perf_counter(), len(self.records)
        rate = self.settings.rate(index)
        loss, right = self._train_epoch(passes(train, self.settings.batch_size, self.generator), index, bar)
        checked = share = None
        if validate is not None:
            checked = evaluate(self.model, validate, loss=self.loss, device=self.device)
            share = None if math.isnan(checked.accuracy) else checked.accuracy
        if self.settings.restore_best and share is None:
            raise InputError("fit: patience and restore_best need integer class targets. Drop them.")
        seconds = time.perf_counter() - start
        self.records.append(Epoch(index, loss, right, checked and checked.loss, share, rate, seconds))
        if self.settings.restore_best and self._best() == index:
            self.best = store.state_of(self.model)
        bar.end(self.records[-1])

    def _train_epoch(self, batches: Any, index: int, bar: Progress) -> tuple[float, float | None]:
        """Mean loss and accuracy of one pass."""
        steps = length(batches)
        bar.start(index, steps)
        precise = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=precise, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        seen, scored = 0, 0
        for number, (value, target) in enumerate(each(batches, self.device)):
            self._set_rate(index + (number / steps if steps else 0.0))
            loss, hits = self._step(value, target)
            total += loss * len(target)
            seen += len(target)
            if hits is not None:
                right += hits
                scored += target.numel()
            bar.step()
        mean = float(total) / seen
        if not math.isfinite(mean):
            store.put_state(self.model, self.entry)
            raise ModelError(
                f"fit: the loss became {mean} in epoch {index + 1} (lr={self.settings.lr}); the weights are "
                "back as they were before training. Lower lr, or look for bad values in the data."
            )
        return mean, float(right) / scored if scored else None

    def _set_rate(self, done: float) -> None:
        rate = self.settings.rate(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _step(self, value: Any, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """One update; the batch's loss (without the penalty) and how many predictions were right."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if self.settings.amp else nullcontext():
            output = call(self.model, value)
            loss = self.loss(output, target)
            penalty = self.regularise(self.model) if self.regularise else None
        (loss if penalty is None else loss + penalty).backward()
        if self.before_step is not None:
            self.before_step(self.model)
        self.optimizer.step()
        return loss.detach(), correct(output, target)

    def finish(self) -> History:
        """Put back the best weights if that was asked for, drop the gradients, and sum up."""
        self.optimizer.zero_grad(set_to_none=True)
        restored = self.settings.restore_best and bool(self.best)
        if restored:
            store.put_state(self.model, self.best)
        stopped = self._stalled() and len(self.records) < self.settings.epochs
        return History(tuple(self.records), self._best(), restored, stopped)

    def save(self, path: str | os.PathLike[str]) -> None:
        run = {**self._identity(), "history": History(tuple(self.records)).to_dict()}
        parts = {
            "model": store.state_of(self.model),
            "best": self.best,
            "optimizer": store.optimizer_tensors(self.optimizer),
            "rng": rng_states(self.device, self.generator),
        }
        store.save(path, run, parts)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Continue from `path` if it is there. Raises `ArtefactError` if it belongs to another run."""
        identity = self._identity()
        found = store.load(path)
        if found is None:
            return
        run, parts = found
        for key, value in identity.items():
            if run.get(key) != value:
                raise ArtefactError(f"checkpoint {path} {_difference(key, run.get(key), value)}")
        self.records = list(History.from_dict(run["history"]).epochs)
        store.put_state(self.model, parts["model"])
        self.best = parts.get("best", {})
        store.put_optimizer(self.optimizer, parts.get("optimizer", {}))
        set_rng_states(self.device, self.generator, parts["rng"])

    def _identity(self) -> dict[str, Any]:
        if self.identity is None:
            self.identity = store.fingerprint(self.model)
        return {"settings": self.settings.to_dict(), "start": self.identity}


def _difference(key: str, found: Any, wanted: Any) -> str:
    if key == "start":
        return "began with other weights or another model; pass the model as it was then, or delete the file."
    pairs = [f"{k}={found.get(k)!r}, now {v!r}" for k, v in wanted.items() if found.get(k) != v]
    return f"is of a run with other settings ({'; '.join(pairs)}); use the same, or delete the file."
