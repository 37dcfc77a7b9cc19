"""Searches above pruning and lowering: latency that is measured, the smallest network that keeps an accuracy, and
ratios for every layer (by dynamic programming, or by Optuna)."""

from prunekern.search.accuracy import Trial, smallest
from prunekern.search.latency import LatencyPlanner

__all__ = ["LatencyPlanner", "Trial", "smallest"]
