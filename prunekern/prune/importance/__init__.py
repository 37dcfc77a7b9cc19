"""How important is each group? One criterion a file; ``CRITERIA`` finds them by name.

A criterion is a function ``criterion(evidence)`` that yields contributions ``(groups [n], scores [n])``: each
says how important some groups are as one layer or activation sees them. ``score`` puts them together.
"""

from __future__ import annotations

from prunekern.prune.importance.activation import activation
from prunekern.prune.importance.apoz import apoz
from prunekern.prune.importance.bn_scale import bn_scale
from prunekern.prune.importance.chip import chip
from prunekern.prune.importance.cosine import cosine
from prunekern.prune.importance.cosine_activation import cosine_activation
from prunekern.prune.importance.curvature import Curvature
from prunekern.prune.importance.dropnet import DROPNET
from prunekern.prune.importance.ensemble import Ensemble, ensemble
from prunekern.prune.importance.evidence import (
    Contribution,
    Criterion,
    Evidence,
    Site,
    Statistics,
    Weight,
    brings,
)
from prunekern.prune.importance.fisher import fisher
from prunekern.prune.importance.fpgm import fpgm
from prunekern.prune.importance.hrank import hrank
from prunekern.prune.importance.l1 import l1
from prunekern.prune.importance.l2 import l2
from prunekern.prune.importance.lamp import lamp
from prunekern.prune.importance.names import CRITERIA, Settings, settle
from prunekern.prune.importance.obd import obd
from prunekern.prune.importance.random import random
from prunekern.prune.importance.score import NORMALISATIONS, REDUCTIONS, Scores, score
from prunekern.prune.importance.taylor import taylor

__all__ = [
    "CRITERIA",
    "DROPNET",
    "NORMALISATIONS",
    "REDUCTIONS",
    "Contribution",
    "Criterion",
    "Curvature",
    "Ensemble",
    "Evidence",
    "Scores",
    "Settings",
    "Site",
    "Statistics",
    "Weight",
    "activation",
    "apoz",
    "bn_scale",
    "brings",
    "chip",
    "cosine",
    "cosine_activation",
    "ensemble",
    "fisher",
    "fpgm",
    "hrank",
    "l1",
    "l2",
    "lamp",
    "obd",
    "random",
    "score",
    "settle",
    "taylor",
]
