"""Two networks side by side: values in any order that respects the edges, each freed after its last use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph
from prunekern.graph.evaluate import evaluate
from prunekern.graph.trace import trace
from prunekern.prune.lockstep import Walker, ordered
from prunekern.prune.reference import difference
from tests.networks import random_network


def walker(graph: Graph, *batches: tuple[Tensor, ...]) -> Walker:
    state = {name: graph.tensors[fqn].detach() for name, fqn in graph.state.items()}
    return Walker(graph.fx, dict(zip(graph.inputs, zip(*batches, strict=True), strict=True)), state)


def as_evaluated(graph: Graph, *batches: tuple[Tensor, ...]) -> bool:
    with torch.no_grad():
        walked = walker(graph, *batches).outputs()
        return all(difference(mine, evaluate(graph, graph.tensors, batch, {})) < 1e-5
                   for mine, batch in zip(walked, batches, strict=True))


class Inplace(nn.Module):
    """In-place operators on whole values, several outputs of one operator, a buffer that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.LSTM(4, 3, batch_first=True)
        self.register_buffer("scale", torch.tensor([2.0, 3, 4]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu_(self.a(x))
        x += 1
        one, two = x.chunk(2, -1)
        out, (h, _) = self.b(one + two)
        out *= self.scale  # type: ignore[arg-type]
        return out, h.transpose(0, 1)


def test_outputs_are_those_of_the_network() -> None:
    torch.manual_seed(0)
    graph = trace(Inplace().eval(), (torch.randn(2, 4, 5),))
    assert as_evaluated(graph, *((torch.randn(n, 4, 5),) for n in (3, 1, 4)))


class Region(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
        return F.relu(y.float())


def test_regions_are_run() -> None:
    torch.manual_seed(0)
    graph = trace(Region().eval(), (torch.randn(2, 5),))
    assert as_evaluated(graph, (torch.randn(3, 5),))


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed: int) -> None:
    case = random_network(seed)
    graph = trace(case.model, case.args)
    if not any("index_put" in str(node.target) for node in graph.nodes):
        assert as_evaluated(graph, case.args)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        y[:, :2].mul_(3)
        return y * 2


def test_writes_through_views_are_lost_and_never_reach_inputs() -> None:
    x = torch.randn(3, 5)
    graph = trace(Writes().eval(), (x,))
    before = x.clone()
    assert not as_evaluated(graph, (x,))
    assert torch.equal(x, before)


def test_values_are_not_written_by_operators_in_place() -> None:
    torch.manual_seed(0)
    graph = trace(Inplace().eval(), (torch.randn(2, 4, 5),))
    walk = walker(graph, (torch.randn(3, 4, 5),))
    before = next(node for node in graph.nodes if node.name.startswith("linear"))
    walk.keep(before)
    with torch.no_grad():
        walk.reach(before)
        value = walk[before][0].clone()
        walk.reach(next(iter(before.users)))
    assert bool((value < 0).any())
    assert torch.equal(walk[before][0], value)


def test_values_are_freed_after_their_last_use() -> None:
    torch.manual_seed(0)
    graph = trace(Inplace().eval(), (torch.randn(2, 4, 5),))
    walk = walker(graph, (torch.randn(3, 4, 5),))
    kept = next(node for node in graph.nodes if "relu" in node.name)
    walk.keep(kept)
    most = 0
    for node in graph.nodes:
        walk.run(node)
        most = max(most, len(walk._values))
    assert most < len(graph.nodes) - 4
    assert list(walk._values) == [kept]
    walk.drop(kept)
    assert not walk._values


def test_what_nobody_reads_is_freed_at_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    unread = graph.call_function(torch.neg, (x,))
    graph.output((graph.call_function(torch.abs, (x,)),))
    walk = Walker(fx.GraphModule(nn.Module(), graph).graph, {"x": [torch.ones(2)]}, {})
    for node in walk.nodes:
        walk.run(node)
    assert not walk._values
    assert unread.users == {}


def test_any_order_gives_the_same() -> None:
    """Every node as late, or as early, as its edges allow."""
    torch.manual_seed(0)
    graph = trace(Inplace().eval(), (torch.randn(2, 4, 5),))
    batch = (torch.randn(3, 4, 5),)
    want = evaluate(graph, graph.tensors, batch, {})
    backwards: list[Any] = []

    def place(node: fx.Node) -> None:
        for arg in reversed(node.all_input_nodes):
            place(arg)
        if node not in backwards:
            backwards.append(node)
    place(graph.output)
    assert backwards != list(graph.nodes)
    walk = walker(graph, batch)
    for node in backwards[:-1]:
        for leaf in graph.output.all_input_nodes:
            if leaf is node:
                walk.keep(leaf)
        walk.run(node)
    with torch.no_grad():
        assert difference([walk[leaf][0] for leaf in pytree.tree_leaves(graph.output.args[0])], want) < 1e-5


# ---- the order -----------------------------------------------------------------------------------------------


def diamond() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """x -> main1 -> main2, x -> short, main2 + short -> out: in this order."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.neg, (x,), name="first")
    second = graph.call_function(torch.abs, (first,), name="second")
    short = graph.call_function(torch.exp, (x,), name="short")
    total = graph.call_function(torch.add, (second, short), name="total")
    graph.output(total)
    return graph, {node.name: node for node in graph.nodes}


def test_what_is_wanted_comes_first() -> None:
    graph, n = diamond()
    nodes = list(graph.nodes)
    assert [node.name for node in ordered(nodes, {n["second"]: [n["short"]]})] == [
        "x", "first", "short", "second", "total", "output"]
    assert ordered(nodes, {}) == nodes
    assert ordered(nodes, {n["short"]: [n["second"]]}) == nodes


def test_two_that_want_each_other_and_what_cannot_be_had() -> None:
    graph, n = diamond()
    nodes = list(graph.nodes)
    both = ordered(nodes, {n["second"]: [n["short"]], n["short"]: [n["second"]]})
    assert [node.name for node in both] == ["x", "first", "short", "second", "total", "output"]
    assert ordered(nodes, {n["first"]: [n["total"]], n["x"]: [n["x"]]}) == nodes
    for order in (both, ordered(nodes, {n["first"]: [n["short"], n["second"]]})):
        placed: set[fx.Node] = set()
        for node in order:
            assert placed.issuperset(node.all_input_nodes)
            placed.add(node)
        assert len(order) == len(nodes)
