"""Capture by two recordings: the graph that torch.export gives, and no graph wherever two recordings cannot be sure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from prunekern.core.graph import Dim, Graph, owner, source, target_name
from prunekern.graph import trace as tracing
from prunekern.graph.evaluate import evaluate
from prunekern.graph.inputs import Call, as_call
from prunekern.graph.recorder import Unclear
from prunekern.graph.trace import trace
from prunekern.graph.twice import capture_twice
from tests.zoo import ZOO

aten = torch.ops.aten


class Net(nn.Module):
    """A convolution, a linear layer, and between them what a test is about."""

    def __init__(self, between: Callable[[Any, Tensor], Any] = lambda net, x: x) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))
        self.seen: Tensor
        self.calls, self.table = 0, torch.arange(4.0)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.between(self, self.conv(x).mean((2, 3))))


def twice(model: nn.Module, inputs: Any = None) -> Graph:
    call = as_call(model, torch.randn(2, 3, 6, 6) if inputs is None else inputs)
    return capture_twice(model.eval(), call, call.batch or 1)


def node(graph: Graph, name: str) -> Any:
    return next(n for n in graph.nodes if name in str(n.target))


def assert_replays(model: nn.Module, graph: Graph, *args: Any) -> None:
    with torch.no_grad():
        wanted = pytree.tree_leaves(model(*pytree.tree_map_only(Tensor, Tensor.clone, args)))
        found = evaluate(graph, {name: tensor.detach() for name, tensor in graph.tensors.items()}, args, {})
    for own, seen in zip(wanted, found, strict=True):
        assert torch.allclose(own, seen, atol=1e-6) if isinstance(own, Tensor) else own == seen


# ---- what it finds ------------------------------------------------------------------------------------------------

SAME = ("resnext", "dual_path", "shufflenet_v2", "siamese", "tied_embedding", "dict_input", "keyword_inputs",
        "several_outputs", "inplace_residual", "inplace_view", "encoder_stack", "llama_block", "window_attention",
        "text_bilstm", "lstm_cell_loop", "channel_numbers", "written_places", "unfolded_patches", "embedding_bag",
        "rotary_complex", "hooked_norms", "parametrised", "gated_experts", "sampled", "convnext")


def calls(graph: Graph) -> list[Any]:
    """Every call with its numbers, dims, module and line; without sizes (which torch.export computes on other ways) and
    whole slices of the batch (which change nothing)."""
    return [(target_name(n), [arg for arg in pytree.tree_leaves((n.args, dict(n.kwargs))) if not isinstance(arg, Node)],
             graph.dims[n.name], owner(n)[0], source(n)) for n in graph.nodes
            if n.op == "call_function" and isinstance(graph.dims[n.name], (tuple, list)) and not (
                n.target is aten.slice.Tensor and graph.dims[n.name] == graph.dims[n.args[0].name])]


@pytest.mark.parametrize("name", SAME)
def test_it_finds_what_export_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, kwargs = ZOO[name]()
    graph = twice(model, Call(args, kwargs).doubled())

    def refuse(*_: Any) -> Graph:
        raise Unclear("export is to be asked")
    monkeypatch.setattr(tracing, "capture_twice", refuse)
    exported = trace(model, Call(args, kwargs))
    assert exported.free_batch
    assert calls(graph) == calls(exported)
    assert graph.tied == exported.tied
    assert graph.constants == exported.constants
    assert graph.tensors.keys() == exported.tensors.keys()
    assert all(tensor is exported.tensors[key] or torch.equal(tensor, exported.tensors[key])
               for key, tensor in graph.tensors.items())
    assert graph.out_spec == exported.out_spec
    assert [graph.dims[n] for n in graph.inputs] == [exported.dims[n] for n in exported.inputs]
    _, args, kwargs = ZOO[name](batch=5, seed=1)
    with torch.no_grad():
        found, wanted = (evaluate(g, {n: t.detach() for n, t in g.tensors.items()}, args, kwargs)
                         for g in (graph, exported))
    if name != "sampled":                              # which draws random numbers
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True) if isinstance(a, Tensor))


def test_it_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.export was called")
    monkeypatch.setattr(torch.export, "export", refuse)
    model, args, _ = ZOO["resnext"]()
    graph = trace(model, args[0][:1])
    assert graph.free_batch
    assert graph.example_batch == 1
    assert_replays(model, graph, args[0])


def test_attention_layers_stay_operators() -> None:
    """Also where torch would take its fused layer: frozen, or without gradients."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False)
    with torch.no_grad():
        graph = twice(model, torch.randn(2, 5, 8))
    assert not any("_transformer_encoder_layer_fwd" in str(n.target) for n in graph.nodes)
    assert [owner(n)[0] for n in graph.nodes if n.target is aten.linear.default] == [
        "self_attn", "self_attn", "linear1", "linear2"]


def test_forwards_take_the_way_meant_for_captures() -> None:
    def asked(net: Any, x: Tensor) -> Tensor:
        return x.relu() if torch.compiler.is_exporting() and torch.compiler.is_compiling() else x

    assert node(twice(Net(asked)), "relu")


def test_operators_that_know_no_shapes_are_not_run() -> None:
    """Their kernels would be given zeros, at a batch of a thousand."""
    ran = []
    with torch.library._scoped_library("twice_test", "DEF") as library:
        library.define("shapeless(Tensor x) -> Tensor")
        library.impl("shapeless", lambda x: ran.append(x) or x.clone(), "CPU")  # type: ignore[func-returns-value]
        with pytest.raises(Exception, match=r"twice_test.shapeless"):
            twice(Net(lambda net, x: torch.ops.twice_test.shapeless(x)))
    assert not ran


def test_calls_and_their_owners() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Linear(3, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(x) - self.tower(2 * x)

    graph = twice(Siamese(), torch.randn(2, 3))
    stacks = [tuple(n.meta["nn_module_stack"]) for n in graph.nodes if n.target is aten.linear.default]
    assert len(set(stacks)) == 2                        # two calls of one layer
    assert [owner(n)[0] for n in graph.nodes if n.target is aten.linear.default] == ["tower.0", "tower.0"]
    assert owner(node(graph, "relu")) == ("tower.1", "torch.nn.modules.activation.ReLU")
    assert owner(node(graph, "sub"))[0] == ""
    assert "test_twice.py:" in source(node(graph, "sub"))


def tokens(net: Any, x: Tensor) -> Tensor:
    """Sizes a*N + b, with and without an offset, as arguments and as shapes."""
    x = torch.cat((x, x.new_zeros(2 * x.shape[0] + 1, 4)))
    return x.reshape(x.shape[0], 4) / x.shape[0]


def test_sizes_follow_the_batch() -> None:
    model = Net(tokens)
    graph = twice(model)
    assert graph.dims[node(graph, "cat").name] == (Dim(3, 1), Dim(0, 4))
    assert graph.dims[node(graph, "reshape").name][0] == Dim(3, 1)
    assert_replays(model, graph, torch.randn(5, 3, 6, 6))


def test_numbers_are_returned() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor, flag: bool = True) -> Any:
            return {"x": x + 1, "rows": x.shape[0], "name": "rows", "none": None}

    graph = twice(Sized(), torch.randn(3, 2))
    assert_replays(Sized(), graph, torch.randn(4, 2))


def test_the_order_of_inputs_in_memory_is_kept() -> None:
    class Ordered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1).view(-1, 3).sum(1) if x.is_contiguous(memory_format=torch.channels_last) else x

    graph = twice(Ordered(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert graph.dims[node(graph, "sum").name] == (Dim(20, 0),)


def test_other_objects_for_the_same_memory() -> None:
    def alias(net: Any, x: Tensor) -> Tensor:
        y = x.data
        z = torch.zeros_like(y)
        z[:, 1:3] = 1
        x.relu_()
        return y + x + z

    model = Net(alias)
    graph = twice(model)
    assert node(graph, "add").args == (node(graph, "relu_"), node(graph, "relu_"))     # written to one, seen by both
    assert_replays(model, graph, torch.randn(5, 3, 6, 6))


def test_attributes_are_constants_under_their_names() -> None:
    graph = twice(Net(lambda net, x: x * net.table + torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert graph.constants == {"table", "lifted_tensor_0"}
    assert torch.equal(graph.tensors["table"], torch.arange(4.0))


def test_modules_are_fresh_in_every_recording() -> None:
    def count(net: Any, x: Tensor) -> Tensor:
        net.calls += 1
        return x * net.calls

    model = Net(count)
    graph = twice(model)
    assert node(graph, "mul").args[1] == 1
    assert model.calls == 0


# ---- where two recordings cannot be sure --------------------------------------------------------------------------

COUNT = [0]


def branch(net: Any, x: Tensor) -> Tensor:
    return x.relu() if x.shape[0] > 100 else x.sigmoid()


def branch_on_state(net: Any, x: Tensor) -> Tensor:
    return x * (net.conv.bias if x.shape[0] > 100 else net.table)


def branch_on_number(net: Any, x: Tensor) -> Tensor:
    return x * (2.0 if x.shape[0] > 100 else 3.0)


def loop(net: Any, x: Tensor) -> Tensor:
    return torch.stack([row.relu() for row in x])


def loop_over_range(net: Any, x: Tensor) -> Tensor:
    return torch.stack([x[i] for i in range(x.shape[0])])


def half(net: Any, x: Tensor) -> Tensor:
    return x[: x.shape[0] // 2]


def remainder(net: Any, x: Tensor) -> Tensor:
    return x * (x.shape[0] % 7)


def bounded(net: Any, x: Tensor) -> Tensor:
    return x[: max(1, min(x.shape[0], 50))]


def padded(net: Any, x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[0] % 8))


def squared(net: Any, x: Tensor) -> Tensor:
    return x.new_ones(x.shape[0] * x.shape[0], 4)


def squared_shape(net: Any, x: Tensor) -> Tensor:
    return (x @ x.t()).reshape(-1, 1) * net.table


def reciprocal(net: Any, x: Tensor) -> Tensor:
    return x * (1 / x.shape[0])


def listed(net: Any, x: Tensor) -> Tensor:
    return x * torch.tensor(list(range(x.shape[0])))[:, None]


def same_length(net: Any, x: Tensor) -> Tensor:
    return x * torch.tensor([float(x.shape[0]), 1.0, 2.0, 3.0])


def counted(net: Any, x: Tensor) -> Tensor:
    COUNT[0] += 1
    return x * COUNT[0]


def written(net: Any, x: Tensor) -> Tensor:
    net.seen.add_(x.sum(0))
    return x


def written_view(net: Any, x: Tensor) -> Tensor:
    net.seen[:2] = 1
    return x + net.seen


def replaced(net: Any, x: Tensor) -> Tensor:
    net.seen = net.seen + x.sum(0)
    return x


def registered(net: Any, x: Tensor) -> Tensor:
    net.register_buffer("grid", torch.ones(4))
    return x * net.grid


def turned_in_place(net: Any, x: Tensor) -> Tensor:
    return x.t_().t()


def cast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.fc(x)[:, :1].float() * net.table


def read(net: Any, x: Tensor) -> Tensor:
    return x * x.sum().item()


def by_numpy(net: Any, x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().sum())


def selected(net: Any, x: Tensor) -> Tensor:
    return x[x[:, 0] > 0]


def conditional(net: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t * 1, (x,))  # type: ignore[no-any-return]


UNSURE = (branch, branch_on_state, branch_on_number, loop, loop_over_range, half, remainder, bounded, padded, squared,
          squared_shape, reciprocal, listed, same_length, counted, written, written_view, replaced, registered,
          turned_in_place, cast, read, by_numpy, selected, conditional)


@pytest.mark.parametrize("between", UNSURE, ids=lambda between: between.__name__)
def test_where_it_is_not_sure_it_says_so(between: Callable[[Any, Tensor], Tensor]) -> None:
    call, flag, fast = nn.Module.__call__, torch.compiler.is_exporting(), torch.backends.mha.get_fastpath_enabled()
    model = Net(between)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Exception) as caught:        # noqa: PT011  (whatever a forward raises on tensors without values)
        twice(model, torch.randn(3, 3, 6, 6))
    assert not isinstance(caught.value, AttributeError | NameError)
    assert nn.Module.__call__ is call
    assert torch.compiler.is_exporting() is flag
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("between", [loop, half, squared, written, reciprocal], ids=lambda between: between.__name__)
def test_then_the_model_is_captured_as_ever(between: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Net(between).eval(), torch.randn(3, 3, 6, 6)
    graph = trace(model, x)
    assert_replays(model, graph, x)


def test_training_batches_of_one_and_whole_inputs_are_left_to_export() -> None:
    model = Net()
    with pytest.raises(Unclear, match="evaluation"):
        twice(model, torch.randn(1, 3, 6, 6))
    call = as_call(model, torch.randn(2, 3, 6, 6))
    with pytest.raises(Unclear, match="evaluation"):
        capture_twice(model.train(), call, 2)
    edges = torch.zeros(2, 7, dtype=torch.int64)
    with pytest.raises(Unclear, match="rows"):
        twice(Edges(), (torch.randn(5, 3), edges))


class Edges(nn.Module):
    """Rows that belong together: the numbers of some are another input."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return x.index_add(0, edges[0], x[edges[1]])


def test_rows_that_a_small_batch_lacks() -> None:
    """Four rows of many are four, of two they are two: a graph for any batch holds for two as well."""
    net = Net(lambda net, x: x[:4])
    with pytest.raises(Unclear):
        twice(net, torch.randn(6, 3, 6, 6))
    graph = trace(net.eval(), torch.randn(6, 3, 6, 6))
    assert not graph.free_batch or graph.batch == 2
    assert_replays(net, graph, torch.randn(6, 3, 6, 6))
