"""What the layers that read channels know about them: second moments of inputs, curvature of outputs, and downdates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunekern.graph.labels import Labels
from prunekern.prune.contractions import Contraction, contractions
from prunekern.prune.importance.curvature import gated
from prunekern.prune.importance.evidence import Evidence
from prunekern.prune.importance.passes import differentiable, output_of, part, run, splits
from prunekern.prune.leastsquares import Moments

IMAGES, DRAWN = 1024, 256       # rows for moments; rows for curvature, which cost a backward each
ROWS = 65536                    # output positions that moments are taken over
WIDEST = 4608                   # inputs that are held against one another
RIDGE = 1e-3                    # of the mean variance of inputs
AT_ONCE = 1.5e9                 # bytes of activations kept for a backward


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration data tells: of each layer, second moments of inputs and of derivatives at its outputs.

    inputs: [groups of the layer, k, k], centred. outputs: [groups of the layer, o, o], E_v (v^T dy/dout)(..)^T summed
    over positions, for a row. gates: [groups] E (v^T dy/dm)^2 for a row, m a factor on everything that reads a channel.
    """

    inputs: Mapping[fx.Node, Tensor]
    outputs: Mapping[fx.Node, Tensor]
    gates: Tensor


def look(evidence: Evidence) -> tuple[dict[fx.Node, Contraction], Seen]:
    """The layers that read channels, and what the data says of them. Raises InputError without data."""
    axes = evidence.groups.labels.axes
    layers = {node: layer for node, layer in contractions(evidence.graph).items() if (layer.weight, 1) in axes}
    return layers, Seen(_inputs(evidence, layers), *_outputs(evidence, layers))


def _inputs(evidence: Evidence, layers: Mapping[fx.Node, Contraction]) -> dict[fx.Node, Tensor]:
    graph, generator = evidence.graph, torch.Generator().manual_seed(evidence.seed)
    moments = {node: Moments() for node in layers}
    state = {name: tensor.detach() for name, tensor in graph.tensors.items()}

    def before(node: fx.Node, args: tuple[Any, ...], share: float) -> tuple[Any, ...]:
        if node in layers:
            layer, x = layers[node], args[0]
            weight = graph.tensors[layer.weight]
            shape = layer.output(tuple(x.shape), tuple(weight.shape))
            at = layer.positions(shape, int(ROWS * share) + 1, generator)
            moments[node].add(layer.inputs(x, shape, at, tuple(weight.shape[2:])))
        return args
    with torch.no_grad():
        for number, (call, _) in enumerate(evidence.batches_of(IMAGES)):
            run(graph, state, call, number, before=partial(before, share=(call.batch or 1) / IMAGES))
    return {node: found.inputs for node, found in moments.items()}


def _outputs(evidence: Evidence, layers: Mapping[fx.Node, Contraction]) -> tuple[dict[fx.Node, Tensor], Tensor]:
    """Derivatives of random projections of the network's outputs: their second moment is the Gauss-Newton matrix of
    the squared error there, and needs no labels."""
    graph, labels = evidence.graph, evidence.groups.labels
    generator = torch.Generator().manual_seed(evidence.seed)
    found: dict[fx.Node, Tensor] = {}
    gates, seen = torch.zeros(labels.groups, dtype=torch.float64), 0
    with torch.inference_mode(False), torch.enable_grad():
        state, _ = differentiable(graph, ())
        for number, (call, _) in enumerate(_few(evidence)):
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


def _few(evidence: Evidence) -> Any:
    """Batches of as many rows as a backward may hold activations of."""
    graph = evidence.graph
    row = sum(4 * torch.Size(graph.shape(node)).numel() for node in graph.nodes
              if node.op == "call_function" and graph.is_tensor(node)) / max(graph.batch, 1)
    size = max(1, min(64, int(AT_ONCE / max(row, 1))))
    for call, target in evidence.batches_of(DRAWN):
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
    rows = rows.reshape(-1, layer.groups, rows.shape[-1] // layer.groups).transpose(0, 1)
    return (rows.transpose(1, 2) @ rows).double().cpu()


class Reader:
    """A layer (or one group of it, or some of its inputs) from which channels are taken one after another.

    Removing the inputs S and refitting the rest by least squares costs tr(C W_S (H^-1_SS)^-1 W_S^T), with H the second
    moment of the inputs and C the curvature at the outputs; the rest becomes W - W_S (H^-1_SS)^-1 H^-1_S, and H^-1
    loses the same term (Hassibi & Stork 1993, equations 5 and 7, for blocks).
    """

    def __init__(self, ids: Tensor, inputs: Tensor, outputs: Tensor, weight: Tensor) -> None:
        """ids [k]: group of each input. inputs [k, k], outputs [o, o], weight [o, k]; all fp64."""
        lift = RIDGE * float(inputs.diagonal().mean().clamp(min=1e-30))
        self.ids, self.curvature, self.weight = ids, outputs, weight.clone()
        self.inverse = torch.linalg.inv(inputs + lift * torch.eye(len(ids), dtype=inputs.dtype))
        self.blocks: list[tuple[Tensor, Tensor]] = []       # (groups [n], their inputs [n, b]) for every width b
        present, counts = ids.unique(return_counts=True)
        for width in counts.unique().tolist():
            mine = present[counts == width]
            order = ids.argsort(stable=True)
            columns = order[torch.isin(ids[order], mine)].view(len(mine), width)
            self.blocks.append((mine, columns))

    def add_costs(self, total: Tensor, alive: Tensor) -> None:
        """Add to ``total`` [groups] what the removal of each group that is ``alive`` (boolean [groups]) costs here."""
        bent = self.curvature @ self.weight
        for groups, columns in self.blocks:
            left = alive[groups]
            if not bool(left.any()):
                continue
            at = columns[left]
            inverse = self.inverse[at[:, :, None], at[:, None, :]]
            power = torch.einsum("onb,onc->nbc", self.weight[:, at], bent[:, at])
            total[groups[left]] += torch.linalg.solve(inverse, power).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, gone: Tensor) -> None:
        """gone: group ids."""
        at = torch.isin(self.ids, gone).nonzero()[:, 0]
        if not len(at):
            return
        across = torch.linalg.solve(self.inverse[at][:, at], self.inverse[at])       # (H^-1_SS)^-1 H^-1_S
        self.weight -= self.weight[:, at] @ across
        self.inverse -= self.inverse[:, at] @ across
        self.weight[:, at] = 0
        self.inverse[at], self.inverse[:, at] = 0, 0
        self.inverse[at, at] = 1                            # gone inputs must not make anything singular


def readers(labels: Labels, layers: Mapping[fx.Node, Contraction], seen: Seen) -> list[Reader]:
    """A Reader for every group of every layer; layers wider than ``WIDEST`` in parts that ignore one another."""
    made = []
    for node, layer in layers.items():
        if node not in seen.outputs:
            continue                                        # no output depends on it
        weight = labels.graph.tensors[layer.weight].detach().double().cpu()
        taps = weight[0, 0].numel()
        table = labels.axes[layer.weight, 1]
        table = table.expand(layer.groups, -1) if table.dim() == 1 else table
        rows = weight.reshape(layer.groups, -1, weight[0].numel())
        for group in range(layer.groups):
            ids = table[group].repeat_interleave(taps)
            for columns in _parts(ids):
                made.append(Reader(ids[columns], seen.inputs[node][group][columns][:, columns].cpu(),
                                   seen.outputs[node][group], rows[group][:, columns]))
    return made


def _parts(ids: Tensor) -> list[Tensor]:
    """Columns in as few parts as WIDEST allows, no group in two of them where it fits into one."""
    order = ids.argsort(stable=True)
    if len(order) <= WIDEST:
        return [torch.arange(len(ids))]
    ends = [*(ids[order].diff() != 0).nonzero()[:, 0].add(1).tolist(), len(order)]
    parts, start, last = [], 0, 0
    for end in ends:
        if end - start > WIDEST and last > start:
            parts.append(order[start:last])
            start = last
        last = end
    return [*parts, order[start:]]
