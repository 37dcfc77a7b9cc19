"""The numbers of a training run, checked once, and the learning rate they give at any moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prunekern.errors import InputError, unknown

SCHEDULES: dict[str, Callable[[Settings, float], float]] = {
    "constant": lambda settings, share: 1.0,
    "cosine": lambda settings, share: 0.5 * (1 + math.cos(math.pi * share)),
    "step": lambda settings, share: settings.gamma ** sum(share >= at - 1e-9 for at in settings.milestones),
}
"""Learning-rate factors by the share of the run that is done, 0..1 (cosine: Loshchilov and Hutter 2017)."""

OPTIMIZERS: dict[str, Callable[[Settings, Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda settings, parameters: torch.optim.SGD(
        parameters,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    ),
    "adamw": lambda settings, parameters: torch.optim.AdamW(
        parameters, lr=settings.lr, weight_decay=settings.weight_decay
    ),
}


@dataclass(frozen=True)
class Settings:
    """See `fit` for the meaning of each. Raises `InputError` or `UnknownName` for what cannot work."""

    epochs: int
    lr: float
    optimizer: str
    momentum: float
    nesterov: bool
    weight_decay: float
    schedule: str
    milestones: tuple[float, ...]
    gamma: float
    batch_size: int
    patience: int | None
    restore_best: bool
    seed: int
    precision: str
    warmup: float
    clip: float | None
    label_smoothing: float
    ema: float | None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name, right, remedy in (
            ("epochs", self.epochs >= 0, "a whole number from 0"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1 epoch, or None"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("milestones", all(0 < at < 1 for at in self.milestones), "shares of the run between 0 and 1"),
            ("warmup", 0 <= self.warmup < max(self.epochs, 1), "epochs from 0 to fewer than there are"),
            ("clip", self.clip is None or 0 < self.clip < math.inf, "a positive norm, or None"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1 (0.999, say), or None"),
        ):
            if not right:
                raise InputError(f"fit: {name}={getattr(self, name)!r} must be {remedy}.")

    def rate(self, done: float) -> float:
        """The learning rate after `done` epochs (a fraction within an epoch counts).

        During `warmup` it climbs from a tenth in a straight line (Goyal et al. 2017); the schedule has the rest.
        """
        if done < self.warmup:
            return self.lr * (0.1 + 0.9 * done / self.warmup)
        return self.lr * SCHEDULES[self.schedule](self, (done - self.warmup) / max(self.epochs - self.warmup, 1e-9))

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        return OPTIMIZERS[self.optimizer](self, parameters)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, comparable with what `json.loads` gives back."""
        return {**asdict(self), "milestones": list(self.milestones)}
