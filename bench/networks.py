"""The networks that are measured, and what is wanted of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import prunekern
from prunekern.graph.groups import Groups
from prunekern.prune.oneshot import Pruned
from tests.models import ARCHITECTURES


@dataclass(frozen=True)
class Network:
    """One network of a case; ``name`` is 'dense', or what was left of it. macs: of one sample."""

    name: str
    module: nn.Module
    macs: int
    params: int


@dataclass(frozen=True)
class Wanted:
    """A row of the table of targets: median time over that of the best fp32 peer, at one thread, by batch size."""

    title: str
    model: str
    network: str
    at_most: dict[int, float]

    def limit(self, batch: int, threads: int) -> float:
        """At other batch sizes and numbers of threads: not slower than any peer."""
        return self.at_most.get(batch, 1.0) if threads == 1 else 1.0


TARGETS = (
    Wanted("Fashion-MNIST network", "fashion", "dense", {1: 0.80, 64: 0.70}),
    Wanted("Fashion-MNIST network, half the channels", "fashion", "half", {1: 0.55, 64: 0.50}),
    Wanted("LeNet", "lenet", "dense", {1: 0.50, 64: 0.55}),
    Wanted("MLP 784-40-40-10", "mlp", "dense", {1: 0.60, 64: 0.95}),
    Wanted("MLP 784-1024-1024-10", "mlp1024", "dense", {1: 0.90, 64: 0.95}),
    Wanted("VGG-16 CIFAR", "vgg16_cifar", "dense", {1: 0.70, 64: 0.38}),
    Wanted("VGG-16 CIFAR, half the channels", "vgg16_cifar", "half", {1: 0.80, 64: 0.55}),
    Wanted("VGG-16 CIFAR, odd widths", "vgg16_cifar", "odd", {1: 0.65, 64: 0.48}),
    Wanted("ResNet-18 @224", "resnet18", "dense", {1: 0.60, 64: 0.60}),
    Wanted("ResNet-50 @224", "resnet50", "dense", {1: 0.85, 64: 0.85}),
    Wanted("MobileNetV2 @224", "mobilenet_v2", "dense", {1: 0.85, 64: 0.75}),
    Wanted("ResNet-20 CIFAR", "resnet20", "dense", {1: 0.72, 64: 0.75}),
    Wanted("ResNet-56 CIFAR", "resnet56", "dense", {1: 0.72, 64: 0.75}),
)
MEAN = 0.65                                                     # geometric mean at one thread, batch 1 and 64
TABLE = tuple(dict.fromkeys(row.model for row in TARGETS))      # the models of the table, in its order
MODELS = tuple(dict.fromkeys((*TABLE, *ARCHITECTURES)))
ODD = 0.6                                                       # of the width is left, rounded to an odd number


def wanted(model: str, network: str) -> Wanted | None:
    return next((row for row in TARGETS if (row.model, row.network) == (model, network)), None)


def networks(name: str, model: nn.Module, x: Tensor, shares: Sequence[float] | None = None) -> tuple[Network, ...]:
    """The dense network and what prunekern makes of it, proven.

    shares: of the MACs to prune to; None for the networks that the table of targets names.
    """
    names: Iterable[str] = (row.network for row in TARGETS if row.model == name and row.network != "dense")
    pruned = {which: narrowed(model, x, which) for which in names} if shares is None else {
        f"{share:.0%} MACs": prunekern.prune(model, x, prunekern.Target(macs=share)) for share in shares}
    found = {"dense": model, **{which: result.model for which, result in pruned.items()}}
    costs = {which: prunekern.profile(module, x) for which, module in found.items()}
    return tuple(Network(which, module, costs[which].macs, costs[which].params) for which, module in found.items())


def narrowed(model: nn.Module, x: Tensor, which: str) -> Pruned:
    """Every layer cut alike: 'half' leaves half of its channels, 'odd' an odd number near 60 % of them."""
    groups = prunekern.groups_of(model, x)
    return prunekern.prune(model, x, prunekern.Target(layers=shares_of(groups, which)))


def shares_of(groups: Groups, which: str) -> dict[str, float]:
    """Layer -> share of its channels to keep."""
    if which == "half":
        return {family.name: 0.5 for family in groups}
    return {family.name: odd(family.channels) / family.channels for family in groups}


def odd(channels: int) -> int:
    """The odd number nearest to 60 % of the channels."""
    return max(1, 2 * int(ODD * channels / 2) + 1)
