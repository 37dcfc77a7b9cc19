"""What a long computation has measured, on disk as soon as it is known, so that a killed one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunekern.core.files import write_text
from prunekern.errors import ArtefactError

FORMAT, VERSION = "prunekern-search", 1


class Notebook:
    """Figures by name. path: a file, or None to keep nothing. identity: what the figures depend on.

    Raises ArtefactError where the file is damaged, or belongs to another search.
    """

    def __init__(self, path: Path | None, kind: str, identity: Mapping[str, Any]) -> None:
        self.path, self.kind, self.identity = path, kind, json.loads(json.dumps(dict(identity), default=str))
        self.known: dict[str, Any] = {}
        if path is not None and path.exists():
            self.known = self._read(path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            kind, own, known = (found["format"], found["version"], found["kind"]), found["identity"], found["figures"]
            if not isinstance(known, dict) or not isinstance(own, dict):
                raise TypeError("figures and identity must be objects")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {error}); delete it to start again."
                                ) from error
        if kind != (FORMAT, VERSION, self.kind):
            raise ArtefactError(f"{path} holds something else ({kind}), not {self.kind} of this version; choose "
                                "another folder.")
        wrong = [name for name, value in self.identity.items() if own.get(name) != value]
        if wrong:
            raise ArtefactError(f"{path} belongs to another search (other {', '.join(wrong)}); choose another folder, "
                                "or delete it to start again.")
        return known

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The figure of that name; made and written down where it is not known. It must be JSON."""
        if name not in self.known:
            self.known[name] = make()
            if self.path is not None:
                write_text(self.path, json.dumps({"format": FORMAT, "version": VERSION, "kind": self.kind,
                                                  "identity": self.identity, "figures": self.known}, indent=1))
        return self.known[name]
