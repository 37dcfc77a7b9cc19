"""Loss and accuracy curves of a training run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from prunekern.core.files import write_atomically
from prunekern.errors import InputError
from prunekern.train.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, VALIDATION = "#3d6bb3", "#c8553d"


def plot_history(history: History, path: str | os.PathLike[str]) -> Path:
    """`draw`, written to `path` as PNG; needs no display and leaves matplotlib's global state alone."""
    figure = draw(history)
    return write_atomically(path, lambda file: figure.savefig(file, format="png"))


def draw(history: History) -> Figure:
    """A figure of two panels, loss and accuracy (%) against epochs, training and validation.

    Raises `InputError` if there is no epoch to draw or matplotlib is not installed.
    """
    if not history.epochs:
        raise InputError("History.plot: there is no epoch to draw; train for at least one.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InputError("History.plot needs matplotlib: pip install 'prunekern[report]'.") from error
    numbers = [epoch.epoch + 1 for epoch in history.epochs]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, title, train, validation in (
        (panels[0], "Loss", "loss", "validation_loss"),
        (panels[1], "Accuracy (%)", "train_accuracy", "validation_accuracy"),
    ):
        scale = 100 if title.startswith("Accuracy") else 1
        for field, label, colour in ((train, "training", TRAIN), (validation, "validation", VALIDATION)):
            points = [(x, getattr(epoch, field)) for x, epoch in zip(numbers, history.epochs, strict=True)]
            drawn = [(x, y * scale) for x, y in points if y is not None]
            if drawn:
                panel.plot(*zip(*drawn, strict=True), marker="o", markersize=3, color=colour, label=label)
        if history.restored and history.best is not None:
            panel.axvline(numbers[history.best], color="grey", linestyle=":", label="weights kept")
        panel.set(title=title, xlabel="epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.25)
        if panel.lines:
            panel.legend(frameon=False)
    return figure
