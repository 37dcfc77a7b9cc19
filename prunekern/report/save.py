"""Writes a report into a folder, all files or none."""

from __future__ import annotations

import csv
import io
import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prunekern.errors import ArtefactError
from prunekern.report import html, plots
from prunekern.report.model import Report

NAMES = ("report.json", "triplets.csv", *plots.NAMES, "index.html")
"""Every file a report can consist of; index.html goes last, so that it never speaks of missing files."""


@dataclass(frozen=True)
class Saved:
    """What `save` wrote, and what it could not write and why."""

    folder: Path
    files: tuple[Path, ...]
    skipped: tuple[str, ...] = ()


def save(report: Report, folder: str | Path) -> Saved:
    """Writes report.json, index.html, triplets.csv and the PNGs there is data for into `folder`.

    Everything is rendered and staged first and then moved into place; on any failure what was there before
    stays. Files of an earlier report that this one has no counterpart for are removed. Where jinja2 or
    matplotlib is missing, the rest is written, `skipped` says what to install, and a warning repeats it.
    Raises `ArtefactError` when the folder cannot be written.
    """
    files: dict[str, bytes] = {"report.json": report.to_json().encode()}
    if report.triplets:
        files["triplets.csv"] = triplets_csv(report).encode()
    skipped = []
    try:
        files |= plots.render(report)
    except ImportError as problem:
        skipped.append(_missing("the PNGs were", "matplotlib", problem))
    try:
        files["index.html"] = html.render(report).encode()
    except ImportError as problem:
        skipped.append(_missing("index.html was", "jinja2", problem))
    target = Path(folder)
    ordered = {name: files[name] for name in NAMES if name in files}
    try:
        target.mkdir(parents=True, exist_ok=True)
        _replace_all(target, ordered, stale=[name for name in NAMES if name not in files])
    except OSError as problem:
        raise ArtefactError(
            f"report folder {str(target)!r} could not be written ({problem}); what was there is unchanged. "
            "Free some space or pass another folder."
        ) from problem
    for message in skipped:
        warnings.warn(message, stacklevel=2)
    return Saved(target, tuple(target / name for name in ordered), tuple(skipped))


def _missing(what: str, package: str, problem: ImportError) -> str:
    return (
        f"{what} not written: {package} cannot be imported ({problem}). "
        "Install it with: pip install 'prunekern[report]'"
    )


def triplets_csv(report: Report) -> str:
    """All pruning steps at full precision: accuracies as fractions, drops in points."""
    columns = (
        *("step", "layer", "channels_left", "before", "after_pruning", "after_retraining", "drop"),
        *("incremental_drop", "macs", "accepted", "test_accuracy", "detail"),
    )
    points = {"drop": "drop_points", "incremental_drop": "incremental_drop_points"}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(points.get(column, column) for column in columns)
    writer.writerows([getattr(step, column) for column in columns] for step in report.triplets)
    return text.getvalue()


def _stage(folder: Path, name: str, data: bytes) -> Path:
    """Writes `data` under a name nobody reads, on disk for good, with the permissions of any new file."""
    path = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _keep(path: Path) -> Path | None:
    """A second name for the file at `path`, so that it can be put back."""
    if not path.exists():
        return None
    backup = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    try:
        os.link(path, backup)
    except OSError:  # file systems without hard links
        shutil.copy2(path, backup)
    return backup


def _replace_all(folder: Path, files: Mapping[str, bytes], stale: list[str]) -> None:
    staged: dict[Path, Path] = {}
    backups: dict[Path, Path | None] = {}
    try:
        for name, data in files.items():
            staged[folder / name] = _stage(folder, name, data)
        for path, new in staged.items():
            backups[path] = _keep(path)
            os.replace(new, path)
        for path in (folder / name for name in stale):
            backups[path] = _keep(path)
            path.unlink(missing_ok=True)
    except BaseException:
        for path, backup in backups.items():
            if backup is not None:
                os.replace(backup, path)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        for leftover in (*staged.values(), *backups.values()):
            if leftover is not None:
                leftover.unlink(missing_ok=True)
