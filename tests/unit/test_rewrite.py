"""The graph form: an ordinary module with the sizes that survived, in every respect but its class."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekern.prune.rewrite import FunctionalBatchNorm, PrunedModule, own_name
from tests.pruning import Cut, cut, first_units, groups_of
from tests.zoo import ZOO

X = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    """Layers, a layer called twice, bare parameters, transient buffers, unread state, dropout, literal sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.head = nn.Linear(12, 4)                    # defined before it is used
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(3, 2)
        self.register_buffer("shift", torch.linspace(-1, 1, 8).view(8, 1, 1), persistent=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x) * self.scale + self.shift
        a, b = x[:, :4], x[:, 4:]
        b = self.norm(self.twice(F.relu(self.norm(self.twice(a))))) + b
        x = torch.cat((a, b, b), 1)
        x = F.adaptive_avg_pool2d(x, 1).view(-1, 12)
        return self.head(F.dropout(self.drop(x), 0.25, self.training))


@pytest.fixture
def result() -> Cut:
    torch.manual_seed(1)
    model = Net()
    model(X)                     # statistics that are not the fresh ones
    groups = groups_of(model.eval(), X)
    found = cut(model, groups, first_units(groups))
    assert found.proof.form == "graph"
    return found


def test_literals_became_the_surviving_sizes(result: Cut) -> None:
    width = {f.name: int(result.keep[f.groups].sum()) for f in result.groups}
    assert result.graph_form(X).shape == (4, 4)
    assert result.graph_form.get_submodule("block.0").out_channels == 6
    views = [node.args[1] for node in result.graph_form.graph.nodes if "view" in str(node.target)]
    assert views == [[-1, result.graph_form.head.in_features]]
    assert sum(width.values()) < sum(f.channels for f in result.groups)


def test_batch_is_free(result: Cut) -> None:
    for batch in (1, 2, 9):
        assert result.graph_form(torch.randn(batch, 3, 8, 8)).shape == (batch, 4)


def test_names_and_order_are_those_of_the_original(result: Cut) -> None:
    original = Net()
    assert list(result.graph_form.state_dict()) == list(original.state_dict())
    assert [n for n, _ in result.graph_form.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert [n for n, _ in result.graph_form.named_buffers()] == [n for n, _ in original.named_buffers()]
    assert "shift" not in result.graph_form.state_dict()


def test_layers_are_the_same_layers(result: Cut) -> None:
    graph = result.graph_form
    assert isinstance(graph, PrunedModule)
    assert graph.twice is result.sliced.twice
    assert graph.norm is result.sliced.norm
    assert graph.get_submodule("block.0") is result.sliced.block[0]
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls.count("twice") == calls.count("norm") == 2
    assert graph.scale is result.sliced.scale
    assert graph.unused.weight is result.sliced.unused.weight


def test_train_and_eval(result: Cut) -> None:
    graph = result.graph_form
    with torch.no_grad():
        graph.train()
        assert not torch.equal(graph(X), graph(X))               # dropout, as a layer and as a function
        graph.drop.p = 0.0
        assert not torch.equal(graph(X), graph(X))               # the function alone
        graph.eval()
        assert torch.equal(graph(X), graph(X))
        tracked = int(graph.norm.num_batches_tracked)
        mean = graph.norm.running_mean.clone()
        graph(X)
        assert torch.equal(graph.norm.running_mean, mean)
        graph.train()
        graph(X)
        assert int(graph.norm.num_batches_tracked) == tracked + 2        # called twice
        assert not torch.equal(graph.norm.running_mean, mean)


def test_one_training_step_is_that_of_the_class() -> None:
    """Same gradients, same statistics, where the user's class runs as well."""
    model, args, _ = ZOO["mobilenet_v3"]()
    groups = groups_of(model, args)
    result = cut(model, groups, first_units(groups))
    assert result.proof.form == "class"
    states = []
    for form in (copy.deepcopy(result.sliced), copy.deepcopy(result.graph_form)):
        form.double().train()
        optimiser = torch.optim.SGD(form.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimiser.zero_grad()
            form(args[0].double()).square().sum().backward()
            optimiser.step()
        states.append(form.state_dict())
    for name in states[0]:
        assert torch.allclose(states[0][name], states[1][name], rtol=1e-9, atol=1e-12), name


def test_functional_batch_norm_follows_the_mode() -> None:
    norm, x = FunctionalBatchNorm(0.1, 1e-5), torch.randn(8, 3)
    mean, var = torch.zeros(3), torch.ones(3)
    norm.eval()
    assert torch.allclose(norm(x, None, None, mean, var), x, atol=1e-4)
    assert torch.equal(mean, torch.zeros(3))
    norm.train()
    out = norm(x, None, None, mean, var)
    assert torch.allclose(out.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(mean, 0.1 * x.mean(0), atol=1e-6)
    norm.eval()
    assert torch.allclose(norm(x, None, None, None, None).mean(0), torch.zeros(3), atol=1e-6)   # none kept: its own


def test_copy_save_load(result: Cut, tmp_path: Path) -> None:
    graph = result.graph_form
    with torch.no_grad():
        wanted = graph(X)
        twin = copy.deepcopy(graph)
        assert isinstance(twin, PrunedModule)
        assert list(twin.state_dict()) == list(graph.state_dict())
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in graph.parameters()}
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(graph(X), wanted)
        torch.save(graph.state_dict(), tmp_path / "weights.pt")
        twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(twin(X), wanted)
        assert copy.deepcopy(twin).unused.weight.shape == (2, 3)


def test_moves_with_everything_it_has(result: Cut) -> None:
    wide = copy.deepcopy(result.graph_form).double()
    assert {t.dtype for t in [*wide.parameters(), *wide.buffers()] if t.is_floating_point()} == {torch.float64}
    assert wide.steps.dtype == torch.int64
    assert torch.allclose(wide(X.double()).float(), result.graph_form(X), atol=1e-5)
    meta = copy.deepcopy(result.graph_form).to("meta")
    assert meta(X.to("meta")).shape == (4, 4)
    assert meta.shift.is_meta


def test_is_exported_again(result: Cut) -> None:
    exported = torch.export.export(result.graph_form, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert torch.allclose(exported(X[:3]), result.graph_form(X[:3]), atol=1e-6)


def test_can_be_pruned_again(result: Cut) -> None:
    groups = groups_of(result.graph_form, X)
    again = cut(result.graph_form, groups, first_units(groups))
    assert sum(p.numel() for p in again.model.parameters()) < sum(p.numel() for p in result.model.parameters())
    assert list(again.model.state_dict()) == list(result.model.state_dict())


def test_flags_of_both_forms_are_their_own() -> None:
    model = Net().eval()
    model.head.training = True
    groups = groups_of(model, X)
    result = cut(model, groups, first_units(groups))
    for form in (model, result.sliced, result.graph_form):
        assert [name for name, m in form.named_modules() if m.training] == ["head"]


def test_parameters_keep_requires_grad_and_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(3, 2)
            self.b.weight = self.a.weight
            self.a.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)) + x))[:, :3])

    model, x = Tied().eval(), torch.randn(2, 6)
    groups = groups_of(model, x)
    result = cut(model, groups, groups.everything())
    graph = result.graph_form
    assert list(graph.state_dict()) == list(model.state_dict())
    assert graph.get_parameter("b.weight") is graph.get_parameter("a.weight")
    assert not graph.get_parameter("a.bias").requires_grad
    twin = copy.deepcopy(graph)
    assert twin.get_parameter("b.weight") is twin.get_parameter("a.weight")


def test_inputs_by_position_by_name_and_nested() -> None:
    for name in ("keyword_inputs", "dict_input", "siamese", "several_outputs"):
        model, args, kwargs = ZOO[name]()
        from prunekern.graph.inputs import Call
        groups = groups_of(model, Call(args, kwargs))
        graph = cut(model, groups, groups.everything()).graph_form
        with torch.no_grad():
            wanted, found = model(*args, **kwargs), graph(*args, **kwargs)
        left, right = (torch.utils._pytree.tree_flatten(value) for value in (wanted, found))
        assert left[1] == right[1]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(left[0], right[0], strict=True))


def test_hooks_work_is_in_the_graph() -> None:
    """A hook that changes the result was traced with it; the graph form does what it did, once."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    groups = groups_of(model, X)
    result = cut(model, groups, first_units(groups))
    with torch.no_grad():
        assert torch.allclose(result.graph_form(X), result.sliced(X), atol=1e-6)


@pytest.mark.parametrize(("name", "expected"), [
    ("graph.weight", "module_graph.weight"), ("graph", "module_graph"), ("code.0.bias", "module_code.0.bias"),
    ("conv.graph.weight", "conv.graph.weight"), ("weight", "weight")])
def test_reserved_names(name: str, expected: str) -> None:
    assert own_name(name) == expected


def test_reserved_names_are_moved_aside() -> None:
    model, args, _ = ZOO["reserved_names"]()
    groups = groups_of(model, args)
    graph: Any = cut(model, groups, first_units(groups)).graph_form
    assert isinstance(graph.graph, fx.Graph)
    assert isinstance(graph.code, str)
    assert isinstance(graph.module_graph, nn.Linear)
    assert isinstance(graph.module_code, nn.Linear)
