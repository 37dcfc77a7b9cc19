"""The proof: wrong slicing is refused whatever the weights are, and it says how sharp it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekern.errors import PlanError, ProofError
from prunekern.graph.groups import Groups
from prunekern.ops import REGISTRY
from prunekern.prune.prove import LIMIT, prove, randomised
from prunekern.prune.reference import difference, masked_outputs
from prunekern.prune.rewrite import rewrite
from prunekern.prune.slice import slice_module
from tests.pruning import Cut, cut, first_units, groups_of
from tests.zoo import ZOO

prove_file: Any = import_module("prunekern.prune.prove")


class Residual(nn.Module):
    """A residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv(x)))
        return self.fc(x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    return Residual().eval()


@pytest.fixture
def groups(model: nn.Module) -> Groups:
    return groups_of(model, X)


def parts(model: nn.Module, groups: Groups) -> tuple[Tensor, nn.Module, fx.GraphModule]:
    keep = first_units(groups)
    sliced = slice_module(model, groups, keep, REGISTRY)
    return keep, sliced, rewrite(groups.labels, keep, sliced, REGISTRY)


def test_numbers(model: nn.Module, groups: Groups) -> None:
    result = cut(model, groups, first_units(groups))
    proof = result.proof
    assert proof.form == "class"
    assert proof.dtype == "float64"
    assert max(proof.twin_error, proof.real_error) < 1e-13 < proof.limit == LIMIT
    assert proof.teeth == 1.0
    assert proof.blunt == ()
    calls = [node for node in groups.graph.nodes if node.op == "call_function"]
    assert proof.shapes == len(calls)
    assert proof.to_json()["form"] == "class"
    assert "proven in float64" in str(proof)


@pytest.mark.parametrize("what", ["conv.weight", "conv.bias", "bn1.running_var", "bn2.bias", "fc.weight"])
def test_a_channel_exchanged_for_another_is_refused(model: nn.Module, groups: Groups, what: str) -> None:
    """The structure is right, one tensor of what would be returned holds a neighbour's values."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    keep, sliced, graph = parts(model, groups)
    prove(groups, keep, graph, sliced)
    tensor = sliced.state_dict()[what]
    tensor.copy_(tensor.roll(1, 1 if what == "fc.weight" else 0))
    with pytest.raises(ProofError, match="nothing is returned"):
        prove(groups, keep, graph, sliced)


def test_another_choice_than_the_one_carried_out_is_refused(model: nn.Module, groups: Groups) -> None:
    _, sliced, graph = parts(model, groups)
    with pytest.raises((ProofError, PlanError)):
        prove(groups, first_units(groups, seed=5), graph, sliced)


def scrambled(change: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    class Wrong(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.stem(x)))
            x = F.relu(x + self.bn2(self.conv(change(x))))
            return self.fc(x.mean((2, 3)))
    return Wrong


@pytest.mark.parametrize("change", [
    lambda x: x.flip(1), lambda x: x.roll(1, 1), lambda x: x * 1.000001, lambda x: x + 1e-6, lambda x: x[:, :, :, :].mT,
], ids=["flipped", "rolled", "scaled", "shifted", "transposed"])
def test_a_class_that_computes_something_else_is_not_returned(
        model: nn.Module, groups: Groups, change: Callable[[Tensor], Tensor]) -> None:
    keep, sliced, graph = parts(model, groups)
    wrong = scrambled(change)()
    wrong.__dict__.update(sliced.__dict__)
    module, proof = prove(groups, keep, graph, wrong)
    assert module is graph
    assert "user's own class differs from the masked original" in proof.notes[0]
    with pytest.raises(ProofError, match="nothing is returned"):
        prove(groups, keep, broken(graph, change), wrong)


def broken(graph: fx.GraphModule, change: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    node = next(n for n in graph.graph.nodes if n.target == "conv")
    with graph.graph.inserting_before(node):
        changed = graph.graph.call_function(change, (node.args[0],))
    node.args = (changed,)
    graph.recompile()
    return graph


def test_zero_gammas_hide_nothing(model: Residual, groups: Groups) -> None:
    """Real weights under which every order of channels is equal: the twin tells them apart."""
    nn.init.zeros_(model.bn2.weight)
    nn.init.zeros_(model.bn2.bias)
    groups = groups_of(model, X)
    keep, sliced, graph = parts(model, groups)
    wrong = scrambled(lambda x: x.flip(1))()
    wrong.__dict__.update(sliced.__dict__)
    with torch.no_grad():
        assert torch.equal(wrong(X), sliced(X))
    module, proof = prove(groups, keep, graph, wrong)
    assert module is graph
    assert "differs" in proof.notes[0]
    assert prove(groups, keep, graph, sliced)[1].form == "class"


def test_a_class_that_cannot_run_gives_way(model: nn.Module, groups: Groups) -> None:
    class Picky(Residual):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("six channels or nothing\nsecond line")
    keep, sliced, graph = parts(model, groups)
    picky = Picky()
    picky.__dict__.update(sliced.__dict__)
    module, proof = prove(groups, keep, graph, picky)
    assert module is graph
    assert proof.notes == ("the user's own class cannot run: RuntimeError: six channels or nothing",)


def test_a_predicted_shape_that_does_not_come_true(model: nn.Module, groups: Groups) -> None:
    """A view that turns channels into samples runs happily; the node is named."""
    keep, sliced, graph = parts(model, groups)
    node = next(n for n in graph.graph.nodes if "mean" in str(n.target))
    node.args = (node.args[0], [0, 2])
    graph.recompile()
    with pytest.raises(PlanError, match=r"aten.mean.*predicts shape \(2, 5\).*has \(5, 8\)"):
        prove(groups, keep, graph, sliced)


def test_masking_is_at_the_consumers_not_at_the_producers(model: Residual, groups: Groups) -> None:
    """Zeroed producers would be shifted by the batch norm behind them: the reference must not do that."""
    keep = first_units(groups)
    channel = next(c for c, group in enumerate(groups.labels.axes["stem.weight", 0].tolist()) if not bool(keep[group]))
    tensors = {name: t.detach().double() for name, t in groups.graph.tensors.items()}
    for name in ("bn1.bias", "bn2.bias", "bn1.running_mean"):
        tensors[name] = tensors[name] + 1.0
    call = type("Call", (), {"args": (X.double(),), "kwargs": {}})
    masked = masked_outputs(groups.labels, keep, tensors, call)[0]
    zeroed = dict(tensors)
    for name in ("stem.weight", "stem.bias", "conv.weight", "conv.bias"):
        zeroed[name] = tensors[name].clone()
        zeroed[name][channel] = 0
    wrong = masked_outputs(groups.labels, groups.everything(), zeroed, call)[0]
    assert not torch.allclose(masked, wrong, atol=1e-3)
    silent = dict(tensors)
    for name in ("conv.weight", "fc.weight"):
        silent[name] = tensors[name].clone()
        silent[name][:, channel] = 0
    assert torch.allclose(masked, masked_outputs(groups.labels, groups.everything(), silent, call)[0], atol=1e-12)


def test_blunt_families_are_reported() -> None:
    """Channels that nobody reads cannot be missed; that is said, not hidden."""
    model, args, _ = ZOO["dropped_channels"]()
    groups = groups_of(model, args)
    result = cut(model, groups, first_units(groups))
    assert result.proof.blunt == ("conv.0",)
    assert 0 < result.proof.teeth < 1


def test_the_twin_is_drawn_anew_and_sane(groups: Groups) -> None:
    real = {name: t.detach().double() for name, t in groups.graph.tensors.items()}
    one, two, same = (randomised(groups, real, seed) for seed in (0, 1, 0))
    for name, tensor in real.items():
        if tensor.dim():
            assert not torch.equal(one[name], tensor)
            assert not torch.equal(one[name], two[name])
        assert torch.equal(one[name], same[name])
    assert bool((one["bn1.running_var"] > 0).all())


def test_the_model_and_the_result_keep_their_weights(model: nn.Module, groups: Groups) -> None:
    """The proof borrows tensors; it gives every one back, also when it fails."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    keep, sliced, graph = parts(model, groups)
    held = {name: (id(t), t.clone(), t.dtype) for name, t in sliced.named_parameters()}
    prove(groups, keep, graph, sliced)
    with pytest.raises(ProofError):
        prove(groups, keep, broken(graph, lambda x: x + 1), None)
    for name, tensor in sliced.named_parameters():
        assert (id(tensor), tensor.dtype) == (held[name][0], held[name][2])
        assert torch.equal(tensor, held[name][1])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_forward_that_casts_is_proven_in_fp64_all_the_same() -> None:
    model, args, kwargs = ZOO["keyword_inputs"]()
    from prunekern.graph.inputs import Call
    groups = groups_of(model, Call(args, kwargs))
    result: Cut = cut(model, groups, first_units(groups))
    assert result.proof.dtype == "float64"
    assert max(result.proof.twin_error, result.proof.real_error) < 1e-13


@pytest.mark.parametrize(("out", "ref", "expected"), [
    ([torch.ones(2)], [torch.ones(2)], 0.0),
    ([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 4.0])], 0.25),
    ([torch.ones(2)], [torch.ones(3)], float("inf")),
    ([torch.ones(2)], [torch.ones(2), 1], float("inf")),
    ([None], [torch.ones(2)], float("inf")),
    ([torch.tensor(float("nan"))], [torch.tensor(1.0)], float("inf")),
    ([torch.tensor([1, 2])], [torch.tensor([1, 5])], 3.0),
    ([torch.ones(0)], [torch.ones(0)], 0.0),
])
def test_difference(out: list[Any], ref: list[Any], expected: float) -> None:
    assert difference(out, ref) == expected


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Linear(5, 6), nn.Linear(5, 7), nn.ModuleList([nn.Linear(6, 3), nn.Linear(7, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.end[0](self.change(F.relu(self.a(x)))) + self.end[1](F.relu(self.b(x)))

    def change(self, x: Tensor) -> Tensor:
        return x


class Rolled(TwoPaths):
    def change(self, x: Tensor) -> Tensor:
        return x.roll(1, 1)


def dulled(monkeypatch: pytest.MonkeyPatch, dead: Sequence[str], scales: Sequence[float] = ()) -> list[float]:
    """The first twin has the first layer's ReLUs dead, and so on. Gives the list of the twins' scales, as they come."""
    drawn: list[float] = []
    scales = scales or prove_file.SCALES

    def draw(groups: Groups, tensors: Mapping[str, Tensor], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
        twin = randomised(groups, tensors, seed, scale)
        for name in dead[scales.index(scale):scales.index(scale) + 1]:
            twin[name] = torch.full_like(twin[name], -1e3)
        drawn.append(scale)
        return twin
    monkeypatch.setattr(prove_file, "randomised", draw)
    monkeypatch.setattr(prove_file, "SCALES", scales)
    return drawn


@pytest.fixture
def paths() -> tuple[TwoPaths, Groups]:
    """Path a is dead under the real weights, too."""
    model = TwoPaths().eval()
    nn.init.constant_(model.a.bias, -1e3)
    return model, groups_of(model, torch.randn(2, 5))


def test_what_the_twins_feel_is_joined(monkeypatch: pytest.MonkeyPatch, paths: tuple[TwoPaths, Groups]) -> None:
    """The first twin is blind for one family, the second for the other."""
    keep, sliced, graph = parts(*paths)
    alone = []
    for dead in ("a", "b"):
        with monkeypatch.context() as patched:
            dulled(patched, [f"{dead}.bias"], scales=(1.0,))
            alone.append(prove(paths[1], keep, graph, sliced)[1])
        assert alone[-1].blunt == (dead,)
    drawn = dulled(monkeypatch, ["a.bias", "b.bias"])
    proof = prove(paths[1], keep, graph, sliced)[1]
    assert proof.blunt == ()
    assert proof.teeth > max(p.teeth for p in alone)
    assert drawn == [1.0, 0.5]


def test_a_slip_that_only_the_second_twin_shows_is_refused(
        monkeypatch: pytest.MonkeyPatch, paths: tuple[TwoPaths, Groups]) -> None:
    keep, sliced, graph = parts(*paths)
    wrong = Rolled()
    wrong.__dict__.update(sliced.__dict__)
    bent = copy.deepcopy(graph)
    node = next(n for n in bent.graph.nodes if n.op == "call_module" and n.target == "end.0")
    with bent.graph.inserting_before(node):
        node.args = (bent.graph.call_function(torch.roll, (node.args[0], 1, 1)),)
    bent.recompile()
    with monkeypatch.context() as patched:                      # with the first twin alone, both would be returned
        dulled(patched, ["a.bias"], scales=(1.0,))
        assert prove(paths[1], keep, bent, wrong)[0] is wrong
        assert prove(paths[1], keep, bent, None)[0] is bent
    dulled(monkeypatch, ["a.bias"])
    module, proof = prove(paths[1], keep, graph, wrong)
    assert module is graph
    assert "user's own class differs" in proof.notes[0]
    for own in (wrong, None):
        with pytest.raises(ProofError, match="graph module differs"):
            prove(paths[1], keep, bent, own)


def test_one_twin_is_enough_where_it_feels_everything(
        monkeypatch: pytest.MonkeyPatch, model: nn.Module, groups: Groups) -> None:
    drawn = dulled(monkeypatch, [])
    cut(model, groups, first_units(groups))
    assert drawn == [1.0]


def test_a_twin_that_overflows_is_passed_over(monkeypatch: pytest.MonkeyPatch, paths: tuple[TwoPaths, Groups]) -> None:
    keep, sliced, graph = parts(*paths)
    overflow: set[float] = set()

    def draw(groups: Groups, tensors: Mapping[str, Tensor], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
        twin = randomised(groups, tensors, seed, scale)
        if scale == 1:
            twin["a.bias"] = torch.full_like(twin["a.bias"], -1e3)
        if scale in overflow:
            twin["end.0.bias"] = torch.full_like(twin["end.0.bias"], float("inf"))
        return twin
    monkeypatch.setattr(prove_file, "randomised", draw)
    for some, blunt in (({1.0}, ()), ({0.5}, ()), ({1.0, 0.5}, ()), ({0.5, 0.25}, ("a",))):
        overflow.clear()
        overflow |= some
        assert prove(paths[1], keep, graph, sliced)[1].blunt == blunt
    overflow |= {1.0}
    with pytest.raises(ProofError, match="by inf"):
        prove(paths[1], keep, graph, sliced)


def test_a_calm_twin_feels_what_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate of a deep network that grows: at full scale it is all or nothing."""
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bodies = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(24))
            self.down, self.up, self.end = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            for body in self.bodies:
                x = x + 2 * body(x)
            return self.end(x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid())
    grows = Grows().eval()
    groups = groups_of(grows, torch.randn(2, 6, 5, 5))
    monkeypatch.setattr(import_module("prunekern.prune.teeth"), "TRIES", 0)
    assert cut(grows, groups, first_units(groups)).proof.blunt == ()
    monkeypatch.setattr(prove_file, "SCALES", (1.0, 1.0, 1.0))
    assert cut(grows, groups, first_units(groups)).proof.blunt == ("down",)


def test_calm_twins(groups: Groups) -> None:
    real = {name: t.detach().double() for name, t in groups.graph.tensors.items()}
    loud, calm = randomised(groups, real, 0), randomised(groups, real, 0, 0.25)
    assert torch.equal(calm["conv.weight"], 0.25 * loud["conv.weight"])
    assert torch.equal(calm["bn1.weight"], loud["bn1.weight"])
    assert bool((calm["bn1.bias"] > 0).all())
    assert not bool((loud["bn1.bias"] > 0).all())
