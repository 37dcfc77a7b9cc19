"""Structured pruners under one interface: half of all channels that can go, and how exact the result is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from prunekern import Target, lower, prune
from prunekern.core.graph import target_name
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.prune.oneshot import Clock

HALF = Target(layers={"*": 0.5})
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Shrunk:
    """A smaller network and what is known about it.

    error: max|difference| / max|masked original| in fp64, all weights and statistics drawn at random. blunt: families
    of channels that this would not notice the loss of; teeth: share of the kept channels that it would. frozen: what
    holds channels back, most channels first, or None where the library does not say. facts: whatever else is worth
    keeping.
    """

    model: nn.Module
    error: float
    teeth: float | None = None
    blunt: tuple[str, ...] = ()
    frozen: tuple[str, ...] | None = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Stages(Clock):
    """Seconds of processor time by stage, each announced as it begins: the last one is where things broke."""

    def __init__(self, tell: Tell = lambda stage: None) -> None:
        super().__init__()
        self.tell = tell

    def __call__(self, name: str) -> Clock:
        self.tell(name)
        self._open.append((name, time.process_time()))
        return self

    def __exit__(self, *_: object) -> None:
        name, start = self._open.pop()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def prunekern(model: nn.Module, call: Call, stages: Stages, norms: str = "auto") -> Shrunk:
    """This library: prune, prove, lower. norms: as a ``Policy`` has it; those that run on what remains do so in the
    reference, too, which is what Torch-Pruning is held to."""
    pruned = prune(model, call, HALF, ranking="layer", policy={"norms": norms}, clock=stages)
    with stages("lower"):
        lower(pruned.model, call, backend="reference")
    proof, groups, keep = pruned.proof, pruned.groups, pruned.keep
    stuck = [f.name for f in groups if int(keep[f.groups].sum()) > (f.channels + 1) // 2 and f.channels > 1]
    held = (*held_back(groups), *pruned.plan.notes)
    return Shrunk(pruned.model, max(proof.twin_error, proof.real_error), proof.teeth, proof.blunt,
                  None if stuck and not held else held,
                  {"form": proof.form, "dtype": proof.dtype, "families": len(groups), "not_halved": stuck,
                   "predicted": {name: list(pair) for name, pair in pruned.plan.costs.items()},
                   "notes": [*groups.graph.notes, *proof.notes, *pruned.plan.notes]})


def held_back(groups: Groups) -> tuple[str, ...]:
    """Operators that freeze channels with their reasons, in order of how many they freeze."""
    counts: Counter[str] = Counter()
    for item in groups.labels.frozen:
        counts[f"{target_name(item.node)}: {item.reason}"] += item.labels.numel()
    return tuple(f"{reason} ({count} channels)" for reason, count in counts.most_common())


Shrinker = Callable[[nn.Module, Call, Stages], Shrunk]
OURS, REMAINING = "prunekern", "prunekern-remaining"
PEERS = ("torch-pruning", REMAINING)


def shrinker(library: str) -> Shrinker:
    """The pruner of that name. Raises ImportError where it is not installed."""
    if library in (OURS, REMAINING):
        return partial(prunekern, norms="remaining" if library == REMAINING else "auto")
    from bench.peer_torch_pruning import torch_pruning
    return torch_pruning
