"""``prunekern weights``, ``scan``, ``sparsify`` and ``compare``: single weights, as against whole channels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from prunekern.analysis.sparsity import SPARSITIES, ChosenSparsities, sparsity_scan
from prunekern.analysis.sparsity import choose as choose_sparsities
from prunekern.analysis.weights import weights_of
from prunekern.cli.console import Out
from prunekern.cli.options import BACKEND, DATA, INPUT, JSON, QUIET, SEED, TARGET, THREADS, examples, number, pairs
from prunekern.cli.target import Sets, load_sets, load_target
from prunekern.compare import compare as compare_networks
from prunekern.errors import TargetError
from prunekern.prune.sparse import Masks, magnitude, masked, nm
from prunekern.prune.sparse_file import save_sparse, sizes
from prunekern.report import Figure, Report, Table
from prunekern.summary import environment
from prunekern.train import accuracy as accuracy_of
from prunekern.train.masks import fine_tune

WHICH, TRAINING = "Which weights go", "Data and training"
SPARSITY = Annotated[float | None, typer.Option("--sparsity", metavar="SHARE", rich_help_panel=WHICH,
                                                help="Of the weights this share, e.g. 0.9.")]
SHARES = Annotated[list[float] | None, typer.Option("--sparsity", metavar="SHARE", help="Of the weights; repeatable.")]
LAYER = Annotated[list[str] | None, typer.Option("--layer", metavar="GLOB=SHARE", rich_help_panel=WHICH,
                                                 help="Of these layers' weights this share; repeatable.")]
LAYERS = Annotated[list[str] | None, typer.Option("--layer", metavar="GLOB", help="Only these; repeatable.")]
PATTERN = Annotated[str | None, typer.Option("--nm", metavar="N:M", rich_help_panel=WHICH,
                                             help="N of every M weights stay, e.g. 2:4.")]
MAX_DROP = Annotated[float | None, typer.Option(
    "--max-drop", metavar="POINTS", rich_help_panel=WHICH,
    help="As many as this many points of accuracy allow before training, by a scan; needs --data.")]
SCOPE = Annotated[str, typer.Option("--scope", metavar="HOW", rich_help_panel=WHICH,
                                    help="layer: the share of every layer; global: the smallest anywhere.")]
IGNORE = Annotated[list[str] | None, typer.Option("--ignore", metavar="GLOB", help="Layers left alone; repeatable.")]
EPOCHS = Annotated[int, typer.Option("--epochs", min=0, metavar="N", rich_help_panel=TRAINING,
                                     help="Of training with the zeros kept; 0: none.")]
LR = Annotated[float, typer.Option("--lr", metavar="RATE", rich_help_panel=TRAINING, help="Learning rate.")]
SAMPLES = Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Validation images to measure on.")]
CHECKPOINT = Annotated[Path | None, typer.Option("--checkpoint", metavar="FILE", help="Where to go on after a kill.")]
CHECKPOINTS = Annotated[Path | None, typer.Option("--checkpoint", metavar="FOLDER",
                                                  help="Where to go on after a kill.")]
DATASET = Annotated[str, typer.Option("--data", metavar="NAME", help="fashion-mnist, mnist or cifar10.")]
OUT = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="For the report: HTML, JSON, PNG.")]
RESULT = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="For weights.safetensors and report/.")]
MACS = Annotated[list[float] | None, typer.Option("--macs", metavar="SHARE", help="Of the MACs, as channels; "
                                                                                 "repeatable.")]
FILE = "weights.safetensors"


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples(
        "prunekern weights models:net --out report",
        "prunekern weights models:net --sparsity 0.9 --scope global"))(weights)
    app.command(epilog=examples(
        "prunekern scan models:net --data fashion-mnist --out report",
        "prunekern scan models:net --data cifar10 --layer 'layer3.*' --sparsity 0.9 --checkpoint scan.json"))(scan)
    app.command(epilog=examples(
        "prunekern sparsify models:net --sparsity 0.9 --data fashion-mnist --epochs 3 --out sparse",
        "prunekern sparsify models:net --layer 'fc*=0.95' --layer 'conv*=0.5' --out sparse",
        "prunekern sparsify models:net --nm 2:4 --out sparse"))(sparsify)
    app.command(epilog=examples(
        "prunekern compare models:net --data fashion-mnist --epochs 2 --out report",
        "prunekern compare models:net --data cifar10 --macs 0.5 --sparsity 0.9 --checkpoint ck"))(compare)


def weights(target: TARGET, sparsity: SPARSITY = None, scope: SCOPE = "layer", layer: LAYERS = None,
            ignore: IGNORE = None, out: OUT = None, seed: SEED = 0, threads: THREADS = None, json: JSON = False,
            quiet: QUIET = False) -> None:
    """How many weights are where, and what values they have; with --sparsity also what pruning leaves of them."""
    say = Out(json, quiet)
    model = load_target(target, (), say, seed=seed, threads=threads).model
    chosen: dict[str, Any] = {"layers": tuple(layer or ("*",)), "ignore": tuple(ignore or ())}
    after = None if sparsity is None else magnitude(model, sparsity, scope=scope, **chosen)  # type: ignore[arg-type]
    found = weights_of(model, after, **chosen)
    report = found.report(f"{type(model).__name__}: weights")
    say.result(_saved(report, out, say), {**found.to_json(), "saved": str(out) if out else None}, full=False)


def scan(target: TARGET, data: DATASET, layer: LAYERS = None, ignore: IGNORE = None, sparsity: SHARES = None,
         samples: SAMPLES = 1000, checkpoint: CHECKPOINT = None, out: OUT = None, seed: SEED = 0,
         threads: THREADS = None, json: JSON = False, quiet: QUIET = False) -> None:
    """How much accuracy goes when the smallest weights of one layer go, the rest untouched."""
    say = Out(json, quiet)
    model = load_target(target, (), say, seed=seed, threads=threads).model
    sets = _sets(data, say, seed, samples)
    with say.stages() as tell:
        found = sparsity_scan(model, sets.validate, sparsities=tuple(sparsity or SPARSITIES),
                              layers=tuple(layer or ("*",)), ignore=tuple(ignore or ()), checkpoint=checkpoint,
                              tell=tell)
    report = found.report(f"{type(model).__name__}: sensitivity to sparsity",
                          f" on {len(sets.validate[1])} validation images")
    say.result(_saved(report, out, say), {**found.to_json(), "saved": str(out) if out else None})


def sparsify(target: TARGET, sparsity: SPARSITY = None, layer: LAYER = None, pattern: PATTERN = None,
             max_drop: MAX_DROP = None, scope: SCOPE = "layer", ignore: IGNORE = None, data: DATA = None,
             epochs: EPOCHS = 1, lr: LR = 0.01, out: RESULT = None, checkpoint: CHECKPOINTS = None, seed: SEED = 0,
             threads: THREADS = None, json: JSON = False, quiet: QUIET = False) -> None:
    """Set single weights to zero, train with the zeros kept, and write the file that they make small.

    The network computes as much as before: for less work prune channels, with prunekern compress.
    """
    say = Out(json, quiet)
    shares = {glob: number("--layer", share, float)
              for glob, share in pairs("--layer", layer or (), "GLOB=SHARE, e.g. 'fc*=0.9'").items()}
    asked = [name for name, value in (("--sparsity", sparsity), ("--layer", shares or None), ("--nm", pattern),
                                      ("--max-drop", max_drop)) if value is not None]
    if len(asked) != 1:
        raise TargetError(f"{' and '.join(asked) or 'no target'} given; pass one of --sparsity, --layer, --nm, "
                          "--max-drop.")
    if max_drop is not None and data is None:
        raise TargetError("--max-drop needs --data to measure on; add --data NAME.")
    model = load_target(target, (), say, seed=seed, threads=threads).model
    sets = None if data is None else _sets(data, say, seed, None)
    chosen: ChosenSparsities | None = None
    with say.stages() as tell:
        if max_drop is not None and sets is not None:
            place = None if checkpoint is None else checkpoint / "scan.json"
            found = sparsity_scan(model, sets.validate, ignore=tuple(ignore or ()), checkpoint=place, tell=tell)
            chosen = choose_sparsities(model, found, sets.validate, max_drop, tell=tell)
            masks = chosen.masks
        elif pattern is not None:
            masks = nm(model, *_pattern(pattern), ignore=tuple(ignore or ()))
        else:
            masks = magnitude(model, shares or sparsity or 0.0, scope=scope,  # type: ignore[arg-type]
                              ignore=tuple(ignore or ()))
        made = masked(model, masks)
        figures = _measured(model, made, masks, sets, {"epochs": epochs, "lr": lr, "seed": seed}, checkpoint, say, tell)
        disk = sizes(made)
        if out is not None:
            save_sparse(made, out / FILE)
    report = _sparse_report(model, made, masks, figures, disk)
    if out is not None:
        say.remark(f"load it with model.load_state_dict(prunekern.prune.sparse_file.load_sparse('{out / FILE}'))")
    say.result(_saved(report, None if out is None else out / "report", say),
               {"layers": {name: {"weights": mask.numel(), "removed": masks.removed()[name]}
                           for name, mask in masks.kept.items()},
                "sparsity": masks.sparsity, "notes": list(masks.notes), "accuracies": figures, "bytes": vars(disk),
                "tried": [] if chosen is None else chosen.tried, "saved": str(out / FILE) if out else None}, full=False)


def _measured(model: nn.Module, made: nn.Module, masks: Masks, sets: Sets | None, options: dict[str, Any],
              checkpoint: Path | None, say: Out, tell: Any) -> dict[str, float]:
    """Accuracies, with a training in between."""
    if sets is None:
        return {}
    tell("measure")
    found = {"validation, original": accuracy_of(model, sets.validate),
             "validation, pruned": accuracy_of(made, sets.validate)}
    if options["epochs"]:
        tell("train")
        place = None if checkpoint is None else checkpoint / "fit.ckpt"
        fine_tune(made, masks, sets.train, checkpoint=place, progress=say.live, **options)
        found["validation, trained"] = accuracy_of(made, sets.validate)
    tell("measure on test images")
    return {**found, "test, original": accuracy_of(model, sets.test), "test, sparse": accuracy_of(made, sets.test)}


def _sparse_report(model: nn.Module, made: nn.Module, masks: Masks, figures: dict[str, float], disk: Any) -> Report:
    headline = [Figure("zeros", masks.sparsity, "fraction", f"{masks.zeros:,} of {masks.weights:,} weights"),
                Figure("on disk", disk.sparse, "bytes", f"{disk.sparse / disk.dense:.1%} of {disk.dense:,}; gzip: "
                                                        f"{disk.gzip:,}")]
    headline += [Figure(f"accuracy, {name}", value, "fraction") for name, value in figures.items()]
    rows = tuple((name, mask.numel(), masks.removed()[name], f"{1 - float(mask.double().mean()):.2%}")
                 for name, mask in masks.kept.items())
    return Report(title=f"{type(model).__name__}, sparse",
                  subtitle="single weights at zero; as much to compute as before", headline=tuple(headline),
                  weights=tuple(weights_of(model, made).rows()),
                  tables=(Table("Layers", ("layer", "weights", "gone", "sparsity"), rows),), notes=masks.notes,
                  environment=environment())


def compare(target: TARGET, data: DATASET, macs: MACS = None, sparsity: SHARES = None, scope: SCOPE = "layer",
            input: INPUT = None, epochs: EPOCHS = 1, lr: LR = 0.01, backend: BACKEND = "auto", out: OUT = None,
            checkpoint: CHECKPOINTS = None, seed: SEED = 0, threads: THREADS = None, json: JSON = False,
            quiet: QUIET = False) -> None:
    """Channels against single weights: accuracy, MACs, bytes and time of both, trained and measured alike."""
    say = Out(json, quiet)
    loaded = load_target(target, input or (), say, seed=seed, threads=threads)
    sets = _sets(data, say, seed, None)
    with say.stages() as tell:
        found = compare_networks(loaded.model, loaded.example, validate=sets.validate, test=sets.test,
                                 train=sets.train if epochs else None, shares=tuple(macs or (0.5, 0.25)),
                                 sparsities=tuple(sparsity or (0.5, 0.9)), scope=scope,  # type: ignore[arg-type]
                                 fit={"epochs": epochs, "lr": lr, "progress": say.live}, backend=backend,
                                 checkpoint=checkpoint, seed=seed, tell=tell)
    say.result(_saved(found.report(), out, say), {**found.to_json(), "saved": str(out) if out else None})


def _sets(name: str, say: Out, seed: int, limit: int | None) -> Sets:
    sets = load_sets(name, say, seed, limit)
    assert sets is not None
    return sets


def _pattern(text: str) -> tuple[int, int]:
    n, sign, m = text.partition(":")
    if not sign:
        raise TargetError(f"--nm {text!r} is not understood; write N:M, e.g. 2:4.")
    return number("--nm", n, int), number("--nm", m, int)


def _saved(report: Report, folder: Path | None, say: Out) -> Report:
    if folder is not None:
        say.remark(f"the report is {report.save(folder).folder / 'index.html'}")
    return report
