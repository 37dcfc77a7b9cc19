"""``prunekern run`` and ``prunekern data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekern.cli.console import Out
from prunekern.cli.options import JSON, QUIET, SEED, THREADS, examples
from prunekern.errors import unknown
from prunekern.report import Report, Table

NAME = Annotated[str | None, typer.Argument(metavar="NAME", help="The study; left out, they are listed.")]
NAMES = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Datasets; by default all.")]
FULL = Annotated[bool, typer.Option("--full", help="The long form of the study.")]
OUT = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="For everything; the same call goes on.")]
FOLDER = Annotated[Path | None, typer.Option("--data", metavar="FOLDER", help="A folder that holds the data.")]
FETCH = Annotated[bool, typer.Option("--fetch", help="Fill the cache.")]
FORCE = Annotated[bool, typer.Option("--force", help="With --fetch: also what is there already.")]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples(
        "prunekern run fashion-mnist",
        "prunekern run fashion-mnist --full --out runs/full --threads 2"))(run)
    app.command(epilog=examples(
        "prunekern data",
        "prunekern data fashion-mnist --fetch"))(data)


def run(name: NAME = None, full: FULL = False, out: OUT = None, data: FOLDER = None, seed: SEED = 0,
        threads: THREADS = None, json: JSON = False, quiet: QUIET = False) -> None:
    """Run a study from data to report."""
    from prunekern.recipes import RECIPES
    say = Out(json, quiet)
    if name is None:
        rows = tuple((recipe.name, recipe.summary, recipe.folder) for recipe in RECIPES.values())
        report = Report(title="Studies", tables=(Table("prunekern run NAME", ("name", "what", "folder"), rows),))
        say.result(report, [dict(zip(("name", "summary", "folder"), row, strict=True)) for row in rows])
        return
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    recipe = RECIPES[name]
    outcome = recipe.run(out or recipe.folder, full, data, seed, threads, progress=not quiet)
    if json:
        say.result(outcome.report, outcome.to_json())
    else:
        outcome.show()
        say.remark(f"everything is in {outcome.folder}; the report is {outcome.saved.folder / 'index.html'}")


def data(names: NAMES = None, fetch: FETCH = False, force: FORCE = False, json: JSON = False,
         quiet: QUIET = False) -> None:
    """Where each dataset is, or would come from."""
    from prunekern.data import DATASETS, cache_folder, describe
    from prunekern.data import fetch as fetch_files
    say = Out(json, quiet)
    wanted = names or list(DATASETS)
    for name in wanted:
        if name not in DATASETS:
            raise unknown("dataset", name, DATASETS)
    if fetch:
        for name in wanted:
            with say.stages() as tell:
                tell(f"fetch {name}")
                fetch_files(name, force=force, progress=False)
    found = {name: describe(name) for name in wanted}
    tables = tuple(Table(name, ("place", "state"), tuple(rows)) for name, rows in found.items())
    say.result(Report(title="Datasets", subtitle="places are tried from the top; the first that is ready is used",
                      tables=tables),
               {name: {"cache": str(cache_folder(name)), "places": [{"place": p, "state": s} for p, s in rows]}
                for name, rows in found.items()})
