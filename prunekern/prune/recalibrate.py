"""Batch-norm statistics estimated again on calibration data, after channels are gone or weights have moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prunekern.errors import InputError
from prunekern.prune.rewrite import FunctionalBatchNorm


def recalibrate(model: nn.Module, batches: Iterable[Any], limit: int = 64) -> int:
    """Replace the running statistics of every batch norm by their average over ``batches``, in place.

    batches: inputs, or (input, target) pairs, of which the target is ignored; at most ``limit`` are used.
    Weights, and the train/eval mode of everything, stay as they are. Returns the number of norms.
    Raises InputError where there is no batch. Source: Wu and Johnson, Rethinking "Batch" in BatchNorm (2021).
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, FunctionalBatchNorm))
             and (isinstance(m, FunctionalBatchNorm) or m.track_running_stats)]
    modes, momenta = [m.training for m in norms], [m.momentum for m in norms]
    seen = 0
    try:
        for norm in norms:
            norm.training = True
        with torch.no_grad():
            for seen, batch in enumerate(batches, 1):
                for norm in norms:
                    norm.momentum = 1.0 / seen         # a cumulative average
                inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
                _call(model, inputs)
                if seen == limit:
                    break
    finally:
        for norm, mode, momentum in zip(norms, modes, momenta, strict=True):
            norm.training, norm.momentum = mode, momentum
    if norms and not seen:
        raise InputError("recalibrate: there is no calibration batch; pass at least one.")
    return len(norms)


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, dict):
        model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        model(*inputs)
    else:
        model(inputs)
