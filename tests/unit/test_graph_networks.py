"""Graph networks called as users call them: nodes [N, C], edges [2, E], and the graph of each node [N]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern import Target, prune
from prunekern.backends import lower
from prunekern.errors import LoweringError, TraceError
from prunekern.graph.inputs import Call
from prunekern.graph.labels import frozen_report
from prunekern.graph.trace import trace
from tests.pruning import groups_of
from tests.tolerances import assert_equal_fp64
from tests.weights import randomise_

NODES, EDGES, FEATURES = 10, 30, 7


def sample(nodes: int = NODES, edges: int = EDGES, graphs: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, nodes, (2, edges), generator=generator)
    return (torch.randn(nodes, FEATURES, generator=generator), numbers, torch.arange(nodes) * graphs // nodes)


class Mean(nn.Module):
    """A linear layer, messages along edges, their mean at each node: GraphSAGE without itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.lin(x).index_select(0, edges[0])
        index = edges[1].view(-1, 1).expand_as(messages)
        total = x.new_zeros(x.shape[0], messages.shape[1]).scatter_add_(0, index, messages)
        degree = torch.zeros(x.shape[0])                 # of the default type, and then of its type by name
        degree = degree.scatter_add_(0, edges[1], torch.ones(edges.shape[1], dtype=degree.dtype))
        return total / degree.clamp(min=1).pow_(0.5).unsqueeze(1)


class WithoutLoops(Mean):
    """Drops edges from a node to itself first: how many are left depends on the data."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges[:, edges[0] != edges[1]]
        loops = torch.arange(x.shape[0]).repeat(2, 1)
        return super().forward(x, torch.cat((edges, loops), 1))


class Heads(nn.Module):
    """Attention over the edges of each node, as GATConv has it: heads and their width are attributes."""

    def __init__(self, inputs: int, heads: int, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, heads * width, bias=False)
        self.score = nn.Parameter(torch.empty(1, heads, width))
        self.heads, self.width = heads, width

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.lin(x).view(-1, self.heads, self.width)
        scores = F.leaky_relu((x * self.score).sum(-1)[edges[0]], 0.2)
        weights = (scores - scores.amax(0, keepdim=True)).exp()
        index = edges[1].view(-1, 1).expand_as(weights)
        total = x.new_zeros(x.shape[0], self.heads).scatter_add_(0, index, weights)
        messages = x[edges[0]] * (weights / total[edges[1]]).unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, edges[1], messages).flatten(1)


class Graphs(nn.Module):
    """Two layers, then (with a third input) one vector per graph, of which the number is read out of the data."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(width, 3)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor | None = None) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x, edges)), edges))
        if graph is not None:
            index = graph.view(-1, 1).expand_as(x)
            x = x.new_zeros(int(graph.max()) + 1, x.shape[1]).scatter_reduce_(0, index, x, "amax", include_self=False)
        return self.head(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mean": lambda: Graphs(Mean(FEATURES, 16), Mean(16, 6)),
    "without loops": lambda: Graphs(WithoutLoops(FEATURES, 16), WithoutLoops(16, 6)),
    "heads": lambda: Graphs(Heads(FEATURES, 4, 5), Mean(20, 6)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(NETWORKS[name]()).eval()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_channels_leave(name: str, pooled: bool) -> None:
    """The user's class comes back, for any graph; edges that loop come and go."""
    inputs = sample() if pooled else sample()[:2]
    result = prune(made(name), inputs, Target(layers={"*": 0.5}), criterion="l1")
    assert isinstance(result.model, Graphs)
    assert result.model.head.in_features == 3
    first = result.model.first
    assert first.lin.out_features == (10 if isinstance(first, Heads) else 8)
    for nodes, edges, graphs in ((13, 41, 3), (5, 4, 1)):
        out = result.model(*sample(nodes, edges, graphs, seed=1)[:len(inputs)])
        assert out.shape == (graphs if pooled else nodes, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_frozen_on_the_way(name: str) -> None:
    assert frozen_report(groups_of(made(name), sample()).labels) == []


def test_sizes_from_data_are_measured_and_assumed() -> None:
    """How many edges are left is free in the trace; how many graphs there are is not, and the notes say so."""
    graph = trace(made("without loops"), sample())
    loops = int((sample()[1][0] == sample()[1][1]).sum())
    assert loops
    texts = {str(dim) for dims in graph.dims.values() if isinstance(dims, tuple) for dim in dims}
    assert {f"~{EDGES - loops}", f"~N+{EDGES - loops}"} <= texts
    assert graph.free_batch
    assert any("reads 1 numbers out of its integer inputs" in note for note in graph.notes)
    assert not any("numbers" in note for note in trace(made("without loops"), sample()[:2]).notes)


def test_rows_that_belong_together_are_never_resized() -> None:
    call = Call(sample(), {})
    assert call.whole
    assert call.resized(2) is call
    assert trace(made("mean"), sample()).batch == NODES
    tokens = Call((torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3)), {})
    assert not tokens.whole
    assert tokens.resized(2).batch == 2


def test_a_branch_on_values_is_not_assumed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(FEATURES, 4)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.lin(x) if bool(edges.max() > 3) else self.lin(2 * x)
    with pytest.raises(TraceError):
        trace(Branching().eval(), sample()[:2])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["mean", "heads"])
def test_lowered(name: str, backend: str) -> None:
    model = made(name).double()
    x, edges, _ = sample()
    lowered = lower(model, (x.double(), edges), backend=backend)
    for nodes in (NODES, 13):
        x, edges, _ = sample(nodes, seed=2)
        with torch.no_grad():
            assert_equal_fp64([lowered(x.double(), edges)], [model(x.double(), edges)])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sizes_that_the_data_makes_are_those_of_the_example(backend: str) -> None:
    model, (x, edges, _) = made("without loops"), sample()
    lowered = lower(model, (x, edges), backend=backend)
    with torch.no_grad():
        assert torch.allclose(lowered(x * 2, edges), model(x * 2, edges), atol=1e-5)
    loops = edges.clone()
    loops[1, :3] = loops[0, :3]
    with pytest.raises(LoweringError, match=r"was laid out for.*Lower the module again"):
        lowered(x, loops)


def geometric(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers: Any = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    torch.manual_seed(0)

    def dense(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 12), nn.ReLU(), nn.Linear(12, outputs))
    pair = {
        "GCNConv": (layers.GCNConv(FEATURES, 16), layers.GCNConv(16, 6)),
        "SAGEConv": (layers.SAGEConv(FEATURES, 16), layers.SAGEConv(16, 6, aggr="max")),
        "GATConv": (layers.GATConv(FEATURES, 5, heads=4), layers.GATConv(20, 6)),
        "GATv2Conv": (layers.GATv2Conv(FEATURES, 5, heads=4), layers.GATv2Conv(20, 6)),
        "GINConv": (layers.GINConv(dense(FEATURES, 16)), layers.GINConv(dense(16, 6))),
    }[name]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = *pair, nn.Linear(6, 3)

        def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
            x = F.relu(self.second(F.relu(self.first(x, edges)), edges))
            return self.head(layers.global_mean_pool(x, graph))
    return Net().eval(), sample()


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv", "GATv2Conv", "GINConv"])
def test_torch_geometric(name: str) -> None:
    model, inputs = geometric(name)
    result = prune(model, inputs, Target(layers={"*": 0.5}), criterion="l1")
    assert type(result.model) is type(model)
    assert result.model.head.in_features == 3
    assert sum(p.numel() for p in result.model.parameters()) < 0.65 * sum(p.numel() for p in model.parameters())
    assert result.model(*sample(13, 41, 3, seed=1)).shape == (3, 3)
