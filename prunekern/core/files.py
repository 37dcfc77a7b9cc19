"""Files that are whole or not there: written beside their place, flushed to disk, then moved into it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from prunekern.errors import ArtefactError

Content = bytes | Callable[[BinaryIO], object]


def write_atomically(path: str | os.PathLike[str], content: Content) -> Path:
    """Write ``content`` (bytes, or a function that writes to an open binary file) to ``path``, all or nothing.

    Raises OSError (full disk, no permission) leaving what was there.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


def write_bytes(path: str | os.PathLike[str], content: Content) -> Path:
    """The same for the library's own artefacts: makes the folder, and raises ArtefactError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return write_atomically(path, content)
    except OSError as error:
        raise ArtefactError(f"{path} could not be written: {error}. What was there before is still there; free some "
                            "space or choose another folder.") from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """``write_bytes`` for text, in UTF-8."""
    return write_bytes(path, text.encode())


def replace_all(staged: Mapping[Path, Path]) -> None:
    """Move finished files into place, all or none. staged: target -> the file to move there, in this order.

    On any failure what was there before is put back, and the OSError goes on. Both must be on one file system.
    """
    old: dict[Path, Path | None] = {}
    try:
        for target, source in staged.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            old[target] = _second_name(target)
            os.replace(source, target)
    except BaseException:
        for target, copy in old.items():
            with contextlib.suppress(FileNotFoundError):
                target.unlink() if copy is None else os.rename(copy, target)
        raise
    finally:
        for copy in old.values():
            if copy is not None:
                copy.unlink(missing_ok=True)


def _second_name(path: Path) -> Path | None:
    """Another name for the file at ``path``, under which it survives being replaced; None where there is none."""
    if not path.exists():
        return None
    spare = path.with_name(f".{path.name}.{os.getpid()}.old")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:                     # file systems without hard links
        shutil.copy2(path, spare)
    return spare


def cache_folder(name: str) -> Path:
    """Where fetched files are kept: `~/.cache/prunekern/<name>`, or the same below `$XDG_CACHE_HOME`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prunekern" / name
