"""Training and fine-tuning: a small reproducible loop, evaluation, histories, seeds."""

from prunekern.train.batching import Data, passes
from prunekern.train.evaluate import Evaluation, accuracy, cross_entropy, evaluate
from prunekern.train.history import Epoch, History
from prunekern.train.loop import fit
from prunekern.train.seeding import seed_everything

__all__ = [
    "Data",
    "Epoch",
    "Evaluation",
    "History",
    "accuracy",
    "cross_entropy",
    "evaluate",
    "fit",
    "passes",
    "seed_everything",
]
