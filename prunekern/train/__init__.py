"""Training and fine-tuning: a small reproducible loop, evaluation, distillation, training towards sparsity."""

from prunekern.train.augment import Augment
from prunekern.train.average import Average
from prunekern.train.batching import Data, passes
from prunekern.train.distil import Distil, as_distil, kept_outputs
from prunekern.train.evaluate import Evaluation, accuracy, cross_entropy, evaluate
from prunekern.train.history import Epoch, History
from prunekern.train.loop import fit
from prunekern.train.masks import FixedMasks, fine_tune
from prunekern.train.seeding import seed_everything
from prunekern.train.snapshot import Snapshot
from prunekern.train.sparsity import GroupLasso, GrowingReg, SoftPruning, Sparsity

__all__ = [
    "Augment",
    "Average",
    "Data",
    "Distil",
    "Epoch",
    "Evaluation",
    "FixedMasks",
    "GroupLasso",
    "GrowingReg",
    "History",
    "Snapshot",
    "SoftPruning",
    "Sparsity",
    "accuracy",
    "as_distil",
    "cross_entropy",
    "evaluate",
    "fine_tune",
    "fit",
    "kept_outputs",
    "passes",
    "seed_everything",
]
