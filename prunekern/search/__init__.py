"""Searches above pruning and lowering: latency that is measured, the smallest network that keeps an accuracy, and
ratios for every layer (by dynamic programming, or by Optuna)."""

from prunekern.search.accuracy import Trial, smallest
from prunekern.search.latency import LatencyPlanner
from prunekern.search.ratios import Ratios, layerwise
from prunekern.search.tuning import Study, tune

__all__ = ["LatencyPlanner", "Ratios", "Study", "Trial", "layerwise", "smallest", "tune"]
