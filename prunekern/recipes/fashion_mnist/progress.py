"""What a running study shows: bars where standard error is a terminal and rich is there, else a line a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Hook = Callable[[Any], None]


class Teller:
    """Says a line a step; the base of what draws."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled, self.start = enabled, time.perf_counter()

    def say(self, text: str) -> None:
        """Something worth a line."""
        if self.enabled:
            print(f"[{clock(time.perf_counter() - self.start)}] {text}", file=sys.stderr, flush=True)

    def doing(self, text: str, done: int, most: int) -> None:
        """Now at ``text``: the step after ``done`` of at most ``most``."""

    def training(self, updates: int) -> Hook:
        """A training of so many updates begins; call the hook at each."""
        return lambda _: None


def clock(seconds: float) -> str:
    """75 -> 01:15"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"


@contextmanager
def teller(enabled: bool) -> Iterator[Teller]:
    """Bars on a terminal, plain lines elsewhere, nothing where not enabled."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        yield Teller(enabled)
        return
    console = Console(stderr=True, highlight=False)
    if not enabled or not console.is_terminal:
        yield Teller(enabled)
        return
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
               progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=console, transient=True) as bars:
        overall = bars.add_task("study", total=None)
        batches = bars.add_task("training", total=1, visible=False)

        class Bars(Teller):
            def say(self, text: str) -> None:
                bars.print(f"[{clock(time.perf_counter() - self.start)}] {text}", markup=False)

            def doing(self, text: str, done: int, most: int) -> None:
                bars.update(overall, description=text, completed=done, total=most)
                bars.update(batches, visible=False)

            def training(self, updates: int) -> Hook:
                bars.reset(batches, total=updates, visible=True)
                return lambda _: bars.advance(batches)

        yield Bars()
