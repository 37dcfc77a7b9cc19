"""More inputs from few: shifted and mirrored images, where the network itself says that they mean the same to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekern.core.graph import Graph
from prunekern.graph.evaluate import same_dice
from prunekern.graph.inputs import Call
from prunekern.prune.importance.passes import run

SAME = 0.25         # of the outputs' variance: a change of inputs that moves outputs by more makes others of them
SHIFT = 8           # images move by up to so many-th of their sides


@dataclass(frozen=True)
class Vary:
    """Changes that are drawn for each row of a batch. shift: up to one ``SHIFT``-th each way; mirror: left to right,
    every other. Inputs that are no images [N, C, H, W] are as they were."""

    shift: bool = False
    mirror: bool = False

    def __call__(self, call: Call, generator: torch.Generator) -> Call:
        if not (self.shift or self.mirror):
            return call
        return call.map(lambda t: self._drawn(t, generator) if _image(t) else t)

    def _drawn(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.mirror:
            images = torch.where((torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5).to(images.device),
                                 images.flip(3), images)
        if self.shift:
            most = torch.tensor(images.shape[2:]) // SHIFT
            by = (torch.rand(len(images), 2, generator=generator) * (2 * most + 1)).long() - most
            images = _shifted(images, by)
        return images


def varying(graph: Graph, call: Call) -> Vary:
    """Which changes leave the dense network's outputs much as they are on these inputs: by less than ``SAME`` of their
    variance. None where several inputs would have to change together, or where there is none with two spatial axes."""
    images = [t for _, t in call.named_tensors() if _image(t)]
    if len(images) != 1 or any(t.dim() > 1 for _, t in call.named_tensors() if t is not images[0]):
        return Vary()
    rows = len(images[0])
    most = torch.tensor(images[0].shape[2:]) // SHIFT
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).repeat(-(-rows // 4), 1)[:rows]
    with torch.no_grad():
        plain = _outputs(graph, call)
        return Vary(_same(graph, call, plain, lambda t: _shifted(t, corners * most)) and bool(most.any()),
                    _same(graph, call, plain, lambda t: t.flip(3)))


def _image(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point() and min(tensor.shape[2:]) > 1


def _same(graph: Graph, call: Call, plain: list[Tensor], change: Callable[[Tensor], Tensor]) -> bool:
    changed = _outputs(graph, call.map(lambda t: change(t) if _image(t) else t))
    return all(float((b - a).square().sum()) <= SAME * float((a - a.mean(0)).square().sum())
               for a, b in zip(plain, changed, strict=True))


def _outputs(graph: Graph, call: Call) -> list[Tensor]:
    with same_dice():
        found = run(graph, graph.tensors, call, 0)
    return [value.double() for value in found if isinstance(value, Tensor) and value.is_floating_point()]


def _shifted(images: Tensor, by: Tensor) -> Tensor:
    """Each image moved by its own (down, right) [N, 2], zeros coming in."""
    moved = torch.zeros_like(images)
    height, width = images.shape[2:]
    for image, to, (down, right) in zip(images, moved, by.tolist(), strict=True):
        rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
        from_rows = slice(max(-down, 0), height + min(-down, 0))
        from_columns = slice(max(-right, 0), width + min(-right, 0))
        to[:, rows, columns] = image[:, from_rows, from_columns]
    return moved
