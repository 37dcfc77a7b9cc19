"""From a network to a proven smaller one, stage by stage: trace, label, plan, slice, rewrite, prove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.conftest import Timed
from bench.verified import hold
from prunekern import Target
from prunekern.core.plan import Plan
from prunekern.graph.evaluate import evaluate
from prunekern.graph.groups import Groups, find_groups
from prunekern.graph.labels import label
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.prune.oneshot import propose
from prunekern.prune.prove import prove
from prunekern.prune.rewrite import rewrite
from prunekern.prune.slice import slice_module
from tests.models import make

NETWORKS = ("fashion", "resnet20", "resnet50", "densenet121")
TARGET = Target(macs=0.5)


@dataclass(frozen=True)
class Stages:
    """A network after every stage."""

    model: nn.Module
    x: Tensor
    groups: Groups
    plan: Plan
    keep: Tensor
    sliced: nn.Module
    graph_form: Any

    def calls(self) -> dict[str, Callable[[], object]]:
        """Every stage as a call that starts from what the one before gave."""
        groups, keep = self.groups, self.keep
        return {"trace": lambda: trace(self.model, self.x),
                "label": lambda: find_groups(label(groups.graph, REGISTRY)),
                "plan": lambda: propose(groups, TARGET),
                "slice": lambda: slice_module(self.model, groups, keep, REGISTRY),
                "rewrite": lambda: rewrite(groups.labels, keep, self.sliced, REGISTRY),
                "prove": lambda: prove(groups, keep, self.graph_form, self.sliced),
                "trace to slice": self.all}

    def all(self) -> nn.Module:
        """Everything but the graph module and the proof."""
        groups = find_groups(label(trace(self.model, self.x), REGISTRY))
        _, keep = propose(groups, TARGET)
        return slice_module(self.model, groups, keep, REGISTRY)


@lru_cache(maxsize=1)
def stages(name: str) -> Stages:
    """Run every stage once and check what each gives: the trace is the model, the plan meets the target, the slice
    is proven."""
    model, (x,) = make(name)
    groups = find_groups(label(trace(model, x), REGISTRY))
    with torch.no_grad():
        wide = {n: t.double() if t.is_floating_point() else t for n, t in groups.graph.tensors.items()}
        (traced,), (exact,) = (evaluate(groups.graph, state, (x.to(dtype),), {}) for state, dtype in
                               ((groups.graph.tensors, torch.float32), (wide, torch.float64)))
        hold(traced, model(x), exact)
    plan, keep = propose(groups, TARGET)
    before, after = plan.costs["macs"]
    assert 0.4 * before < after <= 0.5 * before
    sliced = slice_module(model, groups, keep, REGISTRY)
    graph_form = rewrite(groups.labels, keep, sliced, REGISTRY)
    _, proof = prove(groups, keep, graph_form, sliced)
    assert max(proof.twin_error, proof.real_error) <= proof.limit
    return Stages(model, x, groups, plan, keep, sliced, graph_form)


@pytest.mark.parametrize("stage", ["trace", "label", "plan", "slice", "rewrite", "prove", "trace to slice"])
@pytest.mark.parametrize("name", NETWORKS)
def test_stage(timed: Timed, name: str, stage: str) -> None:
    done = stages(name)
    timed(done.calls()[stage], group=stage, rounds=3, families=len(done.groups))
