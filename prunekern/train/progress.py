"""The progress bar of a training run, on standard error, where rich is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prunekern.train.history import Epoch


class Progress:
    """Does nothing; the base of what is shown."""

    def start(self, epoch: int, steps: int | None) -> None:
        """A new epoch (from 0) of `steps` batches begins."""

    def step(self) -> None:
        """One batch is done."""

    def end(self, epoch: Epoch) -> None:
        """The epoch is over."""


@contextmanager
def shown(epochs: int, enabled: bool) -> Iterator[Progress]:
    """A bar that shows epoch, batch and the latest figures, and goes away at the end."""
    try:
        from rich import progress as rich_progress
        from rich.console import Console
    except ImportError:
        enabled = False
    if not enabled or epochs == 0:
        yield Progress()
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("{task.fields[last]}"),
    )

    class Bar(Progress):
        def start(self, epoch: int, steps: int | None) -> None:
            bar.reset(task, total=steps, description=f"epoch {epoch + 1}/{epochs}")

        def step(self) -> None:
            bar.advance(task)

        def end(self, epoch: Epoch) -> None:
            said = [f"loss {epoch.loss:.4f}"]
            for label, share in (("train", epoch.train_accuracy), ("validation", epoch.validation_accuracy)):
                if share is not None:
                    said.append(f"{label} {share:.2%}")
            bar.update(task, last=", ".join(said))

    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=None, last="")
        yield Bar()
