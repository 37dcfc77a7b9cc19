"""What the comparisons of a proof would notice: equality of what nobody feels says nothing.

A network that hides a channel (behind a dead ReLU, a saturated gate, a zero gamma) is equal to any wrong slicing of it.
So it is measured which of the kept groups the outputs of a twin depend on, and joined over the twins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import allow_mutation_on_saved_tensors

from prunekern.graph.evaluate import evaluate, same_dice
from prunekern.graph.groups import Family, Groups
from prunekern.graph.inputs import Call
from prunekern.prune.reference import difference, gated, masked_outputs, restricting

TEETH = 1e-9            # fp64, relative to max|output|: what changes them by less would pass as equal (prove.LIMIT)
TRIES = 8               # families that are really zeroed, per twin
_aten = torch.ops.aten
PASSED_OVER = (torch._C._set_grad_enabled, _aten.set_.default)      # a grad mode; the end of a tensor's life
CUTS = (_aten.detach.default, _aten.detach_.default)                # values that gradients do not pass, but changes do


class Teeth:
    """Which of the kept groups the twins have felt so far: boolean ``seen`` [groups]."""

    def __init__(self, groups: Groups, keep: Tensor) -> None:
        self.groups, self.keep = groups, keep
        self.seen = torch.zeros_like(keep)

    def feel(self, twin: Mapping[str, Tensor], reference: list[Any], call: Call) -> None:
        """Add what one more twin feels. reference: its masked outputs on these inputs.

        One backward pass stands for zeroing each group in turn, at first order. It misses kinks (a sign, a choice of
        the largest), so a group of each family that nothing has felt yet is really zeroed.
        """
        self.seen |= self.keep & (_influence(self.groups, self.keep, twin, call) > TEETH)
        for family in self.blunt[:TRIES]:
            group, fewer = self._kept(family)[0], self.keep.clone()
            fewer[group] = False
            changed = masked_outputs(self.groups.labels, fewer, twin, call)
            self.seen[group] = difference(changed, reference) > TEETH

    @property
    def blunt(self) -> list[Family]:
        """Families of whose kept groups none was felt."""
        return [f for f in self.groups if len(ids := self._kept(f)) and not bool(self.seen[ids].any())]

    @property
    def share(self) -> float:
        """Of the kept groups, those that were felt."""
        kept = torch.cat([torch.zeros(0, dtype=torch.long), *(self._kept(family) for family in self.groups)])
        return float(self.seen[kept].double().mean()) if len(kept) else 1.0

    def _kept(self, family: Family) -> Tensor:
        return family.groups[self.keep[family.groups]]


def _influence(groups: Groups, keep: Tensor, twin: Mapping[str, Tensor], call: Call) -> Tensor:
    """How far the loss of each group moves the outputs, at first order: [groups], relative to max|output|.

    The root mean square over an output's elements (not more than the largest difference, which is what equality is
    judged by), estimated by its projection on a random direction.
    """
    try:
        return _gradient(groups, keep, twin, call, out_of_place=False).abs()
    except RuntimeError:        # autograd cannot write into one of several views; without writes, it need not
        return _gradient(groups, keep, twin, call, out_of_place=True).abs()


def _gradient(groups: Groups, keep: Tensor, twin: Mapping[str, Tensor], call: Call, out_of_place: bool) -> Tensor:
    """Of the outputs' random projection, with respect to a switch per group."""
    labels = groups.labels
    switch = keep.to(torch.float64).requires_grad_(True)
    restricted = restricting(labels, keep)

    def instead(node: fx.Node, values: tuple[Any, ...]) -> Any:
        if node.target in CUTS:
            return values[0]
        if node.target in PASSED_OVER and not node.users:
            return None
        return restricted(node, values) if restricted is not None else NotImplemented
    with torch.enable_grad(), same_dice(), allow_mutation_on_saved_tensors():
        outputs = evaluate(groups.graph, twin, call.args, call.kwargs, before=gated(labels, switch), instead=instead,
                           out_of_place=out_of_place)
        total = _projected(outputs)
        if total.requires_grad:
            total.backward()
    return switch.grad if switch.grad is not None else torch.zeros_like(switch)


def _projected(outputs: list[Any]) -> Tensor:
    """The sum of all outputs' products with random directions, each relative to its largest element."""
    total = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for out in outputs:
        if isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad and out.numel():
            direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) / out.numel() ** 0.5
            total = total + ((out * direction).sum() / out.detach().abs().max().clamp(min=1e-30)).to(total)
    return total
