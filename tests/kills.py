"""Runs that end at a chosen moment, as if they had been killed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


def kill_at(target: Any, name: str, moment: int, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """Call number ``moment`` of ``target.name`` ends the run, before it does anything or after."""
    real, calls = getattr(target, name), itertools.count()

    def act(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != moment:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(target, name, act)
