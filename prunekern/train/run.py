"""A training run between two epochs: everything a checkpoint has to hold, and how one epoch goes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.errors import ArtefactError, InputError, ModelError
from prunekern.train import checkpoint as store
from prunekern.train.augment import Augmentation, described
from prunekern.train.average import Average
from prunekern.train.batching import Data, call, correct, each, length, passes, rows
from prunekern.train.distil import Teaching
from prunekern.train.evaluate import Loss, evaluate
from prunekern.train.history import Epoch, History
from prunekern.train.progress import Progress
from prunekern.train.seeding import rng_states, set_rng_states
from prunekern.train.settings import Settings
from prunekern.train.sparsity import Sparsity

Hook = Callable[[nn.Module], object]
EpochHook = Callable[[nn.Module, int], object]
Regulariser = Callable[[nn.Module], Tensor | None]

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Methods:
    """What a run calls: its functions, as against the numbers in its `Settings`."""

    loss: Loss
    taught: Teaching | None = None
    augment: Augmentation | None = None
    sparsity: Sparsity | None = None
    regularise: Regulariser | None = None
    before_step: Hook | None = None
    after_epoch: EpochHook | None = None

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, where it is known what it does."""
        return {"augment": described(self.augment), "teacher": self.taught.identity() if self.taught else None,
                "sparsity": self.sparsity.settings() if self.sparsity else None}


class Run:
    """A run between two epochs: everything a checkpoint has to hold."""

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device, methods: Methods,
                 measure: Loss) -> None:
        self.model, self.settings, self.device, self.methods = model, settings, device, methods
        self.measure = measure
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = settings.build(self.parameters)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.average = Average(model, settings.ema) if settings.ema is not None else None
        self.records: list[Epoch] = []
        self.entry = store.state_of(model)
        self.identity: dict[str, Any] | None = None
        self.best: dict[str, Tensor] = {}
        self.best_sparsity: dict[str, Tensor] = {}

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
        if self.methods.sparsity is not None:
            self.methods.sparsity.after_epoch(self.model, index)
        if self.methods.after_epoch is not None:
            self.methods.after_epoch(self.model, index)
        with self._averaged():
            self._check(validate, Epoch(index, loss, right, None, None, rate, time.perf_counter() - start))
        bar.end(self.records[-1])

    def _check(self, validate: Data | None, found: Epoch) -> None:
        """Measure the epoch's weights (their average, where there is one), and keep the best."""
        start, share = time.perf_counter(), None
        checked = None
        if validate is not None:
            checked = evaluate(self.model, validate, loss=self.measure, device=self.device)
            share = None if math.isnan(checked.accuracy) else checked.accuracy
        if self.settings.restore_best and share is None:
            raise InputError("fit: patience and restore_best need integer class targets. Drop them.")
        seconds = found.seconds + time.perf_counter() - start
        self.records.append(Epoch(found.epoch, found.loss, found.train_accuracy, checked and checked.loss, share,
                                  found.lr, seconds))
        if self.settings.restore_best and self._best() == found.epoch:
            self.best = store.state_of(self.model)
            self.best_sparsity = self._sparsity()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with self.average.used(self.model) if self.average is not None else nullcontext():
            yield

    def _train_epoch(self, batches: Any, index: int, bar: Progress) -> tuple[float, float | None]:
        """Mean loss and accuracy of one pass."""
        steps = length(batches)
        bar.start(index, steps)
        precise = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=precise, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        seen, scored = 0, 0
        for number, (value, target) in enumerate(each(batches, self.device, labelled=self.methods.taught is None)):
            self._set_rate(index + (number / steps if steps else 0.0))
            loss, hits = self._step(value, target)
            count = rows(value) if target is None else len(target)
            total += loss * count
            seen += count
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

    def _step(self, value: Any, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One update; the batch's loss (without the penalty) and how many predictions were right."""
        methods, settings = self.methods, self.settings
        self.optimizer.zero_grad(set_to_none=True)
        if methods.augment is not None:
            value = methods.augment(value, self.generator)
        with self._autocast():
            loss, output = self._loss(value, target)
            penalty = methods.regularise(self.model) if methods.regularise else None
        self.scaler.scale(loss if penalty is None else loss + penalty).backward()
        self.scaler.unscale_(self.optimizer)
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        if methods.sparsity is not None:
            methods.sparsity.before_step(self.model)
        if methods.before_step is not None:
            methods.before_step(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if methods.sparsity is not None:
            methods.sparsity.after_step(self.model)
        if self.average is not None:
            self.average.update(self.model)
        return loss.detach(), None if target is None else correct(output, target)

    def _loss(self, value: Any, target: Tensor | None) -> tuple[Tensor, Any]:
        if self.methods.taught is not None:
            return self.methods.taught(value, target)
        assert target is not None
        output = call(self.model, value)
        return self.methods.loss(output, target), output

    def _autocast(self) -> Any:
        precision = self.settings.precision
        return torch.autocast(self.device.type, PRECISIONS[precision]) if precision else nullcontext()

    def finish(self) -> History:
        """Put back the best weights if that was asked for, else their average; drop the gradients, and sum up."""
        self.optimizer.zero_grad(set_to_none=True)
        restored = self.settings.restore_best and bool(self.best)
        if restored:
            store.put_state(self.model, self.best)
            if self.methods.sparsity is not None:
                self.methods.sparsity.put_state(self.best_sparsity)
        elif self.average is not None:
            store.put_state(self.model, self.average.values)
        stopped = self._stalled() and len(self.records) < self.settings.epochs
        return History(tuple(self.records), self._best(), restored, stopped)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        run = {**self._identity(), "history": History(tuple(self.records)).to_dict(),
               "scaler": self.scaler.state_dict()}
        parts = {
            "model": store.state_of(self.model),
            "best": self.best,
            "best sparsity": self.best_sparsity,
            "optimizer": store.optimizer_tensors(self.optimizer),
            "rng": rng_states(self.device, self.generator),
            "average": self.average.state() if self.average is not None else {},
            "sparsity": self._sparsity(),
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
        self.best, self.best_sparsity = parts.get("best", {}), parts.get("best sparsity", {})
        store.put_optimizer(self.optimizer, parts.get("optimizer", {}))
        self.scaler.load_state_dict(run["scaler"])
        if self.average is not None:
            self.average.put_state(parts["average"])
        if self.methods.sparsity is not None:
            self.methods.sparsity.put_state(parts.get("sparsity", {}))
        set_rng_states(self.device, self.generator, parts["rng"])

    def _sparsity(self) -> dict[str, Tensor]:
        sparsity = self.methods.sparsity
        return {} if sparsity is None else {name: value.clone() for name, value in sparsity.state().items()}

    def _identity(self) -> dict[str, Any]:
        if self.identity is None:
            self.identity = {"settings": self.settings.to_dict(), "start": store.fingerprint(self.model),
                             **self.methods.identity()}
        return self.identity


def _difference(key: str, found: Any, wanted: Any) -> str:
    if key == "start":
        return "began with other weights or another model; pass the model as it was then, or delete the file."
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return f"is of a run with another {key} ({found!r}, now {wanted!r}); use the same, or delete the file."
    pairs = [f"{k}={found.get(k)!r}, now {v!r}" for k, v in wanted.items() if found.get(k) != v]
    return f"is of a run with other {key} ({'; '.join(pairs)}); use the same, or delete the file."
