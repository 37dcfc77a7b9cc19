"""torch_geometric: its model classes, stacks of its convolutions, and networks that read out whole graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import nn as gnn

from bench.architectures import Builder, Inputs

NODES, EDGES, GRAPHS = 24, 80, 3
IN, HIDDEN, OUT = 12, 32, 5


def edges() -> Tensor:
    return torch.randint(0, NODES, (2, EDGES))


class Stack(nn.Module):
    """Two convolutions with a batch norm and a ReLU between them."""

    def __init__(self, convolution: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm, self.second = convolution(IN, HIDDEN), nn.BatchNorm1d(HIDDEN), convolution(HIDDEN, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x, edge_index))), edge_index)  # type: ignore[no-any-return]


class Readout(nn.Module):
    """A network over nodes, pooled over each graph, and a classifier of graphs."""

    def __init__(self, body: nn.Module, pool: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body, self.pool, self.head = body, pool, nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.pool(self.body(x, edge_index).relu(), batch, GRAPHS))  # type: ignore[no-any-return]


def nodes(make: Callable[[], nn.Module]) -> tuple[nn.Module, Inputs]:
    return make(), (torch.randn(NODES, IN), edges())


def graphs(body: Callable[[], nn.Module], pool: Callable[..., Tensor]) -> tuple[nn.Module, Inputs]:
    return Readout(body(), pool), (torch.randn(NODES, IN), edges(), torch.arange(NODES) * GRAPHS // NODES)


def mlp(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(i, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, o))


def pna(i: int, o: int) -> Any:
    return gnn.PNAConv(i, o, aggregators=["mean", "max", "std"], scalers=["identity", "amplification"],
                       deg=torch.tensor([0, 4, 8, 8, 4]))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "GCN": gnn.GCN, "GraphSAGE": gnn.GraphSAGE, "GIN": gnn.GIN, "GAT": partial(gnn.GAT, heads=4),
    "GATv2": partial(gnn.GAT, heads=4, v2=True), "EdgeCNN": gnn.EdgeCNN, "GCN-jk-cat": partial(gnn.GCN, jk="cat"),
    "GraphSAGE-jk-max": partial(gnn.GraphSAGE, jk="max"), "GIN-jk-lstm": partial(gnn.GIN, jk="lstm"),
    "GCN-norm": partial(gnn.GCN, norm="BatchNorm"), "GraphSAGE-max": partial(gnn.GraphSAGE, aggr="max"),
}
CONVOLUTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "GCNConv": gnn.GCNConv, "ChebConv": partial(gnn.ChebConv, K=3), "SAGEConv": gnn.SAGEConv,
    "GraphConv": gnn.GraphConv, "ResGatedGraphConv": gnn.ResGatedGraphConv,
    "GATConv": lambda i, o: gnn.GATConv(i, o, heads=4, concat=False),
    "GATConv-cat": lambda i, o: gnn.GATConv(i, o // 4, heads=4) if o == HIDDEN else gnn.GATConv(i, o),
    "GATv2Conv": lambda i, o: gnn.GATv2Conv(i, o // 4, heads=4) if o == HIDDEN else gnn.GATv2Conv(i, o),
    "TransformerConv": lambda i, o: gnn.TransformerConv(i, o // 4, heads=4) if o == HIDDEN else
    gnn.TransformerConv(i, o),
    "TAGConv": gnn.TAGConv, "GINConv": lambda i, o: gnn.GINConv(mlp(i, o)), "ARMAConv": gnn.ARMAConv,
    "SGConv": partial(gnn.SGConv, K=2), "ClusterGCNConv": gnn.ClusterGCNConv, "GENConv": gnn.GENConv,
    "LEConv": gnn.LEConv, "PNAConv": pna, "EdgeConv": lambda i, o: gnn.EdgeConv(mlp(2 * i, o)),
    "FiLMConv": gnn.FiLMConv, "SuperGATConv": gnn.SuperGATConv, "MFConv": gnn.MFConv,
    "GeneralConv": gnn.GeneralConv, "FeaStConv": gnn.FeaStConv,
}
POOLS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "GCN-mean": (gnn.GCN, gnn.global_mean_pool), "GIN-add": (gnn.GIN, gnn.global_add_pool),
    "GraphSAGE-max-pool": (gnn.GraphSAGE, gnn.global_max_pool), "GAT-mean": (partial(gnn.GAT, heads=4),
                                                                            gnn.global_mean_pool),
}


def model(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return kind(IN, HIDDEN, 3, **options)


BUILDERS: dict[str, Builder] = {
    **{name: partial(nodes, partial(model, kind, out_channels=OUT)) for name, kind in MODELS.items()},
    **{name: partial(nodes, partial(Stack, conv)) for name, conv in CONVOLUTIONS.items()},
    **{name: partial(graphs, partial(model, kind), pool) for name, (kind, pool) in POOLS.items()},
}
