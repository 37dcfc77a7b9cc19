"""Searches above pruning and lowering: the smallest network that keeps an accuracy."""

from prunekern.search.accuracy import Trial, smallest

__all__ = ["Trial", "smallest"]
