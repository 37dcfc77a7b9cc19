"""Heads or widths: how channels leave where activations are multiplied with each other.

A first walk finds the sites; where heads are wanted, the channels of each become one label in the parameters
that issue them, and the graph is walked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from prunekern.core.graph import owner
from prunekern.core.labels import FIXED, Site, Tape

Axes = Mapping[tuple[str, int], Tensor]


def candidates(tape: Tape) -> list[Site]:
    """The sites at which heads are to leave."""
    return [site for site in tape.sites
            if len(site.table) > 1 and tape.policy.attention_of(owner(site.node)[0]) != "widths"]


def merged(axes: Axes, sites: Sequence[Site], alike: Sequence[Tensor], count: int) -> dict[tuple[str, int], Tensor]:
    """For every parameter axis that issues heads: the index of the channel that stands for each channel's head.

    axes: the labels of the first walk; alike: edges between labels that ran together before they met at a site;
    count: how many labels there are.
    """
    edges = [torch.stack((site.table[:, :1].expand_as(site.table).reshape(-1), site.table.reshape(-1)))
             for site in sites]
    pairs = torch.cat([*edges, *alike], 1).numpy()
    pairs = pairs[:, (pairs != FIXED).all(0)]
    _, head = connected_components(
        coo_matrix((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1])), shape=(count, count)),
        directed=False)
    found = {}
    for key, labels in axes.items():
        _, first, inverse = np.unique(head[labels.numpy()], return_index=True, return_inverse=True)
        if len(first) < len(labels):
            found[key] = torch.from_numpy(first[inverse])
    return found


def held(sites: Sequence[Site], before: Axes, groups: Axes, balanced: Sequence[Tensor], count: int) -> list[Site]:
    """The sites whose heads all have to stay, or can leave only together.

    before: the labels of the first walk; groups: what the axes were sorted into by the second; balanced: tables of
    groups whose rows keep equally many. A head that is a whole row of one (a group of a grouped convolution) stays.
    """
    rows = [row for table in balanced for row in table if len(row.unique()) == 1]
    stays = torch.tensor([FIXED, *(int(row[0]) for row in rows)])
    group_of = torch.full((count,), FIXED)
    for key, labels in before.items():
        if groups[key].dim() == 1:
            group_of[labels] = torch.where(torch.isin(groups[key], stays), FIXED, groups[key])
    return [site for site in sites if len(group_of[site.table].amax(1).unique()) < 2]
