"""Squared gradients: the diagonal of the Fisher information, by weights and by whole groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekern.core.labels import FIXED
from prunekern.graph.inputs import Call
from prunekern.graph.labels import Labels
from prunekern.prune.importance.passes import (
    Batch,
    Loss,
    differentiable,
    drawn,
    first,
    loss_of,
    output_of,
    part,
    splits,
)
from prunekern.prune.reference import gated

ROWS = 1024
"""Rows of the data that are looked at, at most: each costs a forward and a backward of its own."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """Means over samples of squared derivatives of the loss of one sample.

    weights: name -> E[(dL/dw)^2], of every floating-point parameter, fp32 or fp64 (the Fisher diagonal, which is the
    diagonal of the Gauss-Newton matrix where the loss is a cross-entropy and its labels are drawn from the output).
    gates:   E[(dL/dm)^2] [groups] fp64, CPU; m multiplies all that consumers read of a group: 1 as it is, 0 removed.
    samples: how many squares were averaged. rows: of data. drawn: whether labels were drawn from the output.
    """

    weights: Mapping[str, Tensor]
    gates: Tensor
    samples: int
    rows: int
    drawn: bool


def curvature(
    labels: Labels, weights: Iterable[str], batches: Iterable[Batch], loss: Loss | None, seed: int
) -> Curvature:
    """Squares of per-sample gradients over the first ``ROWS`` rows, exactly, one row at a time.

    Where rows cannot be run alone (a forward of fixed batch size, the nodes of one graph) a batch of B rows is one
    sample: B times the square of its mean gradient, of which the expectation is the same under drawn labels.
    Targets are the data's own; where it has none, and no loss is given, they are drawn from the model's output.
    """
    graph = labels.graph
    generator = torch.Generator().manual_seed(seed)
    samples = rows = 0
    guessed = False
    with torch.inference_mode(False), torch.enable_grad():
        state, leaves = differentiable(graph, weights)
        squares = {
            name: torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32), requires_grad=False)
            for name, leaf in leaves.items()
        }
        gates = torch.zeros(labels.groups, dtype=torch.float64)
        for number, call, target in _samples(first(batches, ROWS), graph.free_batch):
            size = call.batch or 1
            gate = torch.ones(labels.groups, dtype=torch.float64, requires_grad=True)
            output = output_of(graph, state, call, number, before=gated(labels, gate))
            if target is None and loss is None:
                target, guessed = drawn(output, generator), True
            value = loss_of(loss, output, target, number)
            found = torch.autograd.grad(value, [gate, *leaves.values()], allow_unused=True)
            if found[0] is not None:
                gates += size * found[0].square()
            for name, gradient in zip(leaves, found[1:], strict=True):
                if gradient is not None:
                    squares[name] += size * gradient.to(squares[name].dtype).square()
            samples, rows = samples + 1, rows + size
    gates[FIXED] = 0
    return Curvature({name: s / samples for name, s in squares.items()}, gates / samples, samples, rows, guessed)


def _samples(batches: Iterable[Batch], alone: bool) -> Iterator[tuple[int, Call, Any]]:
    """(batch number, inputs, target) of each row, or of each batch whose rows belong together."""
    for number, (call, target) in enumerate(batches):
        if alone and splits(call):
            for row in range(call.batch or 0):
                yield number, *part(call, target, row, row + 1)
        else:
            yield number, call, target
