"""Searches above pruning and lowering: the smallest network that keeps an accuracy; accuracy against cost."""

from prunekern.search.accuracy import Trial, smallest

__all__ = ["Trial", "smallest"]
