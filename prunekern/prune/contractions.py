"""Convolutions and linear layers as least-squares problems: sampled rows of what they read and what they give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekern.core.graph import Graph
from prunekern.core.rule import argument, aten

CONVOLUTIONS = {op: n for n in (1, 2, 3) for op in aten(f"conv{n}d")}
LINEAR = aten("linear")
BYTES = 1 << 28         # of inputs written out at a time


@dataclass(frozen=True)
class Contraction:
    """A layer with a weight of its own: y = sum_k w[o, k] x[k] + b[o] at every output position.

    node: the traced call. weight, bias: state names (bias None where there is none). groups: of a convolution, else 1.
    spatial: how many axes its windows have (0: linear).
    """

    node: fx.Node
    weight: str
    bias: str | None
    groups: int = 1
    spatial: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()       # (before, after) per axis
    dilation: tuple[int, ...] = ()

    @property
    def source(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    def output(self, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
        """The output's shape, for an input's and the weight's."""
        if not self.spatial:
            return (*x[:-1], weight[0])
        sides = zip(x[2:], weight[2:], self.stride, self.padding, self.dilation, strict=True)
        return (x[0], weight[0], *((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides))

    def positions(self, output: tuple[int, ...], rows: int, generator: torch.Generator) -> Tensor:
        """Flat output positions to look at, about ``rows`` in all over the batch: [images, each] (linear: [each])."""
        if not self.spatial:
            total = prod(output[:-1])
            return torch.randperm(total, generator=generator)[:rows] if rows < total else torch.arange(total)
        images, total = output[0], prod(output[2:])
        each = max(1, -(-rows // max(images, 1)))
        if each >= total:
            return torch.arange(total).expand(images, -1)
        return torch.rand(images, total, generator=generator).topk(each, 1).indices

    def rows_of(self, output: tuple[int, ...], at: Tensor) -> Tensor:
        """Which row of the batch each of those positions belongs to: [rows]."""
        if not self.spatial:
            return at // max(prod(output[1:-1]), 1) if len(output) > 1 else torch.zeros_like(at)
        return torch.arange(at.shape[0]).repeat_interleave(at.shape[1])

    def inputs(self, x: Tensor, output: tuple[int, ...], at: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """What the weights meet at those positions: [rows, groups, inputs of a group], in the weight's order."""
        if not self.spatial:
            return x.reshape(-1, 1, x.shape[-1])[at]
        at = at.to(x.device)
        padded = F.pad(x, [side for pair in reversed(self.padding) for side in pair])
        pitch = [prod(padded.shape[3 + axis:]) for axis in range(self.spatial)]
        start, rest = torch.zeros_like(at), at
        offsets = torch.zeros(1, dtype=torch.long, device=x.device)
        for axis in range(self.spatial):
            below = prod(output[3 + axis:])
            start = start + (rest // below) * self.stride[axis] * pitch[axis]
            rest = rest % below
            taps = torch.arange(kernel[axis], device=x.device) * self.dilation[axis] * pitch[axis]
            offsets = (offsets[:, None] + taps).reshape(-1)
        index = (start[:, :, None] + offsets).flatten(1)                      # [images, each x taps]
        found = padded.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1))
        found = found.unflatten(2, (at.shape[1], len(offsets))).transpose(1, 2)     # [images, each, channels, taps]
        rows: Tensor = found.reshape(at.numel(), self.groups, -1)
        return rows

    def parts(self, at: Tensor, inputs: int) -> Iterator[Tensor]:
        """The positions in parts of which ``inputs`` stay small; inputs: of the layer, over all groups."""
        held = at.shape[0] if self.spatial else 1
        yield from at.split(max(1, BYTES // (4 * max(inputs * held, 1))), -1)

    def outputs(self, y: Tensor, at: Tensor) -> Tensor:
        """An activation shaped like the output at those positions: [rows, channels]."""
        if not self.spatial:
            return y.reshape(-1, y.shape[-1])[at]
        at = at.to(y.device)
        return y.flatten(2).gather(2, at[:, None].expand(-1, y.shape[1], -1)).transpose(1, 2).reshape(at.numel(), -1)


def contractions(graph: Graph) -> dict[fx.Node, Contraction]:
    """Every convolution and linear layer whose weight is a parameter that nothing else reads, in order of the graph."""
    found = {}
    for node in graph.nodes:
        if node.target in CONVOLUTIONS or node.target in LINEAR:
            weight, bias = (argument(node, i, name) for i, name in ((1, "weight"), (2, "bias")))
            names = [graph.fqn(arg) if isinstance(arg, fx.Node) else None for arg in (weight, bias)]
            if names[0] is None or (bias is not None and names[1] is None):
                continue
            if all(_own(graph, arg, name) for arg, name in zip((weight, bias), names, strict=True)):
                made = _made(graph, node, names[0], names[1])
                if made is not None:
                    found[node] = made
    return found


def _own(graph: Graph, arg: fx.Node | None, name: str | None) -> bool:
    return arg is None or (len(arg.users) == 1 and isinstance(graph.tensors[name or ""], nn.Parameter))


def _made(graph: Graph, node: fx.Node, weight: str, bias: str | None) -> Contraction | None:
    if node.target in LINEAR:
        return Contraction(node, weight, bias)
    n = CONVOLUTIONS[node.target]
    if len(graph.shape(node)) != n + 2:                       # a single image without a batch
        return None
    stride, padding, dilation = (argument(node, i, name, default) for i, name, default in
                                 ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)))
    kernel = graph.tensors[weight].shape[2:]
    stride, dilation = _each(stride, n), _each(dilation, n)
    if isinstance(padding, str):                              # 'same' puts the odd one behind
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((p, p) for p in _each(padding, n))
    return Contraction(node, weight, bias, argument(node, 6, "groups", 1), n, stride, sides, dilation)


def _each(value: int | list[int], n: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * n if len(values) == 1 else values)
