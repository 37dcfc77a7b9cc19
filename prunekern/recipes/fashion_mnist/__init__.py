"""The Fashion-MNIST study: train a small network, prune it channel by channel, prove, choose, lower, report.

``run`` is all of it. Everything is written as it is made, so a killed run goes on where it was, having lost at
most one epoch; a finished one reports at once.
"""

from __future__ import annotations

from prunekern.recipes.fashion_mnist.pipeline import Outcome, run
from prunekern.recipes.fashion_mnist.protocol import DEFAULT, FULL, Protocol, Stage

__all__ = ["DEFAULT", "FULL", "Outcome", "Protocol", "Stage", "run"]
