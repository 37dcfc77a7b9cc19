"""Several criteria at once, by the mean of their ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunekern.errors import InputError
from prunekern.prune.importance.evidence import Contribution, Evidence

Chosen = str | Callable[[Evidence], Iterable[Contribution]]


@dataclass(frozen=True)
class Ensemble:
    """A criterion made of others: see ``ensemble``."""

    criteria: tuple[Chosen, ...]
    settings: ClassVar[Mapping[str, str]] = {"normalisation": "none"}

    @property
    def __name__(self) -> str:
        return "+".join(c if isinstance(c, str) else getattr(c, "__name__", type(c).__name__) for c in self.criteria)

    def __call__(self, evidence: Evidence) -> Iterator[Contribution]:
        from prunekern.prune.importance.score import score  # it scores by ensembles, too

        ids = torch.cat([family.groups for family in evidence.groups]) if len(evidence.groups) else None
        if ids is None:
            return
        total = torch.zeros(len(ids), dtype=torch.float64)
        for criterion in self.criteria:
            found = score(evidence.groups, criterion, evidence=evidence)
            for note in found.notes:
                evidence.remark(note)
            total += ranks(found.values[ids])
        yield ids, total / len(self.criteria)


def ensemble(*criteria: Chosen) -> Ensemble:
    """Mean of normalised ranks: of each criterion, the rank of a group among all that may leave, over their number,
    in (0, 1]; equal scores share the mean of their ranks.

    Each criterion is first scored as on its own, with the normalisation that it brings (within families, by the mean,
    as a rule), so that ranks compare layers, too. Ranks are unmoved by the scale and the tails of scores, which no two
    criteria have in common. ``criterion="l2+taylor+hrank"`` is the same as ``ensemble("l2", "taylor", "hrank")``.
    A criterion that is named twice counts twice. Raises InputError for fewer than two.
    """
    if len(criteria) < 2:
        raise InputError('an ensemble needs two criteria or more, e.g. ensemble("l2", "taylor"), or "l2+taylor".')
    return Ensemble(tuple(criteria))


def ranks(values: Tensor) -> Tensor:
    """Mean rank of each value over the number of values, in (0, 1]: fp64 [n]."""
    _, inverse, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    mean = last - (count.double() - 1) / 2
    share: Tensor = mean[inverse] / max(len(values), 1)
    return share
