"""A lowered network within ``torch.compile`` and ``torch.export``: one operator, the same values, a free batch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prunekern.backends import BACKENDS, Lowered, lower
from prunekern.backends.custom_op import register
from prunekern.errors import InputError

USABLE = [b.name for b in BACKENDS if b.unavailable() is None and "cpu" in b.devices]
X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4)).eval()


@pytest.fixture(params=USABLE)
def lowered(request: pytest.FixtureRequest) -> Lowered:
    torch.manual_seed(0)
    return lower(network(), X, backend=request.param, verify=False)


class Around(nn.Module):
    """Work before and after the network."""

    def __init__(self, lowered: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lowered = lowered

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.lowered(x * 2))


@pytest.fixture
def graphs() -> list[fx.GraphModule]:
    torch._dynamo.reset()
    return []


def compiled(model: Callable[..., Any], graphs: list[fx.GraphModule], **options: Any) -> Any:
    """As ``aot_eager`` does it, with the graphs that the compiler sees."""
    from torch._dynamo.backends.common import aot_autograd

    def look(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward
    return torch.compile(model, backend=aot_autograd(fw_compiler=look), fullgraph=True, **options)


def operators(graph: fx.GraphModule | fx.Graph) -> list[str]:
    nodes = graph.graph.nodes if isinstance(graph, fx.GraphModule) else graph.nodes
    names = [str(node.target) for node in nodes if node.op == "call_function"]
    return [name for name in names if "getitem" not in name and "sym_size" not in name and "detach" not in name]


def test_compiled_it_is_one_operator(lowered: Lowered, graphs: list[fx.GraphModule]) -> None:
    model = Around(lowered)
    call = compiled(model, graphs)
    assert torch.equal(call(X), model(X))
    assert [operators(graph) for graph in graphs] == [["aten.mul.Tensor", "prunekern.run.default", "aten.sin.default"]]


def test_one_graph_serves_every_batch(lowered: Lowered, graphs: list[fx.GraphModule]) -> None:
    model = Around(lowered)
    call = compiled(model, graphs, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(call(x), model(x))
    assert len(graphs) == 1


def test_inductor(lowered: Lowered) -> None:
    torch._dynamo.reset()
    model = Around(lowered)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(X), model(X))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_one_operator(lowered: Lowered, strict: bool) -> None:
    model = Around(lowered)
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    assert operators(exported.graph) == ["aten.mul.Tensor", "prunekern.run.default", "aten.sin.default"]
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(exported.module()(x), model(x))


def test_saved_graphs_find_their_network(tmp_path: Path) -> None:
    """Where it lives, or where one is registered in its place; else they say what is missing."""
    lowered = lower(network(), X, verify=False)
    expected, key = torch.sin(lowered(X * 2)), lowered.key
    lowered.save(tmp_path / "network")
    torch.export.save(torch.export.export(Around(lowered), (X,)), tmp_path / "graph.pt2")
    graph = torch.export.load(tmp_path / "graph.pt2").module()
    assert torch.equal(graph(X), expected)
    del lowered
    gc.collect()
    with pytest.raises(InputError, match=key):
        graph(X)
    again = Lowered.load(tmp_path / "network")
    register(again, key)
    assert torch.equal(graph(X), expected)


def test_no_gradient_flows_as_in_a_plain_call(lowered: Lowered, graphs: list[fx.GraphModule]) -> None:
    x = X.clone().requires_grad_()
    plain, within = lowered(x), compiled(lambda x: lowered(x) * 1, graphs)(x)
    assert not plain.requires_grad
    assert not within.requires_grad


def test_out(lowered: Lowered, graphs: list[fx.GraphModule]) -> None:
    out = torch.zeros(2, 4)
    found = compiled(lambda x, y: lowered(x, out=y), graphs)(X, out)
    assert torch.equal(out, lowered(X))
    assert torch.equal(found, out)


class Structured(nn.Module):
    def forward(self, x: Tensor, pair: dict[str, Tensor], scale: int = 2) -> dict[str, Any]:
        return {"sum": x + pair["a"] * scale, "rows": x.shape[0], "nested": (pair["b"].relu(), "text")}


def test_structures_sizes_and_constants(graphs: list[fx.GraphModule]) -> None:
    pair = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    lowered = lower(Structured().eval(), (torch.randn(2, 3), pair), verify=False)
    for batch in (3, 4):
        x, pair = torch.randn(batch, 3), {"a": torch.randn(batch, 3), "b": torch.randn(batch, 3)}
        plain = lowered(x, pair)
        found = compiled(lambda x, pair: lowered(x, pair=pair), graphs, dynamic=True)(x, pair)
        assert found["rows"] == plain["rows"] == batch
        assert found["nested"][1] == "text"
        assert torch.equal(found["sum"], plain["sum"])
        assert torch.equal(found["nested"][0], plain["nested"][0])


def test_what_does_not_fit_is_named(lowered: Lowered, graphs: list[fx.GraphModule]) -> None:
    for wrong, words in ((X[..., :7], "lower the model again"), (X.double(), "convert it"), (X[0], "axes")):
        with pytest.raises(Exception, match=words):
            compiled(Around(lowered), graphs)(wrong)
        with pytest.raises(InputError, match=words):
            torch.ops.prunekern.run([wrong], lowered.key)


def test_fake_tensors_get_shapes_only(lowered: Lowered) -> None:
    with FakeTensorMode() as mode:
        out = lowered(mode.from_tensor(X))
    assert type(out).__name__ == "FakeTensor"
    assert out.shape == (2, 4)


def test_the_operator_is_sound(lowered: Lowered) -> None:
    """torch's own checks: the schema, no hidden aliases, and the shapes that it promises."""
    torch.library.opcheck(torch.ops.prunekern.run, ([X], lowered.key))


def test_networks_are_not_kept_alive() -> None:
    lowered = lower(network(), X, verify=False)
    key = lowered.key
    del lowered
    gc.collect()
    with pytest.raises(InputError, match="keep the one"):
        torch.ops.prunekern.run([X], key)
