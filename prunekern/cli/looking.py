"""``prunekern profile``, ``doctor`` and ``sensitivity``: a network as it is."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekern.analysis.sensitivity import Sensitivity
from prunekern.analysis.sensitivity import sensitivity as measure
from prunekern.cli.console import Out
from prunekern.cli.options import CRITERION, INPUT, JSON, QUIET, SEED, TARGET, THREADS, examples
from prunekern.cli.target import load_sets, load_target, need_example
from prunekern.cost import profile as profile_network
from prunekern.data import batches
from prunekern.doctor import diagnose
from prunekern.report import Figure, Report, Table

RATIOS = (0.1, 0.25, 0.5, 0.75)
BATCH = Annotated[int | None, typer.Option("--batch", min=1, metavar="N", help="Count at this batch size.")]
FULL = Annotated[bool, typer.Option("--full", help="Also operators without MACs or weights.")]
TRIAL = Annotated[bool, typer.Option("--trial/--no-trial", help="Cut half of everything on a copy, to see what would "
                                                                "come back.")]
DATASET = Annotated[str, typer.Option("--data", metavar="NAME", help="fashion-mnist, mnist or cifar10.")]
LAYERS = Annotated[list[str] | None, typer.Option("--layer", metavar="GLOB", help="Only these; repeatable.")]
RATIO = Annotated[list[float] | None, typer.Option("--ratio", metavar="SHARE", help="Share removed; repeatable.")]
SAMPLES = Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Validation images to measure on.")]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples(
        "prunekern profile models:resnet --input 1x3x224x224",
        "prunekern profile models:net --input 1x1x28x28 --batch 64 --json > costs.json"))(profile)
    app.command(epilog=examples(
        "prunekern doctor models:net --input 1x3x32x32",
        "prunekern doctor models:net --input 1x3x32x32 --json | jq '.blockers'"))(doctor)
    app.command(epilog=examples(
        "prunekern sensitivity models:net --data fashion-mnist",
        "prunekern sensitivity models:net --data cifar10 --layer 'layer3.*' --ratio 0.5 --ratio 0.9"))(sensitivity)


def profile(target: TARGET, input: INPUT = None,
            batch: BATCH = None, full: FULL = False,
            seed: SEED = 0, threads: THREADS = None, json: JSON = False, quiet: QUIET = False) -> None:
    """What a network costs, layer by layer: MACs, parameters, bytes, peak memory."""
    say = Out(json, quiet)
    loaded = load_target(target, input or (), say, seed=seed, threads=threads)
    found = profile_network(loaded.model, need_example(loaded), batch=batch)
    if json:
        print(found.to_json())
    else:
        found.show(full=full)


def doctor(target: TARGET, input: INPUT = None, trial: TRIAL = True, seed: SEED = 0, threads: THREADS = None,
           json: JSON = False, quiet: QUIET = False) -> None:
    """What can be pruned and what cannot, each blocker with its line of code."""
    say = Out(json, quiet)
    loaded = load_target(target, input or (), say, seed=seed, threads=threads)
    found = diagnose(loaded.model, need_example(loaded), trial=trial, seed=seed)
    say.result(found.report(), found.to_json())


def sensitivity(target: TARGET, data: DATASET, layer: LAYERS = None, ratio: RATIO = None, criterion: CRITERION = "l2",
                samples: SAMPLES = 1000, seed: SEED = 0, threads: THREADS = None, json: JSON = False,
                quiet: QUIET = False) -> None:
    """How much accuracy goes when one family of channels goes, the rest untouched."""
    say = Out(json, quiet)
    loaded = load_target(target, (), say, seed=seed, threads=threads)
    sets = load_sets(data, say, seed, samples)
    assert sets is not None
    with say.stages() as tell:
        found = measure(loaded.model, batches(*sets.validate, batch_size=250), criterion=criterion or "l2",
                        ratios=tuple(ratio or RATIOS), families=tuple(layer or ("*",)), seed=seed, tell=tell)
    say.result(_sensitivity_report(type(loaded.model).__name__, found, len(sets.validate[1])), found.to_json())


def _sensitivity_report(model: str, found: Sensitivity, samples: int) -> Report:
    ratios = sorted({point.ratio for point in found.points})
    rows = []
    for name in dict.fromkeys(point.family for point in found.points):
        mine = {point.ratio: point for point in found.points if point.family == name}
        rows.append((name, next(iter(mine.values())).channels,
                     *(f"{mine[r].accuracy:.2%}" if r in mine else None for r in ratios)))
    return Report(title=f"{model}: sensitivity", subtitle=f"accuracy on {samples} validation images with a share of "
                                                          "one family's channels removed",
                  headline=(Figure("accuracy, untouched", found.dense, "fraction"),),
                  tables=(Table("Families", ("family", "channels", *(f"-{r:.0%}" for r in ratios)), tuple(rows)),))
