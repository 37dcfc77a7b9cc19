"""The backends there are, best first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prunekern.backends.base import Backend, Choice, choose, log
from prunekern.backends.cpu import CpuBackend
from prunekern.backends.cuda import CudaBackend
from prunekern.backends.reference import ReferenceBackend
from prunekern.backends.triton import TritonBackend
from prunekern.errors import UnknownName

BACKENDS: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), CudaBackend(), ReferenceBackend())


def select(name: str, device: str | None = None, options: Mapping[str, Any] | None = None) -> Choice:
    """See ``base.choose``; without a device, one that the named backend runs on. An option that the backend does not
    have raises UnknownName where the backend was named, and is passed over where it was chosen."""
    if device is None:
        device = next((b.devices[0] for b in BACKENDS if b.name == name), "cpu")
    choice = choose(name, BACKENDS, device)
    if not options:
        return choice
    try:
        return replace(choice, backend=choice.backend.configured(**options))
    except UnknownName as error:
        if name != "auto":
            raise
        log.info("backend %s runs without %s: %s", choice.backend.name, ", ".join(options), error)
        return choice
