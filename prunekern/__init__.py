"""prunekern: structured pruning of trained PyTorch networks, physically smaller, proven, lowered to GEMMs."""

from __future__ import annotations

__version__ = "0.1.0"

from prunekern.analysis.sensitivity import sensitivity
from prunekern.api import compress
from prunekern.backends import lower
from prunekern.cost import profile
from prunekern.graph.trace import trace
from prunekern.pareto import pareto
from prunekern.prune.oneshot import apply_plan, groups_of, prune
from prunekern.prune.target import Target
from prunekern.result import Result, load

__all__ = ["Result", "Target", "apply_plan", "compress", "groups_of", "load", "lower", "pareto", "profile", "prune",
           "sensitivity", "trace"]
