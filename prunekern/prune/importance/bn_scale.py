"""Batch-norm scale (Liu et al. 2017, 'Network Slimming')."""

from __future__ import annotations

from collections.abc import Iterator

from prunekern.core.rule import aten
from prunekern.prune.importance.evidence import Contribution, Evidence
from prunekern.prune.importance.slices import as_float, per_group

BATCH_NORM = frozenset(aten("batch_norm"))


def bn_scale(evidence: Evidence) -> Iterator[Contribution]:
    """|gamma| of every batch norm that the group's channels pass; the mean where several lie in one."""
    labels = evidence.groups.labels
    scales = (evidence.graph.fqn(node.args[1]) for node in evidence.graph.nodes if node.target in BATCH_NORM)
    for name in dict.fromkeys(scales):
        if name is not None and (name, 0) in labels.axes:
            yield per_group(labels.axes[name, 0], as_float(evidence.graph.tensors[name]).abs(), "mean")
