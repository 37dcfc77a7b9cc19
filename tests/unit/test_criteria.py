"""Criteria beyond magnitude: planted pairs, formulas against plain computations, names that bring settings."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekern as pk
from prunekern.errors import InputError, UnknownName
from prunekern.graph.groups import Groups
from prunekern.prune import target
from prunekern.prune.importance import (
    CRITERIA,
    DROPNET,
    Contribution,
    Evidence,
    Site,
    brings,
    chip,
    curvature,
    ensemble,
    hrank,
    passes,
    score,
    settle,
)
from prunekern.prune.importance.chip import independence
from prunekern.prune.importance.cosine import ALONE, leaving
from prunekern.prune.importance.ensemble import ranks
from prunekern.prune.importance.lamp import shares
from tests.planted import CLASSES, SHAPE, FixedBatch, Planted, data, grouped, lively

CALIBRATED = ("fisher", "obd", "obs", "hrank", "chip", "cosine_activation")


# ---- one network with a channel of every kind --------------------------------------------------------------

DEAD, CONSTANT, COPY, PLAIN, TINY, UNREAD = range(6)
PAIRS = {
    "l1": (TINY, PLAIN), "l2": (TINY, PLAIN), "lamp": (TINY, PLAIN), "fpgm": (TINY, PLAIN),
    "bn_scale": (CONSTANT, PLAIN), "taylor": (UNREAD, PLAIN), "fisher": (UNREAD, PLAIN), "obd": (UNREAD, PLAIN),
    "activation": (DEAD, CONSTANT), "apoz": (DEAD, CONSTANT), "hrank": (CONSTANT, PLAIN), "chip": (CONSTANT, COPY),
    "cosine": (COPY, PLAIN), "cosine_activation": (COPY, PLAIN),
    "obs": (UNREAD, PLAIN),
}  # fmt: skip


class Kinds(nn.Module):
    """conv, bn, relu, conv, pool. Channel 0 is dead, 1 constant (small), 2 a weaker copy of 3, 4 tiny, 5 never read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9)
        self.last = nn.Conv2d(9, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.conv(x)))).mean((2, 3))


@pytest.fixture(scope="module")
def kinds() -> Groups:
    torch.manual_seed(4)
    model = lively(Kinds())
    with torch.no_grad():
        model.bn.weight.abs_()
        model.bn.bias[DEAD] = -100
        model.bn.weight[CONSTANT], model.bn.bias[CONSTANT] = 0, 0.1
        for tensor in (model.bn.bias, model.bn.running_mean, model.bn.running_var, model.bn.weight):
            tensor[COPY] = tensor[PLAIN]
        for tensor in (model.conv.weight, model.conv.bias, model.bn.running_mean, model.bn.bias):
            tensor[COPY] = 0.8 * tensor[PLAIN]
        for tensor in (model.conv.weight, model.conv.bias, model.bn.weight, model.bn.bias):
            tensor[TINY] *= 0.02
        model.last.weight[:, TINY] *= 0.02
        model.last.weight[:, UNREAD] = 0
    return grouped(model)


def test_every_criterion_has_a_planted_pair() -> None:
    assert set(PAIRS) | {"random"} == set(CRITERIA)


@pytest.mark.parametrize("name", PAIRS)
def test_planted_pairs(kinds: Groups, name: str) -> None:
    """Of two channels the one that the criterion takes for less goes first; and none is tied with it."""
    first, second = PAIRS[name]
    values = score(kinds, name, batches=data()).values[kinds.families[0].groups]
    assert float(values[first]) < float(values[second])


@pytest.mark.parametrize("name", ["cosine", "cosine_activation"])
def test_of_a_pair_only_one_goes(kinds: Groups, name: str) -> None:
    """The copy goes at (almost) no distance; its original is then compared with others, which are far."""
    values = score(kinds, name, batches=data(), normalisation="none").values[kinds.families[0].groups]
    assert float(values[COPY]) < 0.02
    assert float(values[PLAIN]) > 0.1


# ---- Fisher and OBD ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A residual stream that two convolutions read, a grouped one among them, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 4, 1)
        self.back = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.back(F.relu(self.inner(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> tuple[Any, Groups]:
    torch.manual_seed(3)
    model = lively(Net()).double()
    return model, grouped(model, torch.randn(2, *SHAPE, dtype=torch.float64))


def pairs(rows: int = 10) -> tuple[Tensor, Tensor]:
    x, y = data(rows)
    return x.double(), y


def gated_loss(model: Any, x: Tensor, y: Tensor, stream: Tensor, inner: Tensor) -> Tensor:
    """Net's loss with the channels of the stream and of the inner layer scaled where layers read them."""
    s, i = stream.view(1, -1, 1, 1), inner.view(1, -1, 1, 1)
    h = F.relu(model.stem(x))
    h = F.relu(h + model.back(i * F.relu(model.inner(s * h))))
    return F.cross_entropy(model.fc((s * h).mean((2, 3))), y)


def test_fisher_is_half_the_mean_square_of_what_a_group_does_to_each_sample(net: tuple[Any, Groups]) -> None:
    model, groups = net
    x, y = pairs()
    squares = [torch.zeros(6).double(), torch.zeros(4).double()]
    for n in range(len(x)):
        gates = [torch.ones(6).double().requires_grad_(), torch.ones(4).double().requires_grad_()]
        found = torch.autograd.grad(gated_loss(model, x[n : n + 1], y[n : n + 1], *gates), gates)
        squares = [total + part.square() for total, part in zip(squares, found, strict=True)]
    for batches in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        values = score(groups, "fisher", batches=batches, normalisation="none").values
        for layer, total in (("stem", squares[0]), ("inner", squares[1])):
            ids = groups.labels.axes[f"{layer}.weight", 0]
            assert torch.allclose(values[ids], total / len(x) / 2, rtol=1e-9), layer


def test_fisher_sees_what_cancels_in_the_mean_gradient() -> None:
    """A channel that matters much to every sample, now up, now down: of no importance to first order."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 0.1], [0.3, 0.3]]))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[1.0, 1.0, 0.5]]))
    x = torch.tensor([[1.0, 1], [-1.0, 1]]).double()

    def loss(output: Tensor) -> Tensor:
        return output.sum(1).mean()

    groups = grouped(model, x)
    ids = groups.labels.axes["0.weight", 0]
    first = score(groups, "taylor", batches=x, loss=loss, normalisation="none", reduction="first").values[ids]
    second = score(groups, "fisher", batches=x, loss=loss, normalisation="none").values[ids]
    assert float(first[0]) == pytest.approx(0, abs=1e-12)
    assert first.argmin() == 0
    assert torch.allclose(second, torch.tensor([1.0, 0.01, 0.3**2 / 2]).double() / 2)


def test_obd_sums_curvature_times_squared_weights(net: tuple[Any, Groups]) -> None:
    model, groups = net
    x, y = pairs()
    h = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(x)):
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(x[n : n + 1]), y[n : n + 1]).backward()
        for name, p in twin.named_parameters():
            h[name] += p.grad.square() / len(x)
    found = Evidence(groups, (x, y)).curvature()
    assert (found.samples, found.rows, found.drawn) == (10, 10, False)
    for name, want in h.items():
        assert torch.allclose(found.weights[name], want, rtol=1e-9), name
    values = score(groups, "obd", batches=(x, y), reduction="sum", normalisation="none").values
    saliency = {name: (h[name] * p.detach().square() / 2) for name, p in model.named_parameters()}
    want = saliency["inner.weight"].sum((1, 2, 3)) + saliency["inner.bias"]
    want += saliency["back.weight"].sum((2, 3)).view(2, 3, 2).sum(1).reshape(-1)  # rows 0-2 read channels 0 and 1
    assert torch.allclose(values[groups.labels.axes["inner.weight", 0]], want, rtol=1e-9)


def test_unlabelled_data_gets_labels_from_the_model(net: tuple[Any, Groups]) -> None:
    """In expectation over labels that the model believes in: the true Fisher diagonal."""
    model, groups = net
    x = pairs(4)[0]
    want = torch.zeros_like(model.fc.weight)
    for n in range(len(x)):
        for c in range(CLASSES):
            twin = copy.deepcopy(model)
            output = twin(x[n : n + 1])
            F.cross_entropy(output, torch.tensor([c])).backward()
            want += float(output.detach().softmax(1)[0, c]) * twin.fc.weight.grad.square() / len(x)
    evidence = Evidence(groups, x.repeat(250, 1, 1, 1))
    found = evidence.curvature()
    assert found.drawn
    assert torch.allclose(found.weights["fc.weight"], want, rtol=0.25, atol=0.02 * float(want.max()))
    for name in ("fisher", "obd"):
        scores = score(groups, name, batches=x)
        assert scores.notes[0] == (
            "the data holds no targets: labels for squared gradients were drawn from the model's output"
        )
        assert score(groups, name, batches=(x, torch.zeros(4, dtype=torch.long))).notes == ()


def test_drawn_labels_are_a_matter_of_the_seed_alone(net: tuple[Any, Groups]) -> None:
    _, groups = net
    x = pairs()[0]
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(int(torch.randint(1 << 30, ())))
        state = torch.get_rng_state()
        values.append(score(groups, "fisher", batches=x, seed=seed).values)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_drawn_labels_follow_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([[0.0, 2.0, -1.0]]).repeat(4000, 1)
    labels = passes.drawn(scores, generator)
    assert torch.allclose(torch.bincount(labels) / 4000, scores[0].softmax(0), atol=0.03)
    sure = torch.randn(2, 4, 3, 5, generator=generator) * 1000
    assert torch.equal(passes.drawn(sure, generator), sure.argmax(1))


def test_outputs_that_are_no_scores_are_told() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.b(F.relu(self.a(x)))
            return y, y

    x = torch.randn(6, 4)
    with pytest.raises(InputError, match=r"'fisher': .*no targets, and the output is a tuple, .*or loss=function"):
        score(grouped(Pair().eval(), x), "fisher", batches=x)
    one = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).eval()
    with pytest.raises(InputError, match=r"the output is a tensor \(1, 1\), not class scores"):
        score(grouped(one, x), "obd", batches=x)


def test_only_so_many_rows_are_squared(net: tuple[Any, Groups], monkeypatch: pytest.MonkeyPatch) -> None:
    _, groups = net
    monkeypatch.setattr(curvature, "ROWS", 7)
    x, y = pairs()
    found = Evidence(groups, [(x[:4], y[:4]), (x[4:], y[4:])]).curvature()
    assert found.rows == 7
    want = score(groups, "obd", batches=(x[:7], y[:7])).values
    assert torch.equal(score(groups, "obd", batches=[(x[:4], y[:4]), (x[4:], y[4:])]).values, want)


def test_rows_that_cannot_be_run_alone_are_squared_by_batches() -> None:
    torch.manual_seed(0)
    model = FixedBatch().eval()
    groups = grouped(model, torch.randn(4, 4))
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    scores = score(groups, "obd", batches=[(x[:4], y[:4]), (x[4:], y[4:])])
    assert scores.notes[0] == "squared gradients are of 2 batches: the forward takes no single rows"
    found = Evidence(groups, [(x[:4], y[:4]), (x[4:], y[4:])]).curvature()
    want = torch.zeros(3, 6)
    for rows in (slice(0, 4), slice(4, 8)):
        gradient = torch.autograd.grad(F.cross_entropy(model(x[rows]), y[rows]), model.two.weight)[0]
        want += 4 * gradient.square() / 2
    assert torch.allclose(found.weights["two.weight"], want, rtol=1e-5)


# ---- LAMP --------------------------------------------------------------------------------------------------


def test_lamp_shares() -> None:
    squares = torch.tensor([4.0, 1.0, 2.0, 1.0]).double()
    stays = torch.zeros(4, dtype=torch.bool)
    want = torch.tensor([1.0, 1 / 8, 2 / 6, 1 / 7]).double()  # equal ones rank by position
    assert torch.allclose(shares(squares, stays), want)
    kept = shares(squares, torch.tensor([False, False, True, False]))
    assert torch.allclose(kept[[0, 1, 3]], torch.tensor([4 / 6, 1 / 8, 1 / 7]).double()), "what stays is in every sum"
    assert torch.equal(shares(torch.zeros(3).double(), torch.zeros(3, dtype=torch.bool)), torch.zeros(3).double())


def test_lamp_scores_layers_and_compares_them(net: tuple[Any, Groups]) -> None:
    """inner's channels: its own rows, and the columns of a grouped convolution; no biases; no normalisation."""
    model, groups = net
    scores = score(groups, "lamp", reduction="sum")
    assert scores.normalisation == "none"
    rows = model.inner.weight.detach().flatten(1).square().sum(1)
    columns = model.back.weight.detach().view(2, 3, 2, -1).square().sum((1, 3)).reshape(-1)

    def plain(values: Tensor) -> Tensor:
        return torch.stack([v / values[values >= v].sum() for v in values])

    ids = groups.labels.axes["inner.weight", 0]
    assert torch.allclose(scores.values[ids], plain(rows) + plain(columns))
    assert score(groups, "lamp", normalisation="max").normalisation == "max", "what is asked for is done"


def test_lamp_does_not_depend_on_the_scale_of_a_layer() -> None:
    model = lively(Planted())
    before = score(grouped(model), "lamp").values
    with torch.no_grad():
        model.conv2.weight *= 30
    assert torch.allclose(score(grouped(model), "lamp").values, before, rtol=1e-4)


# ---- HRank and CHIP ----------------------------------------------------------------------------------------


def two_maps(rows: int = 9) -> tuple[Any, Groups, Tensor, Tensor]:
    """A convolution, its activation on data, and the groups."""
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, CLASSES, 3)))
    with torch.no_grad():
        model[0].bias[:3] -= torch.tensor([0.8, 1.2, 1.6])  # sparse maps have lower ranks
    x = data(rows)[0]
    with torch.no_grad():
        return model, grouped(model), x, model[:2](x)


def test_hrank_is_the_mean_rank_of_the_maps() -> None:
    _, groups, x, maps = two_maps()
    want = torch.tensor(
        [[float(torch.linalg.matrix_rank(maps[n, c])) for c in range(6)] for n in range(len(maps))]
    ).mean(0)
    assert len(want.unique()) > 2
    for batches in (x, [x[:2], x[2:]]):
        values = score(groups, "hrank", batches=batches, normalisation="none").values
        assert torch.allclose(values[groups.families[0].groups], want.double())


def test_chip_is_the_fall_of_the_nuclear_norm() -> None:
    _, groups, x, maps = two_maps()
    matrices = maps.double().flatten(2)
    want = torch.zeros(6).double()
    for matrix in matrices:
        for c in range(6):
            without = matrix.clone()
            without[c] = 0
            want[c] += (torch.linalg.matrix_norm(matrix, "nuc") - torch.linalg.matrix_norm(without, "nuc")) / len(x)
    for batches in (x, [x[:2], x[2:]]):
        values = score(groups, "chip", batches=batches, normalisation="none").values
        assert torch.allclose(values[groups.families[0].groups], want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (7, 7), (1, 4), (6, 1)])
def test_one_decomposition_gives_the_fall_of_every_row(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64) * 1e3
    matrix[-1] = 0 if shape[0] > 5 else matrix[-1]
    if shape[0] > 5:
        matrix[1] = matrix[0] + 1e-4 * matrix[2]
    want = torch.empty(shape[0]).double()
    for row in range(shape[0]):
        without = matrix.clone()
        without[row] = 0
        want[row] = torch.linalg.matrix_norm(matrix, "nuc") - torch.linalg.matrix_norm(without, "nuc")
    assert torch.allclose(independence(matrix), want, rtol=1e-6, atol=1e-6 * float(matrix.abs().max()))
    assert torch.equal(independence(torch.zeros(shape).double()), torch.zeros(shape[0]).double())


def test_chip_of_vectors_takes_rows_for_positions() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES)))
    x = torch.randn(20, 4)
    groups = grouped(model, x)
    matrix = F.relu(model[0](x)).detach().double().T
    for batches in (x, [x[:7], x[7:]]):
        values = score(groups, "chip", batches=batches, normalisation="none").values[groups.families[0].groups]
        assert torch.allclose(values, independence(matrix), rtol=1e-5)


def test_ranks_and_decompositions_are_of_the_first_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, groups, x, _ = two_maps()
    for function, name in ((hrank, "hrank"), (chip, "chip")):
        monkeypatch.setattr(sys.modules[function.__module__], "ROWS", 3)
        seen = score(groups, name, batches=[x[:2], x[2:]]).values
        assert torch.allclose(seen[1:], score(groups, name, batches=x[:3]).values[1:], rtol=1e-5)
        assert not torch.allclose(seen[1:], score(groups, name, batches=x[3:6]).values[1:], rtol=1e-5)


def test_networks_without_maps_have_no_ranks() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES)))
    with pytest.raises(InputError, match=r"'hrank' scores no channel of this model \(no layer reads maps"):
        score(grouped(model, torch.randn(2, 4)), "hrank", batches=torch.randn(8, 4))


def test_maps_are_streamed() -> None:
    """Whoever looks sees each batch once, channels on axis 1, and no more rows than asked for."""
    _, groups, x, maps = two_maps()
    seen: list[tuple[Site, Tensor]] = []
    Evidence(groups, [x[:4], x[4:]]).maps(lambda site, value: seen.append((site, value)), rows=6)
    assert [value.shape[0] for _, value in seen] == [4, 2]
    assert torch.allclose(torch.cat([value for _, value in seen]), maps[:6])
    assert torch.equal(seen[0][0].groups, groups.families[0].groups)


# ---- cosine ------------------------------------------------------------------------------------------------


def test_leaving_is_greedy_and_of_the_smaller() -> None:
    """Points on a line: 0 and 1 are closest and 0 is smaller; then 1 and 3; 10 has no partner left."""
    line = torch.tensor([0.0, 1.0, 3.0, 10.0]).double()
    distance = (line[:, None] - line).abs() / 10
    for size, want in (([1.0, 2, 9, 10], [0.1, 0.2, 0.7, ALONE]), ([2.0, 1, 9, 8], [0.3, 0.1, ALONE, 0.7])):
        assert torch.allclose(leaving(distance, torch.tensor(size)), torch.tensor(want).double())


def test_leaving_equals_a_plain_search() -> None:
    generator = torch.Generator().manual_seed(1)
    points = F.normalize(torch.randn(30, 4, generator=generator, dtype=torch.float64), dim=1)
    distance, size = 1 - points @ points.T, torch.rand(30, generator=generator)
    want, left = {}, set(range(30))
    while len(left) > 1:
        a, b = min(((a, b) for a in left for b in left if a < b), key=lambda pair: float(distance[pair]))
        gone = a if size[a] <= size[b] else b
        want[gone] = float(distance[a, b])
        left.remove(gone)
    got = leaving(distance, size)
    assert all(float(got[i]) == pytest.approx(value) for i, value in want.items())
    assert [float(got[i]) for i in left] == [ALONE]


def test_cosine_is_the_mean_over_the_layers_of_a_family(net: tuple[Any, Groups]) -> None:
    """The stream's channels are issued by two layers."""
    model, groups = net
    rows = [F.normalize(layer.weight.detach().flatten(1), dim=1) for layer in (model.stem, model.back)]
    distance = 1 - sum(r @ r.T for r in rows) / 2
    sizes = [layer.weight.detach().flatten(1).square().sum(1) for layer in (model.stem, model.back)]
    energy = sum(size / size.sum() for size in sizes)
    values = score(groups, "cosine", normalisation="none").values[groups.labels.axes["stem.weight", 0]]
    assert torch.allclose(values, leaving(distance, energy))
    assert len(groups.find("stem")[0].layers) == 2


def test_a_group_of_several_filters_is_compared_as_a_whole() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)))
    with torch.no_grad():
        model[0].weight[6] = model[0].weight[0]  # half of a group is a copy: not enough
        model[0].weight[4:6] = 0.5 * model[0].weight[2:4]  # a whole one
    groups = grouped(model)
    values = score(groups, "cosine", normalisation="none").values[groups.families[0].groups]
    assert float(values[2]) == pytest.approx(0, abs=1e-6)
    rows = F.normalize(model[0].weight.detach().double().view(4, -1), dim=1)
    sizes = model[0].weight.detach().view(4, -1).square().sum(1)
    assert torch.allclose(values, leaving(1 - rows @ rows.T, sizes), atol=1e-6)


def test_zero_filters_go_first_and_opposite_ones_are_no_copies() -> None:
    model = lively(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] = -model[0].weight[3]
    groups = grouped(model, torch.randn(2, 5))
    values = score(groups, "cosine", normalisation="none").values[groups.families[0].groups]
    assert float(values[1]) == 0
    assert bool((values[[0, 2, 3]] > 0.2).all())


def test_cosine_of_activations_over_all_data() -> None:
    _, groups, x, maps = two_maps()
    rows = F.normalize(maps.double().movedim(1, 0).flatten(1), dim=1)
    sizes = maps.double().square().sum((0, 2, 3))
    for batches in (x, [x[:2], x[2:]]):
        values = score(groups, "cosine_activation", batches=batches, normalisation="none").values
        assert torch.allclose(values[groups.families[0].groups], leaving(1 - rows @ rows.T, sizes), atol=1e-5)


# ---- DropNet -----------------------------------------------------------------------------------------------


def dropped(model: Any, kept: Any) -> list[tuple[str, int]]:
    """(layer, channel) of everything that left a Planted."""
    return [
        (name, c)
        for name in ("conv1", "conv2", "fc1")
        for c in range(getattr(model, name).weight.shape[0])
        if c not in kept.get(f"{name}.weight", {0: range(99)}).get(0, range(99))
    ]


@pytest.mark.parametrize("metric", DROPNET)
def test_dropnet_metrics_follow_the_papers_rule(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of lowest (highest) mean |post-activation| go, out of all or of each layer; random ones otherwise."""
    monkeypatch.setattr(target, "_refilled", lambda meter, units, chosen, *rest: chosen)  # no node is tried back in
    torch.manual_seed(6)
    model = lively(Planted())
    x = data()[0]
    with torch.no_grad():
        a = F.relu(model.bn1(model.conv1(x)))
        b = F.relu(model.bn2(model.conv2(F.max_pool2d(a, 2))))
        c = F.relu(model.bn3(model.fc1(b.flatten(1))))
    means = {"conv1": a.abs().mean((0, 2, 3)), "conv2": b.abs().mean((0, 2, 3)), "fc1": c.abs().mean(0)}
    result = pk.compress(model, x[:2], pk.Target(params=0.6), criterion=f"dropnet:{metric}", calibrate=x, lower=False)
    gone = dropped(model, result.plan.kept)
    assert gone
    assert result.plan.target["criterion"] == f"dropnet:{metric}"
    assert result.plan.target["ranking"] == ("layer" if metric.endswith("layer") else "global")
    sign = -1 if metric.startswith("maximum") else 1
    value = {(name, i): float(sign * v) for name, values in means.items() for i, v in enumerate(values)}
    order = sorted(value, key=value.__getitem__)
    if metric.startswith("random"):
        again = pk.compress(model, x[:2], pk.Target(params=0.6), criterion=f"dropnet:{metric}", seed=1, lower=False)
        assert dropped(model, again.plan.kept) != gone
    elif metric.endswith("layer"):
        for name in means:
            mine = [c for c in order if c[0] == name]
            assert set(mine[: sum(n == name for n, _ in gone)]) == {c for c in gone if c[0] == name}
    else:
        assert set(order[: len(gone)]) == set(gone)
        assert len({name for name, _ in gone}) > 1
    if metric.endswith("layer"):  # the same share of every layer, but for a node
        counts = [(sum(n == name for n, _ in gone), len(values)) for name, values in means.items()]
        assert max((count - 1) / size for count, size in counts) < min((count + 1) / size for count, size in counts)


def test_metrics_bring_settings_and_give_way() -> None:
    assert set(DROPNET) == {"minimum", "maximum", "random", "minimum_layer", "maximum_layer", "random_layer"}
    found = settle("dropnet:maximum_layer")
    assert (found.criterion, found.normalisation, found.direction, found.ranking) == (
        CRITERIA["activation"], "none", "maximum", "layer")  # fmt: skip
    assert settle("dropnet:random").criterion is CRITERIA["random"]
    assert settle("dropnet:maximum_layer", ranking="global", direction="minimum").ranking == "global"
    assert settle("dropnet:maximum_layer", ranking="global", direction="minimum").direction == "minimum"
    plain = settle("l2")
    assert (plain.reduction, plain.normalisation, plain.direction, plain.ranking) == (
        "mean", "mean", "minimum", "global")  # fmt: skip
    with pytest.raises(UnknownName, match=r"unknown criterion 'dropnet:least'; known: .*dropnet:minimum"):
        settle("dropnet:least")


def test_a_users_criterion_may_bring_settings() -> None:
    @brings(normalisation="none", direction="maximum")
    def mine(evidence: Evidence) -> Iterator[Contribution]:
        for family in evidence.groups:
            yield family.groups, torch.arange(1.0, family.channels + 1)

    groups = grouped(lively(Planted()))
    scores = score(groups, mine)
    assert (scores.normalisation, scores.direction, scores.criterion) == ("none", "maximum", "mine")
    assert scores.values[groups.families[0].groups].tolist() == [-1.0, -2, -3, -4, -5, -6, -7, -8]
    assert score(groups, mine, direction="minimum").values[groups.families[0].groups].tolist()[0] == 1


# ---- ensembles ---------------------------------------------------------------------------------------------


def test_ranks_are_shares_and_ties_share_theirs() -> None:
    values = torch.tensor([3.0, 1.0, 3.0, -2.0]).double()
    assert ranks(values).tolist() == [3.5 / 4, 2 / 4, 3.5 / 4, 1 / 4]


def test_an_ensemble_is_the_mean_of_ranks_over_all_channels() -> None:
    groups = grouped(lively(Planted()))
    ids = torch.cat([family.groups for family in groups])
    parts = [score(groups, name, batches=data()).values[ids] for name in ("l2", "lamp", "activation")]
    want = torch.stack([part.argsort().argsort() + 1 for part in parts]).double().mean(0) / len(ids)
    for criterion in ("l2+lamp+activation", "l2 + lamp + activation", ensemble("l2", "lamp", "activation")):
        scores = score(groups, criterion, batches=data())
        assert scores.normalisation == "none"
        assert torch.allclose(scores.values[ids], want)
    assert ensemble("l2", "lamp").__name__ == "l2+lamp"


def test_an_ensemble_takes_functions_and_tells_what_its_members_say() -> None:
    groups = grouped(lively(Planted()))

    def mine(evidence: Evidence) -> Iterator[Contribution]:
        yield groups.families[0].groups, torch.arange(8.0)

    scores = score(groups, ensemble("fisher", mine), batches=data()[0])
    assert scores.criterion == "fisher+mine"
    assert any("drawn from the model's output" in note for note in scores.notes)
    assert any("mine does not score all channels of 'conv2' (10)" in note for note in scores.notes)
    assert len(scores.notes) == len(set(scores.notes))


def test_ensembles_with_mistakes_are_told() -> None:
    groups = grouped(lively(Planted()))
    with pytest.raises(InputError, match="two criteria or more"):
        ensemble("l2")
    with pytest.raises(UnknownName, match=r"unknown criterion 'l3'; known: .*l2"):
        score(groups, "l2+l3")
    with pytest.raises(UnknownName, match="unknown criterion ''"):
        score(groups, "l2+")
    with pytest.raises(InputError, match=r"'l2\+hrank': criterion 'hrank': .*calibration data"):
        score(groups, "l2+hrank")


def test_an_ensemble_through_compress() -> None:
    model = lively(Planted())
    result = pk.compress(model, data()[0][:2], pk.Target(macs=0.5), criterion="l2+cosine", lower=False)
    assert result.plan.target["criterion"] == "l2+cosine"


# ---- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALIBRATED)
def test_data_is_asked_for(name: str) -> None:
    with pytest.raises(InputError, match=f"criterion '{name}': .* calibration data .*batches=loader"):
        score(grouped(lively(Planted())), name)


@pytest.mark.parametrize("name", ["lamp", "cosine"])
def test_weights_alone_will_do(name: str) -> None:
    assert bool(score(grouped(lively(Planted())), name).values.isfinite().any())


class Attention(nn.Module):
    """Tokens: a linear stem, self-attention, a feed-forward block, scores; everything on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 8))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(8, 12, 3, padding=1), nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.c, self.d = nn.Conv1d(12, 12, 3, groups=12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x.transpose(1, 2))))))).mean(2))


@pytest.mark.parametrize("kind", [Attention, Recurrent, Grouped])
def test_other_kinds_of_networks_are_scored(kind: type[nn.Module]) -> None:
    """No criterion fails on them; what one cannot score is scored by l2, and said; scores are the same twice."""
    torch.manual_seed(0)
    model: Any = kind().eval()
    batches = torch.randn(10, 5, 8), torch.randint(0, CLASSES, (10,))
    groups = grouped(model, torch.randn(2, 5, 8))
    ids = torch.cat([family.groups for family in groups])
    for name in CRITERIA:
        if name == "bn_scale" or (name == "hrank" and kind is not Attention):
            with pytest.raises(InputError, match="scores no channel"):
                score(groups, name, batches=batches)
            continue
        scores = score(groups, name, batches=batches)
        assert bool(scores.values[ids].isfinite().all()), name
        assert torch.equal(scores.values, score(groups, name, batches=batches).values), name
        unscored = [note for note in scores.notes if "does not score" in note]
        assert all("l2 was used there" in note for note in unscored)
        if name in ("l1", "obd", "fisher", "lamp"):
            assert not unscored, name


def test_cosine_and_lamp_of_half_precision() -> None:
    model = lively(Planted())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3000
    half = grouped(copy.deepcopy(model).half(), torch.randn(2, *SHAPE).half())
    for name in ("lamp", "cosine"):
        want, got = score(grouped(model), name).values, score(half, name).values
        assert torch.allclose(got, want, rtol=5e-2, atol=1e-2), name


def test_gradients_leave_the_model_alone() -> None:
    model = lively(Planted())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = grouped(model)
    batches = data(8)
    with torch.inference_mode():
        inside = score(groups, "fisher", batches=batches).values
    assert torch.equal(inside, score(groups, "fisher", batches=data(8)).values)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
