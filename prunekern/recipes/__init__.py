"""Studies that can be run: ``RECIPES`` finds them by name; the command line is ``prunekern run NAME``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from prunekern.recipes import fashion_mnist
from prunekern.report import Report, Saved


class Outcome(Protocol):
    """What a recipe gives back."""

    @property
    def folder(self) -> Path: ...

    @property
    def report(self) -> Report: ...

    @property
    def saved(self) -> Saved: ...

    def show(self, *, full: bool = False, file: TextIO | None = None) -> None:
        """Print the report."""

    def to_json(self) -> dict[str, Any]:
        """The main figures, JSON-able."""


class Run(Protocol):
    """out: the folder everything goes to; the same call continues there. full: the long form. data: a folder that
    holds the data. threads: of torch. progress: bars on a terminal, else a line a step, on standard error."""

    def __call__(self, out: str | Path = ..., full: bool = ..., data: Any = ..., seed: int = ...,
                 threads: int | None = ..., *, progress: bool = ...) -> Outcome: ...


@dataclass(frozen=True)
class Recipe:
    """A runnable study. summary: one line of help; folder: where it writes by default."""

    name: str
    summary: str
    run: Run
    folder: str


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    Recipe("fashion-mnist", "train, prune channel by channel, prove, choose, lower, measure and report",
           fashion_mnist.run, "runs/fashion-mnist"),
)}

__all__ = ["RECIPES", "Outcome", "Recipe", "Run"]
