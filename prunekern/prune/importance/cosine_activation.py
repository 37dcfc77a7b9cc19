"""Cosine redundancy of activations: of two channels that carry the same signal, one goes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekern.prune.importance.cosine import redundancy
from prunekern.prune.importance.evidence import Contribution, Evidence, Site
from prunekern.prune.importance.slices import as_float


def cosine_activation(evidence: Evidence) -> Iterator[Contribution]:
    """1 - cos(a, b) to the most similar channel that is still there when this one goes, a and b being the values of
    the channels over all data and positions; the mean over the activations in which layers read the family.

    Channels leave one after another, as in ``cosine``: of the closest pair the weaker one goes. A layer that reads
    both can make up for it by adding the columns of the one that goes to those of the one that stays (Srinivas & Babu
    2015, 'Data-free Parameter Pruning', for equal filters). What is never active equals any other.

    Only the products [channels, channels] of each activation are held. Raises InputError without calibration data.
    """
    grams: dict[Site, Tensor] = {}

    def see(site: Site, value: Tensor) -> None:
        columns = as_float(value).movedim(1, 0).flatten(1)
        product = (columns @ columns.T).to("cpu", torch.float64)
        grams[site] = grams[site] + product if site in grams else product

    evidence.maps(see)
    yield from redundancy(evidence, [(site.groups, gram) for site, gram in grams.items()])
