"""Where a layer's output lands: through batch norms and additions, up to the activation that it is fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunekern.core.rule import aten
from prunekern.prune.rewrite import FunctionalBatchNorm

ADD, PASSED = aten("add.Tensor", "add_.Tensor"), aten("dropout", "feature_dropout", "clone", "contiguous")
MEASURED = 128      # values of a channel that statistics are taken from, at least


@dataclass(frozen=True)
class Norm:
    """A batch norm with fixed statistics: y = scale x + shift. own: nothing else uses its tensors."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    own: bool

    @property
    def scale(self) -> Tensor:
        return _double(self.weight, self.var, 1) / (self.var.double() + self.eps).sqrt()

    @property
    def shift(self) -> Tensor:
        return _double(self.bias, self.mean, 0) - self.mean.double() * self.scale

    def restate(self, values: Sequence[Tensor]) -> None:
        """Running statistics become those of what it reads (a list of batches), the function staying the same.

        Training then starts from what the norm will see. Left as they are where weight and bias cannot make up for
        it, where little data is there to measure, and in channels that are all but constant.
        """
        count = sum(value[:, 0].numel() for value in values)
        if not self.own or self.weight is None or self.bias is None or count < MEASURED:
            return
        axes = [axis for axis in range(values[0].dim()) if axis != 1]
        mean = sum((value.sum(axes, dtype=torch.float64) for value in values), torch.zeros(())) / count
        shape = [-1 if axis == 1 else 1 for axis in range(values[0].dim())]
        centre = mean.to(at_least(values[0].dtype)).view(shape)
        square = sum(((value - centre).square().sum(axes, dtype=torch.float64) for value in values), torch.zeros(()))
        var = square / max(count - 1, 1)                     # as torch counts them
        fine = mean.isfinite() & var.isfinite() & (var > 1e-6 * (self.var.double() + self.eps))
        scale, shift = self.scale, self.shift
        for tensor, new in ((self.mean, mean), (self.var, var)):
            tensor.copy_(torch.where(fine, new, tensor.double()))
        weight = scale * (self.var.double() + self.eps).sqrt()          # of the statistics as they were rounded
        self.weight.copy_(torch.where(fine, weight, self.weight.double()))
        self.bias.copy_(torch.where(fine, shift + self.mean.double() * self.scale, self.bias.double()))


def at_least(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _double(tensor: Tensor | None, like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value, dtype=torch.float64) if tensor is None else tensor.detach().double()


@dataclass(frozen=True)
class Way:
    """From a layer to where it lands: (node after it, batch norm or the other side of an addition), in order."""

    layer: fx.Node
    parts: tuple[tuple[fx.Node, Norm | fx.Node], ...]

    @property
    def landing(self) -> fx.Node:
        return self.parts[-1][0] if self.parts else self.layer

    @property
    def others(self) -> tuple[fx.Node, ...]:
        return tuple(part for _, part in self.parts if isinstance(part, fx.Node))

    @property
    def norms(self) -> tuple[Norm, ...]:
        return tuple(part for _, part in self.parts if isinstance(part, Norm))

    @property
    def taker(self) -> Norm | None:
        """The norm whose mean can take a bias for a layer which has none: only additions are before it."""
        return self.norms[0] if self.norms and self.norms[0].own else None

    def known(self, rank: Mapping[fx.Node, int]) -> Way:
        """The way up to the first addition whose other side is computed after the layer; rank: when nodes are."""
        late = next((i for i, (_, part) in enumerate(self.parts)
                     if isinstance(part, fx.Node) and rank[part] > rank[self.layer]), len(self.parts))
        return Way(self.layer, self.parts[:late])


def way_of(form: fx.GraphModule, layer: fx.Node, shapes: Mapping[str, Any]) -> Way:
    """Follow a layer's output through batch norms and additions, as long as nothing else reads it.

    shapes: node name -> shape; an addition that makes more of the output than it is ends the way.
    """
    parts: list[tuple[fx.Node, Norm | fx.Node]] = []
    node = layer
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in ADD and not user.kwargs and len(user.args) == 2:
            sides = [arg for arg in user.args if arg is not node]
            if len(sides) != 1 or not isinstance(sides[0], fx.Node) or shapes.get(user.name) != shapes.get(layer.name):
                break
            parts.append((user, sides[0]))
        elif user.op == "call_module" and (norm := norm_of(form, user)) is not None and user.args[0] is node:
            parts.append((user, norm))
        elif not _passes(form, user) or user.args[0] is not node:
            break
        node = user
    return Way(layer, tuple(parts))


def _passes(form: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(form.get_submodule(str(node.target)), nn.modules.dropout._DropoutNd)
    return node.target in PASSED


def norm_of(form: fx.GraphModule, node: fx.Node) -> Norm | None:
    """The batch norm that a call is, if it has fixed statistics."""
    module = form.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, FunctionalBatchNorm):
        return None
    states = [arg if isinstance(arg, fx.Node) else None for arg in node.args[1:5]]
    weight, bias, mean, var = (tensor_of(form, arg) for arg in states)
    if mean is None or var is None:
        return None
    return Norm(weight, bias, mean, var, module.eps, all(arg is None or len(arg.users) == 1 for arg in states))


def tensor_of(form: fx.GraphModule, arg: Any) -> Tensor | None:
    """The tensor that a get_attr node stands for."""
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return None
    path, _, name = str(arg.target).rpartition(".")
    found = getattr(form.get_submodule(path), name)
    return found if isinstance(found, Tensor) else None
