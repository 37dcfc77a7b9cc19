"""Random scores: the baseline that every other criterion has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prunekern.prune.importance.evidence import Contribution, Evidence


def random(evidence: Evidence) -> Iterator[Contribution]:
    """Uniform in 0..1, from ``evidence.seed`` alone; the global random state is not used."""
    count = evidence.groups.labels.groups
    generator = torch.Generator().manual_seed(evidence.seed)
    yield torch.arange(count), torch.rand(count, generator=generator, dtype=torch.float64)
