"""Capturing a model as a graph: sizes as functions of the batch, inputs in every spelling, honest fallbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern import Target, prune
from prunekern.core.graph import Dim, Graph, owner, place
from prunekern.errors import InputError, ModelError, TraceError
from prunekern.graph.evaluate import evaluate
from prunekern.graph.inputs import Call, as_call, from_loader, infer
from prunekern.graph.trace import trace
from tests.zoo import ZOO


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)).eval()


def node(graph: Graph, name: str) -> Any:
    return next(n for n in graph.nodes if name in str(n.target))


def replayed(graph: Graph, *args: Any, **kwargs: Any) -> list[Any]:
    with torch.no_grad():
        return evaluate(graph, graph.tensors, args, kwargs)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batch_is_free(batch: int) -> None:
    """Also where the example holds one sample, whose size cannot be told from a broadcast axis."""
    graph = trace(conv_net(), torch.randn(batch, 3, 6, 6))
    assert graph.free_batch
    assert graph.example_batch == batch
    assert graph.notes == ()
    assert graph.dims[node(graph, "conv2d").name] == (Dim(1, 0), Dim(0, 4), Dim(0, 4), Dim(0, 4))
    assert graph.shape(node(graph, "linear"), 5) == (5, 2)
    assert graph.shape(node(graph, "linear")) == (graph.batch, 2)


def test_sizes_that_follow_from_the_batch() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat((x, x[:1]), 0)
            return x.reshape(-1, 2).t()

    graph = trace(Tokens().eval(), torch.randn(3, 4))
    assert graph.dims[node(graph, "cat").name][0] == Dim(1, 1)
    assert graph.dims[graph.nodes[-2].name] == (Dim(0, 2), Dim(2, 2))
    assert [str(dim) for dim in (Dim(1, 0), Dim(2, 3), Dim(1, -1), Dim(0, 7))] == ["N", "2N+3", "N-1", "7"]


@pytest.mark.parametrize("name", ["plain_cnn", "siamese", "keyword_inputs", "dict_input", "several_outputs",
                                  "fpn", "tied_embedding", "inplace_residual", "inplace_view", "encoder_layer"])
def test_graph_replays_the_model(name: str) -> None:
    """At another batch size than the traced one, with inputs that are not written to."""
    model, args, kwargs = ZOO[name]()
    graph = trace(model, Call(args, kwargs))
    _, args, kwargs = ZOO[name](batch=5, seed=1)
    copies = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, args)
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
    found = replayed(graph, *args, **kwargs)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*map(torch.utils._pytree.tree_leaves, (args, copies)), strict=True))


def test_spellings_of_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
            return x * scale if mask is None else x * mask

    model, x = Two().eval(), torch.randn(2, 3)
    for given in (x, (x,), [x], {"x": x}, Call((x,), {}), Call((x,), {"scale": 2.0}), {"x": x, "mask": x > 0}):
        assert trace(model, given).free_batch
    assert str(as_call(model, {"x": x, "mask": x > 0})) == "x: (2, 3) float32, mask: (2, 3) bool"
    assert as_call(model, Call((x,), {"scale": 2.0})).batch == 2


def test_calls_change_their_batch() -> None:
    table = torch.zeros(7)
    call = Call((torch.arange(6.0).view(3, 2),), {"extra": [table, torch.ones(3)]})
    assert call.resized(5).args[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert call.resized(2).kwargs["extra"][1].shape == (2,)
    assert call.resized(5).kwargs["extra"][0] is table
    assert call.doubled() is call
    assert Call((torch.ones(1, 2),), {}).doubled().args[0].shape == (2, 2)


def test_inputs_are_taken_from_loaders_and_linear_layers() -> None:
    x, y = torch.randn(4, 3), torch.zeros(4)
    assert from_loader([(x, y)]) is x
    assert from_loader([x]) is x
    assert infer(nn.Sequential(nn.Linear(5, 2))).shape == (2, 5)
    with pytest.raises(InputError, match="Conv2d"):
        infer(conv_net())
    with pytest.raises(InputError, match="empty"):
        from_loader([])


def test_state_constants_and_tied_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.register_buffer("shift", torch.ones(4), persistent=False)
            self.plain = torch.full((4,), 2.0)        # a tensor that is neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.shift) * self.plain

    model = Tied().eval()
    graph = trace(model, torch.randn(2, 4))
    assert graph.tied == {"b.weight": "a.weight"}
    assert graph.tensors["a.weight"] is model.a.weight
    assert graph.tensors["shift"] is model.shift
    assert len(graph.constants) == 1
    assert torch.equal(graph.tensors[next(iter(graph.constants))], model.plain)
    assert len([n for n in graph.nodes if graph.fqn(n) == "a.weight"]) >= 1


def test_messages_name_module_and_line() -> None:
    model, args, _ = ZOO["resnext"]()
    graph = trace(model, args)
    first = node(graph, "conv2d")
    assert owner(first)[0] == "stem.0"
    assert place(first).startswith("'stem.0' (aten.conv2d")
    assert "convolutions.py:" in place(node(graph, "adaptive_avg_pool2d"))
    assert "Nx12x8x8" in str(graph)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(4, -1).t().reshape(2, 8)


def test_fixed_batch_is_said() -> None:
    graph = trace(FixedBatch().eval(), torch.randn(4, 6))
    assert not graph.free_batch
    assert graph.batch == 4
    assert "batch 4 only" in graph.notes[0]


class OnlyOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(1, 2, 3).sum(1)


def test_batch_of_one_that_cannot_be_doubled() -> None:
    graph = trace(OnlyOne().eval(), torch.randn(1, 6))
    assert (graph.free_batch, graph.batch) == (False, 1)
    assert "batch 1 only" in graph.notes[0]


class ByNumpy(nn.Module):
    """Export refuses tensors that become numbers; recorded on the example they are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = float(torch.linspace(0, 1, 3).numpy()[1])
        return self.fc(F.relu(self.conv(x) * scale).mean((2, 3)))


def test_fallback_records_the_example() -> None:
    model, x = ByNumpy().eval(), torch.randn(3, 3, 6, 6)
    graph = trace(model, x)
    assert not graph.free_batch
    assert graph.batch == 3
    assert "branch taken there is assumed" in graph.notes[0]
    assert {"conv.weight", "conv.bias", "fc.weight", "fc.bias"} <= set(graph.tensors)
    assert torch.allclose(replayed(graph, x)[0], model(x), atol=1e-6)


def test_recorded_networks_are_pruned_and_proven() -> None:
    model, x = ByNumpy().eval(), torch.randn(3, 3, 6, 6)
    result = prune(model, x, Target(layers={"conv": 0.5}), criterion="l1")
    assert isinstance(result.model, ByNumpy)
    assert result.model.conv.out_channels == 2
    assert any("assumed" in note for note in result.notes)


def test_data_dependent_sizes_name_the_line() -> None:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            count = int(x.sum().item() * 0) + 2
            return x[:, :count] if x.mean().item() > 0 else x[:, 1:]

    with pytest.raises(TraceError, match=r"test_trace.py.*depends on the data") as caught:
        trace(Nonzero().eval(), torch.randn(2, 4))
    assert caught.value.__cause__ is not None


def test_the_users_own_error_stays_visible() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 3:
                raise ValueError("I want three columns")
            return x

    with pytest.raises(InputError, match=r"Picky.forward fails.*\(2, 4\).*I want three columns") as caught:
        trace(Picky().eval(), torch.randn(2, 4))
    assert isinstance(caught.value.__cause__, ValueError)


def test_training_mode_where_it_is_allowed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ModelError, match=r"model.eval\(\)"):
        trace(model, torch.randn(2, 3, 4, 4))
    before = model[1].running_mean.clone()
    graph = trace(model, torch.randn(2, 3, 4, 4), allow_train=True)
    assert node(graph, "batch_norm").args[5] is True
    assert torch.equal(model[1].running_mean, before)
    assert model.training


def test_no_grad_inside_a_forward_is_inlined() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.conv(x).relu()
            return self.fc(x.mean((2, 3)))

    graph = trace(Frozen().eval(), torch.randn(2, 3, 6, 6))
    assert node(graph, "conv2d") is not None
    assert not any("grad" in str(n.target) for n in graph.nodes)


def test_what_a_forward_leaves_behind_is_taken_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls, self.seen = nn.Linear(3, 2), 0, [1]

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(self.calls)
            self.last = self.fc(x)
            return self.last

    model = Counting().eval()
    trace(model, torch.randn(2, 3))
    assert (model.calls, model.seen) == (0, [1])
    assert not hasattr(model, "last")


class Leaving(nn.Module):
    """Leaves things in objects of its own, and registers a buffer and a layer when first run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.config, self.seen = SimpleNamespace(calls=0), {"features": [torch.zeros(1)]}
        self.register_buffer("total", torch.zeros(8))
        self.total: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "grid"):
            self.register_buffer("grid", torch.ones(6, 6), persistent=False)
            self.act = nn.ReLU()
        x = self.act(self.conv(x) * self.grid)
        self.config.calls += 1
        self.seen["features"].append(x)
        self.total = self.total + x.mean((0, 2, 3))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("ran", [False, True])
def test_nothing_is_left_on_the_model_or_the_result(ran: bool) -> None:
    model, x = Leaving().eval(), torch.randn(2, 3, 8, 8)
    if ran:
        with torch.no_grad():
            model(x)
    names, total, count = [n for n, _ in model.named_buffers()], model.total.clone(), model.config.calls
    result = prune(model, x, Target(layers={"conv": 0.5}), criterion="l1")
    assert [n for n, _ in model.named_buffers()] == names
    assert hasattr(model, "act") is ran
    assert torch.equal(model.total, total)
    assert (model.config.calls, len(model.seen["features"])) == (count, 1 + count)
    if ran:
        assert isinstance(result.model, Leaving)
        assert (result.model.config.calls, len(result.model.seen["features"])) == (count, 1 + count)
        assert result.model.total.shape == (4,)
    assert type(result.model(x)) is Tensor


def test_a_forward_that_is_a_closure_is_traced_on_the_model_itself() -> None:
    model = conv_net()
    first, inner = model[0], model[0].forward
    first.forward = lambda x: inner(x) * first.weight.sum()       # type: ignore[method-assign]
    graph = trace(model, torch.randn(2, 3, 6, 6))
    assert graph.tensors["0.weight"] is first.weight
    assert not graph.constants


def test_a_model_frozen_or_in_half_precision_is_traced() -> None:
    model = conv_net().requires_grad_(False).to(torch.bfloat16)
    graph = trace(model, torch.randn(2, 3, 6, 6, dtype=torch.bfloat16))
    assert graph.tensors["0.weight"].dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
