"""A small problem, a small network, and `fit` with settings that suit them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekern.train import History, fit


def blobs(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes of points that a small network can tell apart: `[count, 8]`, `[count]`."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(count) % 3
    return centres[labels] + torch.randn(count, 8, generator=generator), labels


def network(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def train(model: nn.Module, data: Any = None, validate: Any = None, **options: Any) -> History:
    settings = {"epochs": 3, "lr": 0.05, "batch_size": 16, "progress": False} | options
    return fit(model, blobs() if data is None else data, validate, **settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(u, v) for (x, u), (y, v) in pairs)


def figures(history: History) -> list[tuple]:
    """Everything of a history but the wall times."""
    return [(e.epoch, e.loss, e.train_accuracy, e.validation_loss, e.validation_accuracy, e.lr) for e in history]
