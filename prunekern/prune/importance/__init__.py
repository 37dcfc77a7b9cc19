"""How important is each group? One criterion a file; ``CRITERIA`` finds them by name.

A criterion is a function ``criterion(evidence)`` that yields contributions ``(groups [n], scores [n])``: each
says how important some groups are as one layer or activation sees them. ``score`` puts them together.
"""

from __future__ import annotations

from prunekern.prune.importance.activation import activation
from prunekern.prune.importance.apoz import apoz
from prunekern.prune.importance.bn_scale import bn_scale
from prunekern.prune.importance.evidence import Contribution, Criterion, Evidence, Statistics, Weight
from prunekern.prune.importance.fpgm import fpgm
from prunekern.prune.importance.l1 import l1
from prunekern.prune.importance.l2 import l2
from prunekern.prune.importance.random import random
from prunekern.prune.importance.score import CRITERIA, NORMALISATIONS, REDUCTIONS, Scores, score
from prunekern.prune.importance.taylor import taylor

__all__ = [
    "CRITERIA",
    "NORMALISATIONS",
    "REDUCTIONS",
    "Contribution",
    "Criterion",
    "Evidence",
    "Scores",
    "Statistics",
    "Weight",
    "activation",
    "apoz",
    "bn_scale",
    "fpgm",
    "l1",
    "l2",
    "random",
    "score",
    "taylor",
]
