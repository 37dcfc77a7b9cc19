"""What `profile` reports: sums, parameters, bytes, peak memory, what it cannot count, and how it is shown."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph
from prunekern.core.rule import Registry
from prunekern.cost import Cost, Costs, macs_of, peak, profile
from prunekern.cost.table import count
from prunekern.errors import ArtefactError, InputError, ModelError
from prunekern.graph.inputs import Call
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.ops.elementwise import Pair
from tests.models import make
from tests.zoo import ZOO


class Small(nn.Module):
    """conv - bn - relu_ - pool - flatten - linear."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(width * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.act(self.bn(self.conv(x)))).flatten(1))


def function(fn: Any) -> nn.Module:
    return Pair(fn, "function").eval()


# ---- sums ----


def test_every_figure_of_a_small_network_by_hand() -> None:
    ours = profile(Small().eval(), torch.randn(2, 3, 6, 6))
    assert [layer.op for layer in ours.layers] == [
        *(
            "aten.conv2d",
            "aten.batch_norm",
            "aten.relu_",
            "aten.max_pool2d",
            "aten.flatten.using_ints",
            "aten.linear",
        )
    ]
    conv, bn, relu, pool, flatten, fc = (layer.cost for layer in ours.layers)
    image, full, half, out = 2 * 3 * 36, 2 * 4 * 36, 2 * 4 * 9, 2 * 5
    assert conv == Cost(2 * 36 * 4 * 27, full, 2 * 36 * 4 * 27, 4 * 27 + 4, 0, 4 * 112, 4 * image, 4 * full)
    # running_mean and running_var are floats, num_batches_tracked is one 64-bit integer
    assert bn == Cost(0, 2 * full, 2 * full, 8, 9, 4 * 8 + 4 * 8 + 8, 4 * full, 4 * full)
    assert relu == Cost(elementwise=full, read_bytes=4 * full, written_bytes=4 * full)
    assert pool == Cost(elementwise=4 * half, read_bytes=4 * full, written_bytes=4 * half)
    assert flatten == Cost()
    assert fc == Cost(2 * 36 * 5, out, 2 * 36 * 5, 36 * 5 + 5, 0, 4 * 185, 4 * half, 4 * out)
    assert ours.total == sum((conv, bn, relu, pool, flatten, fc), Cost())
    assert ours.flops == 2 * ours.macs == 2 * (conv.macs + fc.macs)
    assert ours["conv"].cost == conv
    assert ours[""].cost == ours.total
    assert ours.by_operator()["aten.linear"] == fc


@pytest.mark.parametrize("name", ["resnet56", "mobilenet_v2"])
def test_layers_and_modules_add_up(name: str) -> None:
    model, inputs = make(name)
    ours = profile(model, inputs)
    assert sum((layer.cost for layer in ours.layers), ours.unused) == ours.total == ours[""].cost
    for module in ours.modules:
        real = model.get_submodule(module.path)
        assert module.cost.params == sum(p.numel() for p in real.parameters())
        assert module.cost.buffers == sum(b.numel() for b in real.buffers())
        children = [m for m in ours.modules if m.path.rpartition(".")[0] == module.path and m is not module]
        below = [layer.cost.macs for layer in ours.layers if layer.module == module.path]
        assert module.cost.macs == sum(below) + sum(child.cost.macs for child in children)


def test_batch_is_the_users_own() -> None:
    """A batch of one is doubled for the trace; that is nobody's business."""
    model = Small().eval()
    one, three = profile(model, torch.randn(1, 3, 6, 6)), profile(model, torch.randn(3, 3, 6, 6))
    assert (one.batch, three.batch) == (1, 3)
    assert three.macs == 3 * one.macs
    assert three.peak.bytes == 3 * one.peak.bytes
    assert three.total.activation_bytes == 3 * one.total.activation_bytes
    assert (three.params, three.total.weight_bytes) == (one.params, one.total.weight_bytes)
    assert profile(model, torch.randn(1, 3, 6, 6), batch=3) == three
    assert one.layers[0].shape == (1, 4, 6, 6)


def test_a_fixed_batch_is_said_and_not_scaled() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.ones(6, 3)

    graph = trace(Fixed().eval(), torch.randn(6, 4))
    ours = profile(graph)
    assert (ours.batch, ours.macs) == (6, 72)
    assert "batch" in ours.notes[0]
    assert ours.notes[0] in str(ours)
    with pytest.raises(InputError, match="fixes its batch size at 6"):
        profile(graph, batch=2)


def test_a_batch_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="batch 0"):
        profile(Small().eval(), torch.randn(2, 3, 6, 6), batch=0)


def test_inputs_are_inferred_where_the_first_layer_fixes_them() -> None:
    ours = profile(nn.Sequential(nn.Linear(7, 3)).eval())
    assert ours.macs == 21 * ours.batch
    assert "inferred" in ours.notes[0]
    with pytest.raises(InputError, match="cannot be inferred"):
        profile(Small().eval())


def test_bad_models_are_refused() -> None:
    with pytest.raises(ModelError, match="training mode"):
        profile(Small(), torch.randn(1, 3, 6, 6))
    with pytest.raises(ModelError, match="not a torch"):
        profile("resnet50", torch.randn(1, 3, 6, 6))  # type: ignore[arg-type]


# ---- parameters ----


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    ours = profile(Tied().eval(), torch.randn(1, 5))
    assert (ours.macs, ours.params, ours.total.weight_bytes) == (50, 25, 100)
    assert [layer.cost.params for layer in ours.layers] == [25, 0, 0]
    assert ours["a"].cost.params == ours["b"].cost.params == ours[""].cost.params == 25


def test_a_module_called_twice_works_twice_and_weighs_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    ours = profile(Twice().eval(), torch.randn(1, 5))
    assert (ours.macs, ours.params, ours["fc"].cost.macs, ours["fc"].cost.params) == (50, 30, 50, 30)


def test_unused_parameters_are_shown_as_such() -> None:
    model = Small().eval()
    model.auxiliary = nn.Linear(3, 2, bias=False)
    model.register_buffer("spare", torch.zeros(7))
    ours = profile(model, torch.randn(1, 3, 6, 6))
    assert ours.unused == Cost(params=6, weight_bytes=24)
    assert ours["auxiliary"].cost == ours.unused
    assert ours.layers[4].cost == Cost(buffers=7, weight_bytes=28)  # flatten is the model's own first call
    assert "not read by the forward" in str(ours)


def test_dtypes_have_their_bytes() -> None:
    half = profile(nn.Linear(5, 5).half().eval(), torch.randn(1, 5).half())
    assert (half.total.weight_bytes, half.total.read_bytes, half.total.written_bytes) == (60, 10, 10)


# ---- memory ----


def real_peak(graph: Graph) -> int:
    """The largest sum of bytes of live storages in a real run, node by node; state is left out."""
    last = {arg: node for node in graph.nodes for arg in node.all_input_nodes}
    leaves = dict(zip(graph.inputs, pytree.tree_leaves((graph.args, dict(graph.kwargs))), strict=True))
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = graph.fqn(node)
            env[node] = leaves[node.name] if name is None else graph.tensors[name]
    state = {env[node].untyped_storage()._cdata for node in env if graph.fqn(node) is not None}
    top = 0
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
        elif node.op == "output":
            return top
        tensors = [leaf for leaf in pytree.tree_leaves(list(env.values())) if isinstance(leaf, Tensor)]
        live = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        top = max(top, sum(size for key, size in live.items() if key not in state))
        for arg in (node, *node.all_input_nodes):
            if last.get(arg, node) is node:
                env.pop(arg, None)
    raise AssertionError("a graph ends with its output")


# Bytes that a trace does not show: the end of a list of bags.
UNSEEN = {"embedding_bag": 8}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_peak_is_what_a_real_run_holds(name: str) -> None:
    case = ZOO[name](batch=3)
    graph = trace(case.model, Call(case.args, case.kwargs))
    with torch.no_grad():
        assert peak(graph).bytes + UNSEEN.get(name, 0) == real_peak(graph) > 0


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_peak_of_networks(name: str) -> None:
    graph = trace(*make(name, batch=2))
    with torch.no_grad():
        assert peak(graph).bytes == real_peak(graph)


def test_views_and_in_place_operators_share_memory() -> None:
    x = torch.randn(1, 4, 6, 6)
    size = x.numel() * 4
    assert profile(function(lambda x: x.neg().relu()), x).peak.bytes == 2 * size
    assert profile(function(lambda x: x.neg().relu_().flatten(1).view(-1, 4, 36)), x).peak.bytes == 2 * size
    assert profile(function(lambda x: x.neg() + x), x).peak.bytes == 3 * size
    # outside training, dropout hands its argument on
    assert profile(function(lambda x: (y := x.neg()) + F.dropout(y, 0.5, False)), x).peak.bytes == 2 * size
    # an input counts from the start, used or not
    late = profile(function(lambda x, y: x.repeat(1, 4, 1, 1).amax((2, 3)).sum(1) + y.sum((1, 2, 3))), (x, -x))
    assert late.peak.bytes == 6 * size
    # an expanded view holds no more than what it came from; a copy of it does
    small = torch.randn(1, 1, 6, 6)
    assert profile(function(lambda x: x.expand(-1, 4, 6, 6)), small).peak.bytes == size // 4
    assert profile(function(lambda x: x.expand(-1, 4, 6, 6).contiguous()), small).peak.bytes == size // 4 + size


def test_peak_says_where_and_what() -> None:
    ours = profile(Small().eval(), torch.randn(1, 3, 6, 6))
    assert ours.peak.module == "bn"
    assert ours.peak.bytes == sum(size for _, size in ours.peak.live) == 2 * 4 * 36 * 4
    assert {name for name, _ in ours.peak.live} == {"conv2d", "batch_norm"}


def test_traffic() -> None:
    x, y = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 1, 1)
    size, gate = x.numel() * 4, y.numel() * 4

    def traffic(fn: Any, *inputs: Tensor) -> list[tuple[int, int]]:
        return [(layer.cost.read_bytes, layer.cost.written_bytes)
                for layer in profile(function(fn), inputs).layers]  # fmt: skip

    assert traffic(lambda x, y: x * y, x, y) == [(size + gate, size)]
    assert traffic(lambda x, y: x * y.expand_as(x), x, y) == [(0, 0), (size + gate, size)]
    assert traffic(lambda x: x.neg().relu_(), x) == [(size, size), (size, size)]
    assert traffic(lambda x: x.narrow(1, 0, 1).neg(), x) == [(0, 0), (size // 4, size // 4)]
    assert traffic(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), x) == [(0, 0), (size, size)]
    assert traffic(lambda x: F.dropout(x, 0.5, False).neg(), x) == [(0, 0), (size, size)]


# ---- what is not counted ----


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.pair = nn.Linear(5, 5), nn.Bilinear(5, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.fc(x), x)


def test_an_operator_without_a_rule_is_listed() -> None:
    ours = profile(Unknown().eval(), torch.randn(1, 5))
    assert [(item.op, item.reason) for item in ours.uncounted] == [("aten.bilinear", "no rule for this operator")]
    assert "pair" in ours.uncounted[0].where[0]
    assert ours.macs == 25
    assert ours["pair"].cost.params == 5 * 5 * 3 + 3
    assert "NOT COUNTED: 1 x aten.bilinear" in str(ours)
    assert json.loads(ours.to_json())["uncounted"][0]["op"] == "aten.bilinear"


def test_a_formula_that_refuses_is_listed() -> None:
    """Three operands of einsum have no count of their own: it depends on the order."""
    model = function(lambda x, y, z: torch.einsum("bi,bj,bk->bijk", x, y, z))
    inputs = tuple(torch.randn(2, n) for n in (3, 4, 5))
    ours = profile(model, inputs)
    assert [item.op for item in ours.uncounted] == ["aten.einsum"]
    assert "3 operands" in ours.uncounted[0].reason
    graph = trace(model, inputs)
    assert Costs(graph).macs(graph.shapes(2)) == ours.macs == 0


def test_another_registry_is_respected() -> None:
    ours = profile(Small().eval(), torch.randn(1, 3, 6, 6), registry=Registry(()))
    assert ours.macs == 0
    assert {item.op for item in ours.uncounted} == {layer.op for layer in ours.layers}
    assert ours.params == sum(p.numel() for p in Small().parameters())


# ---- under other shapes ----


@pytest.mark.parametrize("name", ["resnet18", "encoder_layer", "tied_embedding"])
def test_costs_are_the_profiles(name: str) -> None:
    if name in ZOO:
        case = ZOO[name](batch=3)
        graph = trace(case.model, Call(case.args, case.kwargs))
    else:
        graph = trace(*make(name))
    costs = Costs(graph)
    for batch in (1, 5):
        ours, shape = profile(graph, batch=batch), graph.shapes(batch)
        assert costs.macs(shape) == macs_of(graph, shape) == ours.macs > 0
        assert (costs.params(shape), costs.bytes(shape)) == (ours.params, ours.total.weight_bytes)


def test_shapes_of_a_smaller_network_give_its_costs() -> None:
    """What a plan predicts, asked of the original graph, is what the smaller network costs."""
    large, small = (trace(Small(width).eval(), torch.randn(2, 3, 6, 6)) for width in (8, 5))
    other = {node.name: node for node in small.nodes}

    def predicted(node: fx.Node) -> tuple[int, ...]:
        return small.shape(other[node.name], 2)

    costs, expected = Costs(large), profile(small)
    assert costs.macs(predicted) == expected.macs < profile(large).macs
    assert (costs.params(predicted), costs.bytes(predicted)) == (expected.params, expected.total.weight_bytes)
    assert profile(large, shapes=predicted) == expected


# ---- shown and saved ----


def test_json_is_complete(tmp_path: Path) -> None:
    ours = profile(Small().eval(), torch.randn(2, 3, 6, 6))
    path = ours.save(tmp_path / "profile.json")
    loaded = json.loads(path.read_text())
    assert (loaded["format"], loaded["version"], loaded["batch"]) == ("prunekern-profile", 1, 2)
    for key in (
        "macs",
        "flops",
        "elementwise",
        "fvcore_flops",
        "params",
        "buffers",
        "weight_bytes",
        "read_bytes",
    ):
        rows = [*loaded["layers"], loaded["unused"]]
        assert sum(row[key] for row in rows) == loaded["total"][key] == getattr(ours.total, key)
        assert loaded["modules"][0][key] == loaded["total"][key]
    assert loaded["layers"][0]["shape"] == [2, 4, 6, 6]
    assert loaded["peak"]["bytes"] == ours.peak.bytes
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, path = profile(Small().eval(), torch.randn(2, 3, 6, 6)), tmp_path / "profile.json"
    path.write_text("before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtefactError, match="No space left"):
        ours.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]
    assert path.read_text() == "before"


def lines_of(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_text_is_an_aligned_table() -> None:
    ours = profile(Small().eval(), torch.randn(2, 3, 6, 6))
    table = str(ours).split("\n\n")[0].splitlines()
    assert table[0].split()[:4] == ["layer", "operator", "output", "MACs"]
    assert len({len(line) for line in table}) == 1
    conv, total = lines_of(str(ours), "conv2d")[0].split(), table[-1].split()
    assert conv[:6] == ["conv", "conv2d", "2x4x6x6", "7776", "95.6", "%"]
    assert total[:4] == ["total", "8136", "100.0", "%"]
    assert "3 others" in str(ours)
    assert "16.27 k FLOPs" in str(ours)
    assert "peak 2304 B at bn" in str(ours)


@pytest.mark.parametrize("rich", [True, False])
def test_show_with_and_without_rich(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    out = io.StringIO()
    ours = profile(Small().eval(), torch.randn(2, 3, 6, 6))
    ours.show(full=True, file=out)
    for word in ("conv2d", "relu_", "max_pool2d", "flatten", "7776", "8136", "peak 2304 B at bn"):
        assert word in out.getvalue()
    assert ("---" in out.getvalue()) != rich
    assert "others" not in out.getvalue()


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (999, "999"), (9999, "9999"), (10_000, "10 k"), (12_346, "12.35 k"), (999_999, "1 M"),
    (4_089_184_256, "4.089 G"), (2_500_000_000_000, "2.5 T"),
])  # fmt: skip
def test_numbers_are_short(value: int, text: str) -> None:
    assert count(value) == text


def test_every_rule_counts_without_its_network_in_reach() -> None:
    """No formula needs more than shapes: the same graph, asked for another batch, scales."""
    for rule, sample in REGISTRY.samples():
        graph = trace(sample.build().eval(), sample.inputs(2))
        if graph.free_batch:
            two, four = profile(graph, batch=2), profile(graph, batch=4)
            assert four.macs == 2 * two.macs, (rule, sample)
            assert four.total.elementwise >= two.total.elementwise
