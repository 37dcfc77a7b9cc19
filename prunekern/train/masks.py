"""Fine-tuning under masks: single weights that were pruned stay zero, whatever the optimizer does."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.errors import InputError
from prunekern.prune.sparse import Masks
from prunekern.train.batching import Data
from prunekern.train.history import History
from prunekern.train.loop import fit
from prunekern.train.sparsity import Sparsity


class FixedMasks(Sparsity):
    """Keeps the weights that ``masks`` take away at zero: ``fit(model, data, sparsity=FixedMasks(masks))``.

    Their gradients are zero before each update, so that no momentum gathers; after it they are set to zero all the
    same, for momentum of an earlier training, and optimizers that move weights without gradients.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self.gone: list[tuple[nn.Parameter, Tensor]] = []

    def check(self, model: nn.Module) -> None:
        """Raises ModelError for another model's masks, InputError for a model that they are not imposed on yet."""
        self.gone = self.masks.pairs(model)
        if any(bool(parameter.detach()[gone].any()) for parameter, gone in self.gone):
            raise InputError("FixedMasks: the model still has weights that the masks take away; call "
                             "masks.impose(model) first, or train with prunekern.train.fine_tune.")

    def before_step(self, model: nn.Module) -> None:
        for parameter, gone in self._pairs(model):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0)

    def after_step(self, model: nn.Module) -> None:
        with torch.no_grad():
            for parameter, gone in self._pairs(model):
                parameter.masked_fill_(gone, 0)

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, mask in sorted(self.masks.kept.items()):
            digest.update(f"{name}|{tuple(mask.shape)}".encode() + mask.contiguous().numpy().tobytes())
        return {"method": type(self).__name__, "masks": digest.hexdigest()}

    def _pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Those of the model, kept: it may have moved to another device since ``check``, not in the middle of a run."""
        if not self.gone or any(parameter.device != gone.device for parameter, gone in self.gone):
            self.gone = self.masks.pairs(model)
        return self.gone


def fine_tune(model: nn.Module, masks: Masks, train: Data, validate: Data | None = None, **options: Any) -> History:
    """Impose ``masks`` on ``model``, train it **in place** with them kept, and return what happened.

    options: those of ``fit`` but ``sparsity``; epochs and lr are required. With ``checkpoint`` the same call on the
    same model and masks continues after a kill, masks and all. Raises what ``fit`` raises, and ModelError where the
    masks belong to another model.
    """
    masks.impose(model)
    return fit(model, train, validate, sparsity=FixedMasks(masks), **options)
