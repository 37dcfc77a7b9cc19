"""Networks in which every layer has channels that a criterion must find unimportant, planted by its own notion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.graph.groups import Family, Groups, find_groups
from prunekern.graph.labels import label
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from tests.weights import calibrate_, randomise_

SHAPE = (3, 8, 8)
CLASSES = 5


class Planted(nn.Module):
    """conv, bn, relu, pool; conv, bn, relu, flatten; linear, bn, relu; linear. Three families."""

    widths = (8, 10, 12)

    def __init__(self) -> None:
        super().__init__()
        a, b, c = self.widths
        self.conv1, self.bn1 = nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a)
        self.conv2, self.bn2 = nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)
        self.fc1, self.bn3 = nn.Linear(b * 16, c), nn.BatchNorm1d(c)
        self.fc2 = nn.Linear(c, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.fc1(x.flatten(1))))
        return self.fc2(x)

    def stages(self) -> Iterator[tuple[Any, Any, Tensor]]:
        """(layer, its batch norm, the next layer's weight as [out, channel, rest])."""
        yield self.conv1, self.bn1, self.conv2.weight.flatten(2)
        yield self.conv2, self.bn2, self.fc1.weight.unflatten(1, (-1, 16))
        yield self.fc1, self.bn3, self.fc2.weight.unsqueeze(2)


WEAK = (1, 4, 6)  # the channels that are planted as unimportant in every layer


def lively(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Any:
    randomise_(model).eval()
    calibrate_(model, torch.randn(64, *shape))
    return model


def grouped(model: nn.Module, *inputs: Tensor) -> Groups:
    return find_groups(label(trace(model, inputs or (torch.randn(2, *SHAPE),)), REGISTRY))


def data(rows: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, *SHAPE, generator=generator), torch.randint(
        0, CLASSES, (rows,), generator=generator
    )


def ranked(values: Tensor, family: Family) -> list[int]:
    """Channels of a family, the first to go first."""
    return values[family.groups].argsort(stable=True).tolist()


def _small_everywhere(layer: Any, norm: Any, after: Tensor) -> None:
    for tensor in (layer.weight, layer.bias, norm.weight, norm.bias):
        tensor[list(WEAK)] *= 0.05
    after[:, list(WEAK)] *= 0.05


def _small_scale(layer: Any, norm: Any, after: Tensor) -> None:
    norm.weight[list(WEAK)] = norm.weight[list(WEAK)].sign() * 0.01
    layer.weight[list(WEAK)] *= 20


def _unread(layer: Any, norm: Any, after: Tensor) -> None:
    after[:, list(WEAK)] = 0
    layer.weight[list(WEAK)] *= 20


def _replaceable(layer: Any, norm: Any, after: Tensor) -> None:
    layer.weight += 3  # a small distance and a large norm
    others = [i for i in range(len(layer.weight)) if i not in WEAK]
    layer.weight[list(WEAK)] = 1.01 * layer.weight[others].mean(0)


def _quiet(layer: Any, norm: Any, after: Tensor) -> None:
    norm.weight[list(WEAK)], norm.bias[list(WEAK)] = 0.5, 0.0  # often above zero, never far
    others = [i for i in range(len(norm.bias)) if i not in WEAK]
    norm.weight[others], norm.bias[others] = 40.0, -20.0
    layer.weight[list(WEAK)] *= 50
    after[:, list(WEAK)] *= 50


def _rarely_on(layer: Any, norm: Any, after: Tensor) -> None:
    norm.weight[:], norm.bias[:] = 1.0, 0.5
    norm.weight[list(WEAK)], norm.bias[list(WEAK)] = 100.0, -130.0  # seldom above zero, then far
    after[:, list(WEAK)] *= 20


PARTNERS = (0, 2, 5)  # what the planted channels copy, where they do


def _copied_filters(layer: Any, norm: Any, after: Tensor) -> None:
    layer.weight[list(WEAK)] = 0.9 * layer.weight[list(PARTNERS)]
    after[:, list(WEAK)] *= 20


def _copied_signals(layer: Any, norm: Any, after: Tensor) -> None:
    for tensor in (layer.weight, layer.bias):
        tensor[list(WEAK)] = 7 * tensor[list(PARTNERS)]  # another filter; what follows makes it the same signal
    for tensor in (norm.weight, norm.bias):
        tensor[list(WEAK)] = 0.6 * tensor[list(PARTNERS)]
    after[:, list(WEAK)] *= 20


def _alike(layer: Any, norm: Any, after: Tensor) -> None:
    for tensor in (layer.weight, layer.bias, norm.weight, norm.bias):
        tensor[list(WEAK)] = tensor[WEAK[0]].clone()
    norm.weight[:], norm.bias[:] = 1.0, 0.0
    layer.weight[list(WEAK)] *= 20


def _flat(layer: Any, norm: Any, after: Tensor) -> None:
    if layer.weight.dim() < 4:
        _small_everywhere(layer, norm, after)  # no maps: l2 is used there
        return
    norm.weight[list(WEAK)], norm.bias[list(WEAK)] = 0.0, 3.0  # the same at all pixels
    layer.weight[list(WEAK)] *= 20


PLANTED: dict[str, Callable[[Any, Any, Tensor], None]] = {
    "l1": _small_everywhere, "l2": _small_everywhere, "lamp": _small_everywhere, "bn_scale": _small_scale,
    "taylor": _unread, "fisher": _unread, "obd": _unread, "fpgm": _replaceable, "activation": _quiet,
    "apoz": _rarely_on, "cosine": _copied_filters, "cosine_activation": _copied_signals, "hrank": _flat, "chip": _alike,
    "obs": _unread,
}  # fmt: skip


def planted_network(name: str) -> Planted:
    """Channels ``WEAK`` of every layer are what criterion ``name`` takes for unimportant."""
    torch.manual_seed(1)
    model: Planted = lively(Planted())
    with torch.no_grad():
        for layer, norm, after in model.stages():
            PLANTED[name](layer, norm, after)
            calibrated = copy.deepcopy(model)  # the next layer sees what it would see after training
            calibrate_(calibrated, data()[0])
            for mine, new in zip(model.buffers(), calibrated.buffers(), strict=True):
                mine.copy_(new)
    return model


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x.view(4, 4)))).view(4, 3)
