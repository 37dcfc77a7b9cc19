"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from prunekern.errors import ArtefactError


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a temporary file in the same folder, then put it in place in one step.

    Raises ArtefactError (disk full, no permission, ...); what was at ``path`` before is then still there.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        fill(Path(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ArtefactError(f"{path} could not be written: {error}. Nothing that was there before is lost; "
                            "free some space or choose another folder.") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text))


def write_bytes(path: Path, data: bytes) -> None:
    write(path, lambda temporary: temporary.write_bytes(data))
