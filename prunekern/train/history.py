"""What a training run did, epoch by epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunekern.core.files import write_atomically
from prunekern.errors import ArtefactError


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data.

    `loss`: mean over the training samples. `train_accuracy`: share right while the weights change.
    `validation_*`: after the epoch; None without validation data. Accuracies are None where targets are not
    class indices. `lr`: the rate at its start. `seconds`: wall time, validation included.
    """

    epoch: int
    loss: float
    train_accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    lr: float
    seconds: float


@dataclass(frozen=True)
class History:
    """All epochs of a run.

    `best`: index of the epoch with the highest validation accuracy (None without one). `restored`: the model
    was put back to it. `stopped_early`: `patience` ran out.
    """

    epochs: tuple[Epoch, ...]
    best: int | None = None
    restored: bool = False
    stopped_early: bool = False

    def __len__(self) -> int:
        return len(self.epochs)

    def __iter__(self) -> Iterator[Epoch]:
        return iter(self.epochs)

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def final(self) -> Epoch | None:
        """The epoch whose weights the model has now: the best one if it was restored, else the last."""
        if not self.epochs:
            return None
        return self.epochs[self.best] if self.restored and self.best is not None else self.epochs[-1]

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """The inverse of `to_dict`. Raises `ArtefactError` if the fields are not those of a history."""
        try:
            epochs = tuple(Epoch(**epoch) for epoch in data["epochs"])
            return cls(epochs, data["best"], data["restored"], data["stopped_early"])
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"not a training history: {error}. Train again.") from error

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The history as JSON text, also written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            write_atomically(path, text.encode())
        return text

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Loss and accuracy curves as a PNG at `path`. Needs matplotlib."""
        from prunekern.train.curves import plot_history

        return plot_history(self, path)
