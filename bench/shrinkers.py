"""Structured pruners under one interface: half of all channels that can go, and how exact the result is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prunekern import Target, lower
from prunekern.core.graph import target_name
from prunekern.graph.groups import Groups, find_groups
from prunekern.graph.inputs import Call
from prunekern.graph.labels import label
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.prune.oneshot import Clock, Pruned, cut, propose

HALF = Target(layers={"*": 0.5})
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Shrunk:
    """A smaller network and what is known about it.

    error: max|difference| / max|masked original| in fp64, all weights and statistics drawn at random. blunt: families
    of channels that this would not notice the loss of; teeth: share of the kept channels that it would. frozen: what
    holds channels back, most channels first. facts: whatever else is worth keeping.
    """

    model: nn.Module
    error: float
    teeth: float = 1.0
    blunt: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class NothingToPrune(Exception):
    """Every channel has to stay; the message says what holds them."""


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


def prune_half(model: nn.Module, inputs: Any, stages: Stages | None = None) -> Pruned:
    """``prunekern.prune`` to half of every family, its steps one by one."""
    stages = stages or Stages()
    with stages("trace"):
        graph = trace(model, inputs)
    with stages("label"):
        groups = find_groups(label(graph, REGISTRY))
    if not groups.families:
        raise NothingToPrune("; ".join(held_back(groups)[:3]) or "every channel reaches the output")
    with stages("plan"):
        plan, keep = propose(groups, HALF, ranking="layer")
    return cut(model, groups, keep, plan, clock=stages)


def prunekern(model: nn.Module, call: Call, stages: Stages) -> Shrunk:
    """This library: prune, prove, lower."""
    pruned = prune_half(model, call, stages)
    with stages("lower"):
        lower(pruned.model, call, backend="reference")
    proof, groups, keep = pruned.proof, pruned.groups, pruned.keep
    stuck = [f.name for f in groups if int(keep[f.groups].sum()) > (f.channels + 1) // 2 and f.channels > 1]
    return Shrunk(pruned.model, max(proof.twin_error, proof.real_error), proof.teeth, proof.blunt, held_back(groups),
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
SHRINKERS: dict[str, Shrinker] = {"prunekern": prunekern}
