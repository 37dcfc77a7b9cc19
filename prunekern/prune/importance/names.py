"""Criteria by name, and the settings that a name brings along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from prunekern.errors import InputError, unknown
from prunekern.prune.importance.activation import activation
from prunekern.prune.importance.apoz import apoz
from prunekern.prune.importance.bn_scale import bn_scale
from prunekern.prune.importance.chip import chip
from prunekern.prune.importance.cosine import cosine
from prunekern.prune.importance.cosine_activation import cosine_activation
from prunekern.prune.importance.dropnet import DROPNET
from prunekern.prune.importance.ensemble import ensemble
from prunekern.prune.importance.evidence import Criterion
from prunekern.prune.importance.fisher import fisher
from prunekern.prune.importance.fpgm import fpgm
from prunekern.prune.importance.hrank import hrank
from prunekern.prune.importance.l1 import l1
from prunekern.prune.importance.l2 import l2
from prunekern.prune.importance.lamp import lamp
from prunekern.prune.importance.obd import obd
from prunekern.prune.importance.obs import obs
from prunekern.prune.importance.random import random
from prunekern.prune.importance.taylor import taylor

Reduction = Literal["mean", "sum", "max", "prod", "first"]
Normalisation = Literal["none", "mean", "max", "sum", "gauss"]
Direction = Literal["minimum", "maximum"]

CRITERIA: Mapping[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "lamp": lamp,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "cosine": cosine,
    "taylor": taylor,
    "fisher": fisher,
    "obd": obd,
    "obs": obs,
    "activation": activation,
    "apoz": apoz,
    "cosine_activation": cosine_activation,
    "hrank": hrank,
    "chip": chip,
    "random": random,
}
PREFIX = "dropnet:"


@dataclass(frozen=True)
class Settings:
    """A criterion and everything about how it is used, with nothing left open."""

    name: str
    criterion: Criterion
    reduction: Reduction
    normalisation: Normalisation
    direction: Direction
    ranking: str


def settle(
    criterion: str | Criterion,
    *,
    reduction: str | None = None,
    normalisation: str | None = None,
    direction: str | None = None,
    ranking: str | None = None,
) -> Settings:
    """What is given, else what the criterion brings, else: mean, mean, minimum, global.

    criterion: a name in ``CRITERIA``, 'dropnet:' and a metric of the paper (``dropnet.DROPNET``), several names joined
    by '+' (``ensemble``), or a function of an Evidence; its attribute ``settings`` (``brings``), where it has one, is
    what it brings. Raises UnknownName, InputError. Values are checked by those who use them.
    """
    name, function = named(criterion)
    brought = dict(DROPNET[name.removeprefix(PREFIX)]) if name.startswith(PREFIX) else {}
    own = getattr(function, "settings", None)
    brought |= own if isinstance(own, Mapping) else {}
    given = {"reduction": reduction, "normalisation": normalisation, "direction": direction, "ranking": ranking}
    whole = {
        "reduction": "mean", "normalisation": "mean", "direction": "minimum", "ranking": "global",
        **{key: brought[key] for key in given if key in brought},
        **{key: value for key, value in given.items() if value is not None},
    }  # fmt: skip
    return Settings(
        name,
        function,
        cast(Reduction, whole["reduction"]),
        cast(Normalisation, whole["normalisation"]),
        cast(Direction, whole["direction"]),
        whole["ranking"],
    )


def named(criterion: str | Criterion) -> tuple[str, Criterion]:
    """(name, function) of a criterion in any spelling."""
    if isinstance(criterion, str):
        return criterion, _by_name(criterion)
    if not callable(criterion):
        raise InputError(
            f"criterion is a {type(criterion).__name__}; pass a name ({', '.join(sorted(CRITERIA))}) "
            "or a function of an Evidence."
        )
    return getattr(criterion, "__name__", type(criterion).__name__), criterion


def _by_name(name: str) -> Criterion:
    if "+" in name:
        parts = [part.strip() for part in name.split("+")]
        for part in parts:
            _by_name(part)
        return ensemble(*parts)
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in DROPNET:
        return CRITERIA[DROPNET[name.removeprefix(PREFIX)]["criterion"]]
    if name not in CRITERIA:
        raise unknown("criterion", name, [*CRITERIA, *(PREFIX + metric for metric in DROPNET)])
    return CRITERIA[name]


