"""Every error the library raises on purpose: where it happened, what is wrong, what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class PrunekernError(Exception):
    """Base class; `except PrunekernError` catches everything below and nothing else."""


class ModelError(PrunekernError):
    """The model itself cannot be worked on (not a Module, training mode, NaN weights, mixed devices)."""


class InputError(PrunekernError):
    """Example inputs are missing, ambiguous, on the wrong device, or make the model's forward fail."""


class TraceError(PrunekernError):
    """The model's forward cannot be captured as one graph (control flow that depends on data).

    line: ``file.py:12 `the line` `` of the forward that stops it, '' where it is unknown. parts: the largest submodules
    that can be captured as (path, the inputs that they are given): ``compress(model.get_submodule(path), inputs)``.
    """

    def __init__(self, message: str, line: str = "", parts: Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(message)
        self.line, self.parts = line, tuple(parts)


class UnsupportedOp(PrunekernError):
    """An operator has no rule for what was asked of it."""


class TargetError(PrunekernError):
    """A target is malformed, contradictory or out of reach; the message says what is reachable."""


class PlanError(PrunekernError):
    """A plan does not belong to this graph, is inconsistent, or its predicted shapes did not come true."""


class ProofError(PrunekernError):
    """The sliced network is not equal to the masked original; nothing is returned."""


class LoweringError(PrunekernError):
    """A network cannot be turned into a Program, or the lowered network missed its tolerance."""


class BackendUnavailable(PrunekernError):
    """A backend was asked for by name and cannot run here; the message holds the reason."""


class UnknownName(PrunekernError):
    """A criterion, backend, schedule or recipe of that name does not exist; the message lists those that do."""


class ArtefactError(PrunekernError):
    """A saved result is truncated, altered, of another version, or could not be written."""


class DataError(PrunekernError):
    """A dataset could not be found, fetched or checked; the message lists every place tried."""


def unknown(kind: str, name: object, known: object) -> UnknownName:
    """The error for a name that is not in a registry, with the names that are.

    Returns it, so that call sites read ``raise unknown("criterion", name, registry)``.
    """
    names = ", ".join(sorted(str(item) for item in known))  # type: ignore[attr-defined]
    return UnknownName(f"unknown {kind} {name!r}; known: {names}.")
