"""Cosine redundancy of filters (as in Ayinde & Zurada 2018): of two channels that do the same, one goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from prunekern.graph.groups import Family
from prunekern.prune.importance.evidence import Contribution, Evidence
from prunekern.prune.importance.slices import as_float, filters

Gram = tuple[Tensor, Tensor]
"""(group of each index [n], products of all pairs of vectors [n, n])."""
ALONE = 2.0  # the largest 1 - cos there is: of a channel that has no partner left


def cosine(evidence: Evidence) -> Iterator[Contribution]:
    """1 - cos(a, b) to the most similar channel that is still there when this one goes, a and b being the filters of
    all layers that issue the family's channels (the mean of the layers' cosines).

    Channels leave one after another: of the closest pair the one of smaller norm goes, and what is left is compared
    among itself. So of two equal filters one scores 0, and the other as if it had been alone. Filters of zeros equal
    any other. Opposite ones are no copies: an activation function tells them apart.
    """
    labels = evidence.groups.labels
    found: list[Gram] = []
    for name, axis in labels.produced:
        groups, tensor = labels.axes.get((name, axis)), evidence.graph.tensors[name]
        if groups is not None and tensor.is_floating_point():
            points = filters(as_float(tensor), axis, groups)
            found.append((groups.reshape(-1), (points @ points.T).detach().to("cpu", torch.float64)))
    yield from redundancy(evidence, found)


def redundancy(evidence: Evidence, grams: Iterable[Gram]) -> Iterator[Contribution]:
    """Scores of every family that some of the products tell about: the order of leaving, one of a pair at a time."""
    grams = list(grams)
    for family in evidence.groups:
        mine = [part for groups, gram in grams if (part := of_family(family, groups, gram)) is not None]
        if mine and family.channels > 1:
            cosines = torch.stack([cosines_of(gram) for gram in mine]).mean(0)
            energy = torch.stack([_shares(gram.diagonal()) for gram in mine]).mean(0)
            yield family.groups, leaving(1 - cosines, energy)
        elif mine:
            yield family.groups, torch.full((family.channels,), ALONE, dtype=torch.float64)


def of_family(family: Family, groups: Tensor, gram: Tensor) -> Tensor | None:
    """Products of whole groups [channels, channels], in the family's order: the sum over their indices, pair by pair.

    None where they are not all there, or hold different numbers of indices.
    """
    order = family.groups.argsort()
    place = torch.searchsorted(family.groups[order], groups).clamp(max=len(order) - 1)
    mine = (family.groups[order][place] == groups).nonzero()[:, 0]
    slot = order[place[mine]]
    count = torch.bincount(slot, minlength=family.channels)
    if not len(mine) or int(count.min()) != int(count.max()):
        return None
    table = mine[slot.argsort(stable=True)].view(family.channels, -1)
    total = gram.new_zeros(family.channels, family.channels)
    for column in table.T:
        total += gram[column][:, column]
    return total


def cosines_of(gram: Tensor) -> Tensor:
    """Products over norms; a vector of zeros equals every other."""
    norm = gram.diagonal().clamp(min=0).sqrt()
    scale = norm[:, None] * norm
    return torch.where(scale > 0, gram / scale.clamp(min=torch.finfo(gram.dtype).tiny), 1.0).clamp(-1, 1)


def _shares(values: Tensor) -> Tensor:
    return values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)


def leaving(distance: Tensor, size: Tensor) -> Tensor:
    """Distance to the nearest that is left, at the time of leaving [n]; never falls from one leaving to the next.

    distance: [n, n], symmetric. size: [n]; the smaller of the nearest pair leaves. The last one has ``ALONE``.
    """
    table = distance.clone().fill_diagonal_(torch.inf)
    scores = torch.full((len(table),), ALONE, dtype=torch.float64)
    least, partner = table.min(1)
    for _ in range(len(table) - 1):
        a = int(least.argmin())
        b = int(partner[a])
        gone = a if float(size[a]) <= float(size[b]) else b
        scores[gone] = least[a]
        table[gone], table[:, gone], least[gone] = torch.inf, torch.inf, torch.inf
        stale = ((partner == gone) & least.isfinite()).nonzero()[:, 0]
        if len(stale):
            least[stale], partner[stale] = table[stale].min(1)
    return scores
