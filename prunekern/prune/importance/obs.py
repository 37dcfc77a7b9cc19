"""Optimal brain surgeon over whole groups: what leaves is made up for by what stays (Hassibi & Stork 1993)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from prunekern.core.labels import FIXED
from prunekern.graph.groups import Groups
from prunekern.prune.importance.evidence import Contribution, Evidence, brings
from prunekern.prune.importance.readers import Reader, look, readers
from prunekern.prune.target import Meter

POWER = 0.75        # of a cost, before it is divided by MACs; see ``obs``
STEPS = 96          # in which a cluster is taken apart; more where those that would leave together need each other
TOGETHER = 1.5      # times the sum of their costs is too much for several that leave together


@brings(reduction="sum", normalisation="none", ranking="global")
def obs(evidence: Evidence) -> Iterator[Contribution]:
    """cost^0.75 / MACs saved, where cost is the squared error at the network's outputs that the group's removal leaves
    once every layer that read it is refitted by least squares, all that left before it being gone already.

    Groups leave one after another, the cheapest per MAC first, among all that are read by the same layers (a residual
    stream and what is added to it); each removal downdates the layers' weights and inverse second moments
    (``readers.Reader``). Costs of one group add up over its n readers, times n: they read the same error, so errors add
    up and not their squares, (sum e)^2 <= n sum e^2. Costs are carried to the outputs by the Gauss-Newton matrix at
    each layer's output, estimated from random projections of the outputs: no labels. So those of different layers are
    in one unit, and ratios per layer follow from them. The power was chosen among 0.5, 0.6, 0.75, 1 and 1.3 by the
    divergence from the dense network on held-out training images (ResNet-56, CIFAR-10, half of the MACs): large costs
    are overestimated, since later layers correct them, too.

    Groups that no convolution or linear layer reads are scored by the squared change that their loss makes at the
    outputs at first order. Made for weights that are then refitted (``prune.reconstruct``).
    Sources: Hassibi & Stork, 'Second order derivatives for network pruning: Optimal Brain Surgeon' (1993); groups of
    columns and one unit for all layers as in Kurtic et al., 'ZipLM' (2023).

    Raises InputError without calibration data.
    """
    groups = evidence.groups
    layers, slices, seen = look(evidence)
    saved = _saved(groups)
    costs = torch.full((groups.labels.groups,), torch.nan, dtype=torch.float64)
    everyone = readers(groups.labels, layers, slices, seen)
    prunable = torch.zeros(groups.labels.groups, dtype=torch.bool)
    for family in groups:
        prunable[family.groups] = True
    prunable[FIXED] = False
    for ids, cluster in _clusters(everyone, prunable):
        _taken_apart(costs, ids, cluster, saved)
    unread = prunable & costs.isnan()
    costs[unread] = seen.gates[unread]
    ids = prunable.nonzero()[:, 0]
    yield ids, costs[ids].clamp(min=0) ** POWER / saved[ids]


def _saved(groups: Groups) -> Tensor:
    """MACs that one group less of each family saves [groups], at least 1."""
    meter = Meter(groups)
    saved = torch.ones(groups.labels.groups, dtype=torch.float64)
    for family in groups:
        keep = groups.everything()
        keep[family.groups[0]] = False
        saved[family.groups] = max(1, meter.whole["macs"] - meter.of(keep)["macs"])
    return saved


def _clusters(everyone: Iterable[Reader], prunable: Tensor) -> Iterator[tuple[Tensor, list[Reader]]]:
    """Groups that share readers, directly or through others, and these readers."""
    everyone = list(everyone)
    count = len(prunable)
    pairs = [(reader.ids.unique(), i) for i, reader in enumerate(everyone)]
    pairs = [(ids[prunable[ids]], i) for ids, i in pairs]
    if not pairs:
        return
    rows = torch.cat([ids for ids, _ in pairs])
    columns = torch.cat([torch.full_like(ids, count + i) for ids, i in pairs])
    size = count + len(everyone)
    graph = coo_matrix((torch.ones(len(rows)).numpy(), (rows.numpy(), columns.numpy())), shape=(size, size))
    _, part = connected_components(graph, directed=False)
    number = torch.from_numpy(part)
    for cluster in number[rows].unique().tolist():
        ids = (number[:count] == cluster).nonzero()[:, 0]
        yield ids[prunable[ids]], [r for i, r in enumerate(everyone) if int(number[count + i]) == cluster]


def _taken_apart(costs: Tensor, ids: Tensor, cluster: list[Reader], saved: Tensor) -> None:
    """Write the cost of each group [groups] when its turn comes; never less than of those before it."""
    alive = torch.zeros(len(costs), dtype=torch.bool)
    alive[ids] = True
    step = max(1, len(ids) // STEPS)
    count = torch.zeros_like(costs)
    for reader in cluster:
        count[reader.ids.unique()] += 1
    worst = 0.0
    while bool(alive.any()):
        total = torch.zeros_like(costs)
        for reader in cluster:
            reader.add_costs(total, alive)
        left = alive.nonzero()[:, 0]
        price = total[left] * count[left] / saved[left]
        order = price.argsort(stable=True)[:step]
        slack = 1e-9 * float(total[left].max())
        while len(order) > 1 and (sum(reader.joint(left[order]) for reader in cluster)
                                  > TOGETHER * float(total[left[order]].clamp(min=0).sum()) + slack):
            order = order[:len(order) // 2]                 # some of them stand in for one another
        gone, priced = left[order], price[order].clamp(min=worst)
        worst = float(priced[-1])
        costs[gone] = priced * saved[gone]
        alive[gone] = False
        for reader in cluster:
            reader.remove(gone)
