"""Backends run Programs; ``lower`` makes a network into one on the best backend there is."""

from prunekern.backends.known import BACKENDS
from prunekern.backends.lowered import Lowered, lower
from prunekern.backends.speedup import explain_speedup

__all__ = ["BACKENDS", "Lowered", "explain_speedup", "lower"]
