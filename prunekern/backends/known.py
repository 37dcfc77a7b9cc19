"""The backends there are, best first."""

from __future__ import annotations

from prunekern.backends.base import Backend, Choice, choose
from prunekern.backends.cpu import CpuBackend
from prunekern.backends.reference import ReferenceBackend

BACKENDS: tuple[Backend, ...] = (CpuBackend(), ReferenceBackend())


def select(name: str, device: str | None = None) -> Choice:
    """See ``base.choose``; without a device, one that the named backend runs on."""
    if device is None:
        device = next((b.devices[0] for b in BACKENDS if b.name == name), "cpu")
    return choose(name, BACKENDS, device)
