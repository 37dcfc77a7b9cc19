"""Early weights of a training run, written down on the way."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from prunekern.core.files import write_bytes
from prunekern.errors import ArtefactError, InputError
from prunekern.train.checkpoint import state_of


class Snapshot:
    """For ``fit(after_epoch=...)``: writes the weights after so many epochs to a file, for rewinding to them.

    Source: Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis (ICML 2020).
    """

    def __init__(self, path: str | os.PathLike[str], epochs: int) -> None:
        if epochs < 1:
            raise InputError(f"Snapshot: epochs={epochs} must be at least 1; before that, keep a copy of the model.")
        self.path, self.epochs = Path(path), epochs

    def __call__(self, model: nn.Module, epoch: int) -> None:
        if epoch + 1 == self.epochs:
            data = {name: value.cpu().contiguous() for name, value in state_of(model).items()}
            write_bytes(self.path, save(data))

    def state(self) -> dict[str, Tensor]:
        """The weights, as a state dict on the CPU. Raises ArtefactError where they were not written, or damaged."""
        if not self.path.exists():
            raise ArtefactError(f"{self.path}: no such file; train for at least {self.epochs} epochs with this "
                                "snapshot as after_epoch.")
        try:
            return load(self.path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{self.path} is damaged ({error}); train again.") from error
