"""What the layers that read channels know about them: second moments of inputs, curvature of outputs, and downdates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph
from prunekern.core.labels import FIXED
from prunekern.graph.labels import Labels
from prunekern.prune.contractions import Contraction, contractions
from prunekern.prune.importance.evidence import Evidence
from prunekern.prune.importance.passes import Batch, differentiable, first, output_of, part, run, splits
from prunekern.prune.leastsquares import Moments, at_least_single
from prunekern.prune.reference import gated

IMAGES, DRAWN = 1024, 256       # rows for moments; rows for curvature, which cost a backward each
ROWS = 65536                    # output positions that moments are taken over,
NARROW, EACH = 1152, 8          # or so many times the inputs of a layer that has more than so many
WIDEST, PART = 4608, 2048       # inputs that are held against one another; of a layer with more, parts of so many
RIDGE = 1e-3                    # of the mean variance of inputs
AT_ONCE = 1.5e9                 # bytes of activations kept for a backward

Slices = dict[tuple[fx.Node, int], list[Tensor]]
"""Of each layer and each of its groups: inputs [k] that are held against one another, one part or several."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration data tells: of each layer, second moments of inputs and of derivatives at its outputs.

    inputs: [k, k] of each group and part of a layer's inputs, centred. outputs: [groups of the layer, o, o],
    E_v (v^T dy/dout)(..)^T summed over positions, for a row; its diagonal only, [groups, o], for more than WIDEST
    outputs. gates: [groups] E (v^T dy/dm)^2 for a row, m a factor on everything that reads a channel.
    """

    inputs: Mapping[tuple[fx.Node, int], list[Tensor]]
    outputs: Mapping[fx.Node, Tensor]
    gates: Tensor


def look(evidence: Evidence) -> tuple[dict[fx.Node, Contraction], Slices, Seen]:
    """The layers that read channels, their inputs, and what the data says of them. Raises InputError without data."""
    labels = evidence.groups.labels
    layers = {node: layer for node, layer in contractions(evidence.graph).items()
              if bool((labels.axes.get((layer.weight, 1), torch.tensor(FIXED)) != FIXED).any())}
    slices: Slices = {}
    for node, layer in layers.items():
        for group, ids in enumerate(_ids(labels, layer)):
            slices[node, group] = _parts(ids)
    batches = list(evidence.batches_of(_whole(evidence.graph, IMAGES)))      # gone through twice
    return layers, slices, Seen(_inputs(evidence, layers, slices, batches), *_outputs(evidence, layers, batches))


def _whole(graph: Graph, rows: int) -> int:
    """So many rows in batches as the network takes them."""
    return rows if graph.free_batch else max(rows // max(graph.batch, 1), 1) * graph.batch


def _ids(labels: Labels, layer: Contraction) -> Tensor:
    """The group of each input: [groups of the layer, k]."""
    weight = labels.graph.tensors[layer.weight]
    table = labels.axes[layer.weight, 1]
    table = table.expand(layer.groups, -1) if table.dim() == 1 else table
    return table.repeat_interleave(weight[0, 0].numel(), 1)


def _inputs(evidence: Evidence, layers: Mapping[fx.Node, Contraction], slices: Slices,
            batches: list[Batch]) -> dict[tuple[fx.Node, int], list[Tensor]]:
    graph, generator = evidence.graph, torch.Generator().manual_seed(evidence.seed)
    moments = {key: [Moments() for _ in parts] for key, parts in slices.items()}
    state = {name: tensor.detach() for name, tensor in graph.tensors.items()}
    images = sum(call.batch or 1 for call, _ in batches)

    def before(node: fx.Node, args: tuple[Any, ...], share: float) -> tuple[Any, ...]:
        if node in layers:
            layer, x, weight = layers[node], args[0], graph.tensors[layers[node].weight]
            shape, width = layer.output(tuple(x.shape), tuple(weight.shape)), weight[0].numel()
            rows = ROWS if width <= NARROW else min(ROWS, max(ROWS // 4, EACH * width))
            for at in layer.parts(layer.positions(shape, int(rows * share) + 1, generator), width * layer.groups):
                read = layer.inputs(x, shape, at, tuple(weight.shape[2:]))
                for group in range(layer.groups):
                    for found, columns in zip(moments[node, group], slices[node, group], strict=True):
                        mine = read[:, group] if len(columns) == width else read[:, group, columns]
                        found.add(mine[:, None])
        return args
    with torch.no_grad():
        for number, (call, _) in enumerate(batches):
            run(graph, state, call, number, before=partial(before, share=(call.batch or 1) / images))
    return {key: [part.inputs[0].cpu() for part in parts] for key, parts in moments.items() if parts[0].rows}


def _outputs(evidence: Evidence, layers: Mapping[fx.Node, Contraction],
             batches: list[Batch]) -> tuple[dict[fx.Node, Tensor], Tensor]:
    """Derivatives of random projections of the network's outputs: their second moment is the Gauss-Newton matrix of
    the squared error there, and needs no labels."""
    graph, labels = evidence.graph, evidence.groups.labels
    generator = torch.Generator().manual_seed(evidence.seed)
    found: dict[fx.Node, Tensor] = {}
    seen = 0
    with torch.inference_mode(False), torch.enable_grad():
        gates = torch.zeros(labels.groups, dtype=torch.float64)
        state, _ = differentiable(graph, ())
        for number, (call, _) in enumerate(_few(graph, batches)):
            values: dict[fx.Node, Tensor] = {}
            gate = torch.ones(labels.groups, dtype=torch.float64, requires_grad=True)

            def after(node: fx.Node, value: Any, values: dict[fx.Node, Tensor] = values) -> None:
                if node in layers and value.requires_grad:
                    values[node] = value
            output = output_of(graph, state, call, number, before=gated(labels, gate), after=after)
            total = _projected(output, generator)
            if total is None:
                continue
            gradients = torch.autograd.grad(total, [gate, *values.values()], allow_unused=True)
            if gradients[0] is not None:
                gates += gradients[0].cpu().square()     # of independent projections: crossed terms vanish on average
            for node, gradient in zip(values, gradients[1:], strict=True):
                if gradient is not None:
                    square = _square(layers[node], gradient.detach())
                    found[node] = found[node] + square if node in found else square
            seen += call.batch or 1
    return {node: square / max(seen, 1) for node, square in found.items()}, gates / max(seen, 1)


def _few(graph: Graph, batches: list[Batch]) -> Iterator[Batch]:
    """Batches of as many rows as a backward may hold activations of."""
    row = sum(4 * torch.Size(graph.shape(node)).numel() for node in graph.nodes
              if node.op == "call_function" and graph.is_tensor(node)) / max(graph.batch, 1)
    size = max(1, min(64, int(AT_ONCE / max(row, 1))))
    for call, target in first(batches, _whole(graph, DRAWN)):
        if not splits(call) or not graph.free_batch:
            yield call, target
            continue
        for start in range(0, call.batch or 0, size):
            yield part(call, target, start, start + size)


def _projected(output: Any, generator: torch.Generator) -> Tensor | None:
    """A random direction of every output, each in units of its own spread."""
    total = None
    for out in pytree.tree_leaves(output):
        if isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad:
            direction = torch.randn(out.shape, generator=generator).to(out)
            term = (out * direction).sum() / out.detach().std(correction=0).clamp(min=1e-12)
            total = term if total is None else total + term
    return total


def _square(layer: Contraction, gradient: Tensor) -> Tensor:
    rows = gradient.movedim(1, -1) if layer.spatial else gradient
    rows = at_least_single(rows.reshape(-1, layer.groups, rows.shape[-1] // layer.groups).transpose(0, 1))
    if rows.shape[-1] > WIDEST:
        return rows.square().sum(1).double().cpu()
    return (rows.transpose(1, 2) @ rows).double().cpu()


class Reader:
    """A layer (or one group of it, or some of its inputs) from which channels are taken one after another.

    Removing the inputs S and refitting the rest by least squares costs tr(C W_S (H^-1_SS)^-1 W_S^T), with H the second
    moment of the inputs and C the curvature at the outputs; the rest becomes W - W_S (H^-1_SS)^-1 H^-1_S, and H^-1
    loses the same term (Hassibi & Stork 1993, equations 5 and 7, for blocks). What is gone is dropped from all of them.
    """

    def __init__(self, ids: Tensor, inputs: Tensor, outputs: Tensor, weight: Tensor) -> None:
        """ids [k]: group of each input. inputs [k, k], outputs [o, o] or its diagonal [o], weight [o, k]; all fp64."""
        lift = RIDGE * float(inputs.diagonal().mean().clamp(min=1e-30))
        lifted = inputs.clone()
        lifted.diagonal().add_(lift)
        factor, failed = torch.linalg.cholesky_ex(lifted)
        self.inverse = torch.linalg.pinv(lifted, hermitian=True) if int(failed) else torch.cholesky_inverse(factor)
        self.ids, self.weight = ids, weight.clone()
        self.bent = outputs @ weight if outputs.dim() == 2 else outputs[:, None] * weight       # C W
        self.blocks = _blocks(ids)

    def add_costs(self, total: Tensor, alive: Tensor) -> None:
        """Add to ``total`` [groups] what the removal of each group that is ``alive`` (boolean [groups]) costs here."""
        for groups, columns in self.blocks:
            left = alive[groups]
            if bool(left.any()):
                total[groups[left]] += self._costs(columns[left])

    def joint(self, gone: Tensor) -> float:
        """What removing these groups together costs."""
        at = torch.isin(self.ids, gone).nonzero()[:, 0]
        return float(self._costs(at[None])[0]) if len(at) else 0.0

    def _costs(self, at: Tensor) -> Tensor:
        """at [n, b]: columns that leave together -> [n]."""
        inverse = self.inverse[at[:, :, None], at[:, None, :]]
        power = self.weight[:, at].permute(1, 2, 0) @ self.bent[:, at].permute(1, 0, 2)
        costs: Tensor = torch.linalg.solve(inverse, power).diagonal(dim1=1, dim2=2).sum(1)
        return costs

    def remove(self, gone: Tensor) -> None:
        """gone: group ids."""
        mask = torch.isin(self.ids, gone)
        at, left = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        if not len(at):
            return
        rows = self.inverse[at]
        across = torch.linalg.solve(rows[:, at], rows[:, left])                 # (H^-1_SS)^-1 H^-1_S
        self.inverse = self.inverse[left][:, left].addmm_(rows[:, left].T, across, alpha=-1)
        self.weight = self.weight[:, left] - self.weight[:, at] @ across
        self.bent = self.bent[:, left] - self.bent[:, at] @ across
        self.ids = self.ids[left]
        self.blocks = _blocks(self.ids)


def _blocks(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(groups [n], their inputs [n, b]) for every b."""
    present, counts = ids.unique(return_counts=True)
    order = ids.argsort(stable=True)
    of = counts.repeat_interleave(counts)                   # of the group of each in that order
    return [(present[counts == width], order[of == width].view(-1, width)) for width in counts.unique().tolist()]


def readers(labels: Labels, layers: Mapping[fx.Node, Contraction], slices: Slices, seen: Seen) -> list[Reader]:
    """A Reader for every group of every layer; layers wider than ``WIDEST`` in parts that ignore one another."""
    made = []
    for node, layer in layers.items():
        if node not in seen.outputs or (node, 0) not in seen.inputs:
            continue                                        # no output depends on it
        weight = labels.graph.tensors[layer.weight].detach().double().cpu()
        rows = weight.reshape(layer.groups, -1, weight[0].numel())
        for group, ids in enumerate(_ids(labels, layer)):
            for columns, inputs in zip(slices[node, group], seen.inputs[node, group], strict=True):
                made.append(Reader(ids[columns], inputs, seen.outputs[node][group], rows[group][:, columns]))
    return made


def _parts(ids: Tensor) -> list[Tensor]:
    """Inputs in parts, no group in two of them where it fits into one."""
    if len(ids) <= WIDEST:
        return [torch.arange(len(ids))]
    order = ids.argsort(stable=True)
    ends = [*(ids[order].diff() != 0).nonzero()[:, 0].add(1).tolist(), len(order)]
    parts, start, last = [], 0, 0
    for end in ends:
        if end - start > PART and last > start:
            parts.append(order[start:last])
            start = last
        last = end
    parts.append(order[start:])
    return [piece for whole in parts for piece in (whole.split(PART) if len(whole) > WIDEST else (whole,))]
