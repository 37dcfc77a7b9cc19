"""Files that are whole or not there: written beside their place, flushed to disk, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Callable
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
