"""What a backend is, and how one is chosen. Backends see tensors and Steps, never the traced graph.

A new backend is one module with a class of this shape and one line in ``backends/__init__.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prunekern.core.graph import Shape
from prunekern.core.program import Program, Step
from prunekern.errors import BackendUnavailable, unknown
from prunekern.lower.arena import Arena

log = logging.getLogger("prunekern")

Observe = Callable[[Step, tuple[Tensor, ...], float], None]      # a step, its outputs, its seconds


@dataclass(frozen=True)
class Signature:
    """What a Placement is made for: the shapes of the Program's input slots, and where they are."""

    shapes: tuple[Shape, ...]
    batch: int
    device: torch.device


class Placement(Protocol):
    """A Program laid out for one Signature, ready to run.

    algorithms: step name -> the algorithm it runs by.
    arena:      where the values live.
    """

    @property
    def program(self) -> Program: ...

    @property
    def signature(self) -> Signature: ...

    @property
    def algorithms(self) -> Mapping[str, str]: ...

    @property
    def arena(self) -> Arena: ...

    @property
    def rows(self) -> Mapping[str, str]:
        """Step name -> its row of ``lower/tolerance.py``, where that is not "direct"."""

    def run(self, inputs: Sequence[Tensor], observe: Observe | None = None) -> list[Tensor]:
        """The values of ``program.output_slots``, freshly allocated; ``inputs`` are only read.

        observe: called after every step with its outputs (in torch's shape and order; valid during the call
        only; none where they never are in memory) and its time; the device is synchronised around each step then.
        """

    def run_into(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """The same, into contiguous tensors of the right shapes."""

    def direct(self) -> Callable[..., Tensor | None] | None:
        """A call ``(x, out=None)`` past all checks that gives None for what it is not made for; None: there is none."""


class Gather:
    """An Observe that takes the parts of a batch, and hands on what a whole batch would have shown."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._values: dict[str, list[tuple[Tensor, ...]]] = {}

    def note(self, step: Step, outputs: tuple[Tensor, ...], seconds: float) -> None:
        """One part, in the order of the batch."""
        self._seconds[step.name] = self._seconds.get(step.name, 0.0) + seconds
        self._values.setdefault(step.name, []).append(tuple(value.clone() for value in outputs))

    def deliver(self, steps: Sequence[Step], observe: Observe) -> None:
        """Every step once: values of samples side by side, others once; none where a part did not have them."""
        for step in steps:
            found = self._values[step.name]
            there = all(len(each) == len(step.outputs) for each in found)
            whole = tuple(torch.cat(parts) if len(parts) > 1 and slot.shape and slot.shape[0].scale else parts[0]
                          for slot, parts in zip(step.outputs, zip(*found, strict=True), strict=True)) if there else ()
            observe(step, whole, self._seconds[step.name])


class Backend(Protocol):
    """Makes Placements. ``devices`` are the device types it runs on."""

    @property
    def name(self) -> str: ...

    @property
    def devices(self) -> tuple[str, ...]: ...

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""

    def configured(self, **options: Any) -> Backend:
        """The same with a user's options. Raises UnknownName for one that it does not have."""

    def place(self, program: Program, signature: Signature, hasty: bool = False) -> Placement:
        """Lay a Program out; hasty: by guesses, without measuring which algorithm is fastest. Raises LoweringError
        naming a step that it cannot run."""


def check_options(backend: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises UnknownName for an option that a backend does not have."""
    for name in given:
        if name not in known:
            raise unknown(f"option of backend {backend!r}", name, known)


@dataclass(frozen=True)
class Choice:
    """A backend and why it is the one."""

    backend: Backend
    reason: str


def choose(name: str, known: Sequence[Backend], device: str) -> Choice:
    """The backend of that name, or for ``auto`` the first of ``known`` (best first) that runs on the device.

    Raises UnknownName, and BackendUnavailable where the named one cannot run here.
    """
    by_name = {backend.name: backend for backend in known}
    if name == "auto":
        passed: list[str] = []
        for backend in known:
            reason = _cannot(backend, device)
            if reason is None:
                why = "; ".join(passed) or "it is the first choice"
                log.info("backend %s on %s: %s", backend.name, device, why)
                return Choice(backend, why)
            passed.append(f"{backend.name}: {reason}")
        raise BackendUnavailable(f"no backend runs on {device}: {'; '.join(passed)}.")
    if name not in by_name:
        raise unknown("backend", name, ["auto", *by_name])
    reason = _cannot(by_name[name], device)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {reason}. Use backend=\"auto\" for the best "
                                 "that can.")
    return Choice(by_name[name], "asked for by name")


def _cannot(backend: Backend, device: str) -> str | None:
    reason = backend.unavailable()
    if reason is None and device not in backend.devices:
        reason = f"it runs on {' and '.join(backend.devices)}, not on {device}"
    return reason
