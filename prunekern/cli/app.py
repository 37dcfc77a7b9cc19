"""The Typer application: which commands there are, and how errors end them."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Annotated

import typer

from prunekern.cli import compressing, looking, measuring, running, searching, sparsifying
from prunekern.cli.console import complain, hear_warnings
from prunekern.errors import PrunekernError

TRACEBACK = "--traceback"

app = typer.Typer(
    name="prunekern", no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="TARGET is [bold]package.module:factory[/bold], a function without arguments that returns the model or "
           "(model, example_inputs), imported from the current folder; or a folder that [bold]--out[/bold] or "
           "Result.save wrote.\n\n"
           "Exit codes: 0 done, 1 refused (the reason is on standard error), 2 the command line is wrong.")


def _version(wanted: bool) -> None:
    if wanted:
        from prunekern.summary import version
        print(f"prunekern {version()}")
        raise typer.Exit


@app.callback()
def about(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="Print the version and exit.")] = False,
          trace: Annotated[bool, typer.Option(TRACEBACK, help="Show the stack trace of errors.")] = False) -> None:
    """Shrink trained PyTorch networks, prove every cut, and lower the result to GEMMs."""


for group in (running, compressing, searching, looking, measuring, sparsifying):
    group.add_to(app)


def run(arguments: list[str]) -> int:
    """Run one command line; the exit code."""
    wanted = [a for a in arguments if a != TRACEBACK]
    try:
        with warnings.catch_warnings():
            hear_warnings()
            app(wanted, prog_name="prunekern")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except PrunekernError as error:
        complain(error, "--json" in arguments)
        if len(wanted) < len(arguments):
            traceback.print_exception(error, file=sys.stderr)
        return 1
    return 0
