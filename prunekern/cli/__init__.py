"""The command line: ``prunekern --help``. ``main`` is the entry point."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 where prunekern refuses (the reason is on standard error, no
    stack trace), 2 for a command line that is not understood."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from prunekern.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f"error: the command line needs {error.name}: pip install typer rich. The library itself does not.",
              file=sys.stderr)
        return 1
    return run(given)
