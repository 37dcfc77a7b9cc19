"""Options that several commands share, said once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from prunekern.backends import BACKENDS
from prunekern.errors import TargetError
from prunekern.prune.importance import CRITERIA, DROPNET

TARGET = Annotated[str, typer.Argument(
    metavar="TARGET", help="package.module:factory, or the folder of a saved result.")]
INPUT = Annotated[list[str] | None, typer.Option(
    "--input", metavar="SHAPE", help="Example input, one per argument: 1x3x224x224, 1x16:int64, mask=1x16:bool.")]
DATA = Annotated[str | None, typer.Option("--data", metavar="NAME", help="fashion-mnist, mnist or cifar10.")]
SEED = Annotated[int, typer.Option("--seed", metavar="N", help="Of everything that is drawn.")]
THREADS = Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="Threads of torch.")]
BACKEND = Annotated[str, typer.Option("--backend", metavar="NAME", help="Who runs the lowered network: auto or "
                                                        f"{', '.join(b.name for b in BACKENDS)}.")]
CRITERION = Annotated[str | None, typer.Option("--criterion", metavar="NAME", help="How important a channel is: "
                                        f"{', '.join(CRITERIA)}; several joined by + (l2+taylor); or dropnet: and one "
                                        f"of {', '.join(DROPNET)}.")]
JSON = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no remarks.")]


def examples(*lines: str) -> str:
    """An epilog of worked examples, one per line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


def pairs(option: str, texts: Sequence[str], remedy: str) -> dict[str, str]:
    """'conv1=0.5' -> {'conv1': '0.5'}. Raises TargetError."""
    found = {}
    for text in texts:
        name, sign, value = text.rpartition("=")
        if not sign or not name:
            raise TargetError(f"{option} {text!r} is not understood; write {remedy}.")
        found[name] = value
    return found


def number(option: str, text: str, kind: type[Any]) -> Any:
    """A number out of an option's value. Raises TargetError."""
    try:
        return kind(text)
    except ValueError as error:
        raise TargetError(f"{option}: {text!r} is not {'a whole number' if kind is int else 'a number'}.") from error
