"""The smallest network whose measured accuracy stays at or above a floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from prunekern.errors import TargetError

T = TypeVar("T")


@dataclass(frozen=True)
class Trial(Generic[T]):
    """A network made for a share of a cost, and what was measured on it."""

    share: float
    accuracy: float
    result: T


def smallest(make: Callable[[float], Trial[T]], floor: float, *, dense: float, least: float = 0.02,
             trials: int = 7, of: str = "MACs") -> tuple[Trial[T], tuple[Trial[T], ...]]:
    """Bisect the share of a cost between ``least`` and 1 for the smallest network at or above ``floor``.

    make: share -> Trial (prunes, trains and measures). dense: the original's accuracy. of: the cost in words. Accuracy
    is taken to fall with the share on the whole; the network returned was itself measured, whatever the others did.
    Returns (the best trial, all trials). Raises TargetError where none of them reaches the floor.
    """
    if dense < floor:
        raise TargetError(f"the accuracy floor {floor:.4f} is above the original network's {dense:.4f}; "
                          "lower it, or train the network first.")
    seen: list[Trial[T]] = []
    low, high, refused = least, 1.0, ""
    for _ in range(trials):
        try:
            share = (low + high) / 2
            trial = make(share)
        except TargetError as error:            # smaller than the network can get: look higher
            low, refused = share, str(error)
            continue
        seen.append(trial)
        low, high = (low, share) if trial.accuracy >= floor else (share, high)
    good = [trial for trial in seen if trial.accuracy >= floor]
    if not good:
        reached = ", ".join(f"{t.accuracy:.4f} at {t.share:.2f} of the {of}" for t in seen)
        reached = reached or f"no network at all ({refused})"
        raise TargetError(f"no pruned network keeps an accuracy of {floor:.4f}; reached: {reached}. "
                          "Allow a larger drop, or pass train= to fine-tune.")
    return min(good, key=lambda t: (t.share, -t.accuracy)), tuple(seen)
