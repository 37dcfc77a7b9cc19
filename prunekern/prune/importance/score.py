"""From contributions to one score per group: reduce over members, normalise within families, turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekern.core.labels import FIXED
from prunekern.errors import InputError, unknown
from prunekern.graph.groups import Family, Groups
from prunekern.prune.importance.calibration import Data
from prunekern.prune.importance.evidence import Contribution, Criterion, Evidence
from prunekern.prune.importance.l2 import l2
from prunekern.prune.importance.names import Direction, Normalisation, Reduction, settle

DIRECTIONS = ("minimum", "maximum")


@dataclass(frozen=True, eq=False)
class Scores:
    """The importance of every group and how it was computed; the lowest are removed first.

    values: fp64 [groups]; +inf for what must stay, or belongs to no family.
    notes:  what a reader of the report should know (families scored in another way, ties).
    """

    values: Tensor
    criterion: str
    reduction: str
    normalisation: str
    direction: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = f"{self.reduction} over members, normalised by {self.normalisation}, {self.direction} first"
        return "\n".join((f"{self.criterion}, {how}", *self.notes))


def score(
    groups: Groups,
    criterion: str | Criterion = "l2",
    *,
    reduction: Reduction | None = None,
    normalisation: Normalisation | None = None,
    direction: Direction | None = None,
    batches: Data | None = None,
    loss: Callable[..., Tensor] | None = None,
    seed: int = 0,
    evidence: Evidence | None = None,
) -> Scores:
    """Score every group of channels.

    criterion:     a name in ``CRITERIA``; several joined by '+' (``ensemble``); 'dropnet:' and one of its metrics
                   (``dropnet.DROPNET``); or a function of an Evidence that yields contributions.
    The next three are what the criterion brings (``brings``) where they are left out, else the first of each:
    reduction:     'mean', 'sum', 'max', 'prod', 'first': how a group's contributions become one number; 'first'
                   takes the first in the graph (the layer that issues the channels).
    normalisation: 'mean', 'max', 'sum', 'gauss', 'none': within each family, so that layers can be compared:
                   divided by the mean, max or sum of the family; 'gauss' subtracts the mean and divides by the
                   standard deviation.
    direction:     'minimum' removes the lowest first, 'maximum' the highest.
    batches, loss, seed: see Evidence. evidence: one made before, instead of these, to share what it computed.

    A family that the criterion leaves out, wholly or in part, is scored by l2 and named in the notes.
    Raises UnknownName; InputError where data is missing, or a criterion yields nothing or nonsense.
    """
    settled = settle(criterion, reduction=reduction, normalisation=normalisation, direction=direction)
    name, function = settled.name, settled.criterion
    reduction, normalisation, direction = settled.reduction, settled.normalisation, settled.direction
    _check(reduction, normalisation, direction)
    if evidence is None:
        evidence = Evidence(groups, batches, loss, seed)
    elif evidence.groups is not groups or batches is not None or loss is not None:
        raise InputError(
            "score: evidence belongs to other groups, or comes along with batches or loss; "
            "pass Evidence(groups, batches, loss, seed) alone."
        )
    said = len(evidence.remarks)
    raw = _reduced(evidence, name, function, reduction)
    remarks = dict.fromkeys(evidence.remarks[said:])
    values = torch.full_like(raw, torch.inf)
    missing = [family for family in groups if bool(raw[family.groups].isnan().any())]
    if missing:
        spare = _reduced(evidence, "l2", l2, reduction)
        for family in missing:  # what even l2 does not know, stays
            raw[family.groups] = spare[family.groups].nan_to_num(torch.inf, torch.inf)
    tied = []
    for family in groups:
        own = raw[family.groups]
        if bool(own.isfinite().all()):
            scaled = NORMALISATIONS[normalisation](own)
            values[family.groups] = -scaled if direction == "maximum" else scaled
            if len(own) > 1 and bool((own == own[0]).all()):
                tied.append(family)
    values[FIXED] = torch.inf
    notes = (*remarks, *_notes(name, missing, tied, normalisation))
    return Scores(values, name, reduction, normalisation, direction, notes)


def _notes(name: str, missing: list[Family], tied: list[Family], normalisation: str) -> Iterator[str]:
    if missing:
        tail = "; their scale is another one: set a normalisation to compare layers" * (
            normalisation == "none"
        )
        yield f"{name} does not score all channels of {_listed(missing)}; l2 was used there{tail}"
    if tied:
        yield f"all channels score the same in {_listed(tied)}; which of them go first is arbitrary"


def _listed(families: list[Family]) -> str:
    more = f" and {len(families) - 8} more" if len(families) > 8 else ""
    return ", ".join(f"{family.name!r} ({family.channels})" for family in families[:8]) + more


LACKS = {
    "bn_scale": " (it has no batch norm with a scale on channels that can be pruned)",
    "hrank": " (no layer reads maps of two axes or more, which have a rank)",
}


def _check(reduction: str, normalisation: str, direction: str) -> None:
    for kind, given, known in (
        ("reduction", reduction, REDUCTIONS),
        ("normalisation", normalisation, NORMALISATIONS),
        ("direction", direction, DIRECTIONS),
    ):
        if given not in known:
            raise unknown(kind, given, known)


# ---- contributions -----------------------------------------------------------------------------------------


def _reduced(evidence: Evidence, name: str, criterion: Criterion, reduction: str) -> Tensor:
    """Contributions scattered to groups and reduced: fp64 [groups], NaN where there is none."""
    try:
        found = criterion(evidence)
        items = [_checked(item, name, evidence) for item in found] if isinstance(found, Iterable) else []
    except InputError as error:
        raise InputError(f"criterion {name!r}: {error}") from error
    count = evidence.groups.labels.groups
    ids = torch.cat([ids for ids, _ in items]) if items else torch.empty(0, dtype=torch.long)
    scores = torch.cat([scores for _, scores in items]) if items else torch.empty(0, dtype=torch.float64)
    seen = torch.bincount(ids, minlength=count) > 0
    if len(evidence.groups) and not bool(seen[torch.cat([f.groups for f in evidence.groups])].any()):
        raise InputError(
            f"criterion {name!r} scores no channel of this model"
            + LACKS.get(name, "")
            + "; choose another one, e.g. 'l2'."
        )
    values = REDUCTIONS[reduction](ids, scores, count)
    if bool((values.isinf() & seen).any()):
        raise InputError(
            f"criterion {name!r}: the {reduction} over a group's members overflows; choose reduction='mean'."
        )
    return values.masked_fill(~seen, torch.nan)


def _checked(item: Contribution, name: str, evidence: Evidence) -> Contribution:
    count = evidence.groups.labels.groups
    if not (
        isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(part, Tensor) for part in item)
    ):
        raise InputError(f"it yields {type(item).__name__}; yield (groups [n], scores [n]) tensors.")
    ids, scores = item[0].detach().cpu(), item[1].detach().cpu().double()
    if ids.dim() != 1 or ids.shape != scores.shape or ids.dtype != torch.long:
        raise InputError(
            f"it yields groups {tuple(ids.shape)} {ids.dtype} and scores {tuple(scores.shape)}; both "
            "must have one axis of the same length, the groups int64."
        )
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise InputError(
            f"it yields group {int(ids.min())} or {int(ids.max())}; groups go from 0 to {count - 1}."
        )
    ids, scores = ids[ids != FIXED], scores[ids != FIXED]
    bad = ~scores.isfinite()
    if bool(bad.any()):
        group = int(ids[bad][0])
        where = next(
            (f"in {f.name!r}" for f in evidence.groups if bool((f.groups == group).any())), "that must stay"
        )
        raise InputError(
            f"its score of group {group} ({where}) is {float(scores[bad][0])}; check weights, loss "
            "and calibration data for NaN and overflow."
        )
    return ids, scores


def _sum(ids: Tensor, scores: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_add_(0, ids, scores)


def _mean(ids: Tensor, scores: Tensor, count: int) -> Tensor:
    return _sum(ids, scores, count) / torch.bincount(ids, minlength=count)


def _max(ids: Tensor, scores: Tensor, count: int) -> Tensor:
    return torch.full((count,), -torch.inf, dtype=torch.float64).scatter_reduce(0, ids, scores, "amax")


def _prod(ids: Tensor, scores: Tensor, count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64).scatter_reduce(0, ids, scores, "prod")


def _first(ids: Tensor, scores: Tensor, count: int) -> Tensor:
    position = torch.full((count,), len(ids)).scatter_reduce(0, ids, torch.arange(len(ids)), "amin")
    return torch.cat((scores, scores.new_tensor([torch.nan])))[position]


REDUCTIONS: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "mean": _mean,
    "sum": _sum,
    "max": _max,
    "prod": _prod,
    "first": _first,
}


# ---- families ----------------------------------------------------------------------------------------------


def _divided(values: Tensor, by: Tensor) -> Tensor:
    """A family of zeros stays one; absolute values divide, so that the order never turns."""
    return values / by if float(by) else values


NORMALISATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "mean": lambda values: _divided(values, values.abs().mean()),
    "max": lambda values: _divided(values, values.abs().max()),
    "sum": lambda values: _divided(values, values.abs().sum()),
    "gauss": lambda values: _divided(values - values.mean(), values.std(correction=0)),
}
