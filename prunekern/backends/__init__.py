"""Backends run Programs; ``lower`` makes a network into one on the best backend there is."""

from prunekern.backends.known import BACKENDS
from prunekern.backends.lowered import Lowered, lower

__all__ = ["BACKENDS", "Lowered", "lower"]
