"""Importance criteria: planted channels are found, numbers equal their definitions, bad input is told."""

from __future__ import annotations

import copy
import random as python_random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.errors import InputError, UnknownName
from prunekern.graph.groups import Groups, find_groups
from prunekern.graph.labels import label
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.prune.importance import CRITERIA, Evidence, score
from tests.networks import random_network
from tests.planted import (
    CLASSES,
    PLANTED,
    SHAPE,
    WEAK,
    FixedBatch,
    Planted,
    data,
    grouped,
    lively,
    planted_network,
    ranked,
)

# ---- planted channels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PLANTED)
def planted(request: pytest.FixtureRequest) -> tuple[str, Groups]:
    return request.param, grouped(planted_network(request.param))


def test_every_criterion_but_random_is_planted() -> None:
    assert set(PLANTED) | {"random"} == set(CRITERIA)


def test_planted_channels_go_first(planted: tuple[str, Groups]) -> None:
    name, groups = planted
    scores = score(groups, name, batches=data())
    assert len(groups) == 3
    left_out = ["hrank does not score all channels of 'fc1' (12); l2 was used there"] if name == "hrank" else []
    assert list(scores.notes) == left_out
    for family in groups:
        assert set(ranked(scores.values, family)[: len(WEAK)]) == set(WEAK), f"{name} in {family.name}"


def test_maximum_turns_the_order(planted: tuple[str, Groups]) -> None:
    name, groups = planted
    evidence = Evidence(groups, data())
    low = score(groups, name, evidence=evidence)
    high = score(groups, name, direction="maximum", evidence=evidence)
    own = torch.cat([family.groups for family in groups])
    assert torch.equal(low.values[own], -high.values[own])
    assert float(high.values[0]) == float(low.values[0]) == torch.inf
    for family in groups:
        assert set(ranked(high.values, family)[-len(WEAK) :]) == set(WEAK)


def test_criteria_differ(planted: tuple[str, Groups]) -> None:
    """What is planted for one criterion by its own notion is not what plain magnitude would find."""
    name, groups = planted
    if name in ("l1", "l2", "lamp"):
        pytest.skip("magnitude itself")
    scores = score(groups, "l2", batches=data())
    families = groups.families[:2] if name == "hrank" else groups.families
    assert all(set(ranked(scores.values, family)[: len(WEAK)]) != set(WEAK) for family in families)


# ---- definitions -------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A residual family, a grouped convolution, a depthwise one, a module used twice, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.back = nn.Conv2d(12, 8, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.grouped(x))
        x = x + self.back(F.relu(self.depthwise(y)))
        x = F.relu_(self.norm(self.twice(F.relu(self.twice(x)))))
        return self.fc(self.pool(F.relu(self.up(x))).flatten(1))


@pytest.fixture(scope="module")
def mixed() -> tuple[Any, Groups]:
    torch.manual_seed(3)
    model = lively(Mixed())
    return model, grouped(model)


def owned(groups: Groups, name: str, axis: int, group: int) -> Tensor:
    """Which elements of a tensor belong to a group along an axis; spelled out with loops."""
    shape, index = groups.graph.tensors[name].shape, groups.labels.axes[name, axis]
    mask = torch.zeros(shape, dtype=torch.bool)
    if index.dim() == 1:
        for i in range(shape[axis]):
            mask.select(axis, i)[...] = int(index[i]) == group
        return mask
    block = shape[0] // len(index)
    for row in range(len(index)):
        for i in range(shape[axis]):
            mask[row * block : (row + 1) * block].select(axis, i)[...] = int(index[row, i]) == group
    return mask


def expected(
    groups: Groups, model: nn.Module, of: Callable[[str, Tensor], Tensor], finish: Any
) -> dict[int, float]:
    """Group -> sum over members of finish(sum over the member's slice)."""
    parameters = dict(model.named_parameters())
    result: dict[int, float] = {}
    for family in groups:
        for group in family.groups.tolist():
            members = [m for m in family.members if m.name in parameters]
            result[group] = sum(
                float(
                    finish(
                        of(m.name, parameters[m.name].detach())[owned(groups, m.name, m.axis, group)].sum()
                    )
                )
                for m in members
            )
    return result


def assert_sums(groups: Groups, criterion: str, want: dict[int, float], **how: Any) -> None:
    values = score(groups, criterion, reduction="sum", normalisation="none", **how).values
    assert want
    for group, value in want.items():
        assert float(values[group]) == pytest.approx(value, rel=1e-4), f"{criterion}, group {group}"


MAGNITUDES = {"l1": (torch.abs, lambda s: s), "l2": (torch.square, torch.sqrt)}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_magnitude_of_the_whole_group(mixed: tuple[Any, Groups], name: str) -> None:
    model, groups = mixed
    of, finish = MAGNITUDES[name]
    assert_sums(groups, name, expected(groups, model, lambda _, w: of(w), finish))


@pytest.mark.parametrize("seed", range(12))
def test_magnitude_on_random_networks(seed: int) -> None:
    case = random_network(seed)
    groups = grouped(case.model, *case.args)
    if not len(groups):
        pytest.skip("nothing to prune in it")
    for name, (of, finish) in MAGNITUDES.items():
        assert_sums(groups, name, expected(groups, case.model, lambda _, w, of=of: of(w), finish))


def test_taylor_is_the_change_of_the_loss(mixed: tuple[Any, Groups]) -> None:
    model, groups = mixed
    x, y = data()
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    found = Evidence(groups, (x, y)).gradients()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
    assert_sums(
        groups, "taylor", expected(groups, model, lambda n, w: w * gradients[n], torch.abs), batches=(x, y)
    )


def test_taylor_predicts_a_small_step() -> None:
    """The score is |dL| per unit of shrinking one slice: shrink it a little and look."""
    torch.manual_seed(2)
    model = lively(Planted()).double()
    x, y = data()
    groups = grouped(model, x[:2].double())
    family = groups.find("conv1")[0]
    member = next(m for m in family.members if m.name == "conv2.weight")
    gradients = Evidence(groups, (x.double(), y)).gradients()
    step = 1e-6
    for channel in range(family.channels):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.conv2.weight[:, channel] *= 1 - step
            change = (F.cross_entropy(twin(x.double()), y) - F.cross_entropy(model(x.double()), y)) / step
        slice_ = (model.conv2.weight * gradients[member.name])[:, channel].sum()
        assert -slice_.item() == pytest.approx(float(change), rel=1e-3, abs=1e-8)


def test_fpgm_sums_distances_within_each_layer(mixed: tuple[Any, Groups]) -> None:
    model, groups = mixed
    family = next(f for f in groups if "back" in f.layers)
    assert set(family.layers) >= {"stem", "back", "twice"}, "the residual family"
    want = torch.zeros(8)
    for layer in (model.stem, model.back, model.twice):
        rows = layer.weight.detach().flatten(1)
        want += torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    values = score(groups, "fpgm", reduction="sum", normalisation="none").values[family.groups]
    assert torch.allclose(values.float(), want, rtol=1e-4)


def test_fpgm_of_a_grouped_transposed_convolution(mixed: tuple[Any, Groups]) -> None:
    """Its filters lie along axis 1 and belong to their own block of axis 0."""
    model, groups = mixed
    family = next(f for f in groups if f.layers == ("up",))
    blocks = model.up.weight.detach().unflatten(0, (2, 4))  # [block, in, out, 2, 2]
    rows = torch.cat([block[:, i].flatten()[None] for block in blocks for i in range(3)])
    want = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    values = score(groups, "fpgm", reduction="sum", normalisation="none").values
    bias = groups.labels.axes["up.bias", 0]
    assert set(bias.tolist()) == set(family.groups.tolist())
    assert torch.allclose(values[bias].float(), want, rtol=1e-4)


def test_bn_scale_is_the_absolute_gamma() -> None:
    model = lively(Planted())
    groups = grouped(model)
    values = score(groups, "bn_scale", normalisation="none").values
    for norm in ("bn1", "bn2", "bn3"):
        gamma = getattr(model, norm).weight.detach()
        assert bool((gamma < 0).any()) or norm != "bn3"
        assert torch.equal(values[groups.labels.axes[f"{norm}.weight", 0]], gamma.abs().double())


def _hooked(model: nn.Module, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        m.register_forward_hook(lambda *a: seen.append(a[2].clone())) for m in model if isinstance(m, nn.ReLU)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_activations_are_measured_behind_the_activation_function() -> None:
    """Averages, dropout and flattening behind a ReLU change neither its mean nor its share of zeros."""
    model = lively(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5),
            nn.Conv2d(6, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(inplace=True), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(28, 9), nn.ReLU(), nn.Linear(9, CLASSES),
        )
    )  # fmt: skip
    groups = grouped(model)
    x = data()[0]
    statistics = Evidence(groups, x).activations()
    for found, seen, family in zip(statistics, _hooked(model, x), groups, strict=True):
        others = [a for a in range(seen.dim()) if a != 1]
        assert torch.equal(found.groups, family.groups)
        assert torch.allclose(found.magnitude, seen.double().mean(others), rtol=1e-5)
        assert torch.allclose(found.mean, seen.double().mean(others), rtol=1e-5)
        assert torch.allclose(found.zeros, (seen == 0).double().mean(others), atol=1e-12)
    assert torch.equal(
        score(groups, "apoz", normalisation="none", batches=x).values[groups.families[1].groups],
        1 - statistics[1].zeros,
    )


def test_signed_activations_count_by_magnitude() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, CLASSES, 1)))
    groups = grouped(model)
    x = data()[0]
    statistics = Evidence(groups, x).activations()[0]
    values = torch.tanh(model[0](x)).detach().double()
    assert torch.allclose(statistics.mean, values.mean((0, 2, 3)), atol=1e-6)
    got = score(groups, "activation", normalisation="none", batches=x).values[groups.families[0].groups]
    assert torch.allclose(got, values.abs().mean((0, 2, 3)), rtol=1e-5)


def test_a_flattened_channel_is_one_contribution() -> None:
    """All 16 pixels of a channel of conv2 are one slice of fc1, not sixteen."""
    model = lively(Planted())
    groups = grouped(model)
    pairs = [
        pair
        for pair in CRITERIA["l2"](Evidence(groups))
        if bool(torch.isin(pair[0], groups.families[1].groups).all())
    ]
    assert [len(ids) for ids, _ in pairs] == [10] * 5  # weight, bias, gamma, beta, and the columns of fc1
    want = model.fc1.weight.detach().unflatten(1, (10, 16)).square().sum((0, 2)).sqrt()
    assert torch.allclose(
        dict(zip("wbgac", (s for _, s in pairs), strict=True))["c"].float(), want, rtol=1e-5
    )


def test_a_group_of_two_channels_is_their_mean() -> None:
    """A normalisation group leaves as a whole; filters and activations are averaged over its channels."""
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)))
    groups = grouped(model)
    ids = groups.families[0].groups
    assert groups.labels.axes["0.weight", 0].tolist() == ids.repeat_interleave(2).tolist()
    rows, x = model[0].weight.detach().flatten(1), data()[0]
    with torch.no_grad():
        post = model[:3](x)
    for name, want in (
        ("fpgm", torch.stack([(rows - row).norm(dim=1).sum() for row in rows])),
        ("activation", post.mean((0, 2, 3))),
        ("apoz", (post != 0).float().mean((0, 2, 3))),
    ):
        values = score(groups, name, normalisation="none", batches=x).values[ids]
        assert torch.allclose(values.float(), want.view(4, 2).mean(1), rtol=1e-4), name


# ---- reductions and normalisations -------------------------------------------------------------------------


def _three(evidence: Evidence) -> Iterator[tuple[Tensor, Tensor]]:
    first = evidence.groups.families[0].groups
    yield first, torch.arange(1.0, len(first) + 1)
    yield first.flip(0), torch.full((len(first),), 4.0)
    yield first[:1], torch.tensor([10.0])
    for family in evidence.groups.families[1:]:
        yield family.groups, torch.ones(family.channels)


@pytest.mark.parametrize(
    ("reduction", "want"),
    [
        ("sum", [15, 6, 7, 8, 9, 10, 11, 12]),
        ("mean", [5, 3, 3.5, 4, 4.5, 5, 5.5, 6]),
        ("max", [10, 4, 4, 4, 5, 6, 7, 8]),
        ("prod", [40, 8, 12, 16, 20, 24, 28, 32]),
        ("first", [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_reductions(reduction: Any, want: list[float]) -> None:
    groups = grouped(lively(Planted()))
    scores = score(groups, _three, reduction=reduction, normalisation="none")
    assert scores.values[groups.families[0].groups].tolist() == want
    assert scores.criterion == "_three"


@pytest.mark.parametrize(
    ("normalisation", "want"),
    [
        ("none", lambda v: v),
        ("mean", lambda v: v / (sum(v) / len(v))),
        ("max", lambda v: v / max(v)),
        ("sum", lambda v: v / sum(v)),
        ("gauss", lambda v: (v - v.mean()) / ((v - v.mean()) ** 2).mean().sqrt()),
    ],
)
def test_normalisations_within_each_family(normalisation: Any, want: Callable[[Tensor], Tensor]) -> None:
    groups = grouped(lively(Planted()))
    plain = score(groups, "l1", normalisation="none").values
    values = score(groups, "l1", normalisation=normalisation).values
    for family in groups:
        assert torch.allclose(values[family.groups], want(plain[family.groups]))
        assert ranked(values, family) == ranked(plain, family)


def test_a_family_of_zeros_stays_finite() -> None:
    groups = grouped(lively(Planted()))
    for normalisation in ("none", "mean", "max", "sum", "gauss"):
        values = score(
            groups,
            lambda e: [(f.groups, torch.zeros(f.channels)) for f in e.groups],
            normalisation=normalisation,
        ).values
        assert values.isfinite().sum() == sum(Planted.widths)


def test_negative_scores_keep_their_order() -> None:
    groups = grouped(lively(Planted()))
    family = groups.families[0]
    for normalisation in ("mean", "max", "sum", "gauss"):
        values = score(
            groups,
            lambda e: [(f.groups, -torch.arange(f.channels)) for f in e.groups],
            normalisation=normalisation,
        ).values
        assert ranked(values, family) == list(range(family.channels))[::-1], normalisation


def test_first_is_the_layer_that_issues_the_channels() -> None:
    model = lively(Mixed())
    groups = grouped(model)
    values = score(groups, "l2", reduction="first", normalisation="none").values
    for layer in (model.stem, model.grouped):
        name = next(n for n, m in model.named_modules() if m is layer)
        ids = groups.labels.axes[f"{name}.weight", 0]
        assert torch.allclose(values[ids].float(), layer.weight.detach().flatten(1).norm(dim=1), rtol=1e-5), (
            name
        )


def test_what_is_fixed_or_unowned_stays() -> None:
    groups = grouped(lively(Mixed()))
    for name in CRITERIA:
        values = score(groups, name, batches=data()).values
        assert values.shape == (groups.labels.groups,)
        assert values.dtype == torch.float64
        free = torch.cat([family.groups for family in groups])
        assert bool(values[free].isfinite().all())
        rest = torch.ones_like(values, dtype=torch.bool)
        rest[free] = False
        assert bool(rest[0])
        assert bool((values[rest] == torch.inf).all())


# ---- properties --------------------------------------------------------------------------------------------


def test_scaling_all_weights() -> None:
    model = lively(Planted())
    before = {
        n: score(grouped(model), n, normalisation="none").values for n in ("l1", "l2", "fpgm", "bn_scale")
    }
    shares = score(grouped(model), "l2").values
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    groups = grouped(model)
    free = torch.cat([family.groups for family in groups])
    for name, values in before.items():
        after = score(groups, name, normalisation="none").values
        assert torch.allclose(after[free], 3 * values[free], rtol=1e-4), name
    assert torch.allclose(score(groups, "l2").values[free], shares[free], rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random"}))
def test_permuting_channels_permutes_scores(name: str) -> None:
    model = lively(Planted())
    order = torch.randperm(8)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (
            *twin.conv1.parameters(),
            *twin.bn1.parameters(),
            twin.bn1.running_mean,
            twin.bn1.running_var,
        ):
            tensor.copy_(tensor[order])
        twin.conv2.weight.copy_(twin.conv2.weight[:, order])
    values = []
    for network in (model, twin):
        groups = grouped(network)
        values.append(score(groups, name, batches=data()).values[groups.find("conv1")[0].groups])
    assert torch.allclose(values[1], values[0][order], rtol=1e-3)
    assert not torch.allclose(values[1], values[0], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    """Squares of half-precision weights overflow at 256; the scores do not."""
    model = lively(Planted())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3000
    reference = grouped(model)
    half = grouped(copy.deepcopy(model).to(dtype), torch.randn(2, *SHAPE).to(dtype))
    for name in ("l1", "l2", "fpgm", "bn_scale"):
        want, got = score(reference, name).values, score(half, name).values
        assert torch.allclose(got, want, rtol=2e-2), name


def test_memory_format_does_not_matter(mixed: tuple[Any, Groups]) -> None:
    model, groups = mixed
    other = grouped(copy.deepcopy(model).to(memory_format=torch.channels_last))
    for name in ("l1", "l2", "fpgm"):
        assert torch.allclose(score(other, name).values, score(groups, name).values, rtol=1e-5)


def test_random_is_seeded_and_leaves_the_global_state_alone() -> None:
    groups = grouped(lively(Planted()))
    states = torch.get_rng_state(), python_random.getstate()
    values = [score(groups, "random", normalisation="none", seed=seed).values for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert python_random.getstate() == states[1]
    assert torch.equal(values[0], values[1])
    free = torch.cat([family.groups for family in groups])
    assert not bool((values[0][free] == values[2][free]).any())
    assert bool(((values[0][free] >= 0) & (values[0][free] < 1)).all())
    assert len(values[0][free].unique()) == len(free)


def test_the_same_twice() -> None:
    groups = grouped(lively(Mixed()))
    for name in CRITERIA:
        assert torch.equal(
            score(groups, name, batches=data()).values, score(groups, name, batches=data()).values
        )


# ---- the user's model is left alone ------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_of_the_model_changes(context: Any) -> None:
    model = lively(Mixed())
    model.stem.weight.requires_grad_(False)
    model.fc.weight.grad = torch.full_like(model.fc.weight, 7)
    groups = grouped(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = data(32)
    given = x.clone()
    with context():
        values = {name: score(groups, name, batches=(x, y)).values for name in CRITERIA}
    assert torch.equal(values["taylor"], score(groups, "taylor", batches=(x, y)).values)
    assert torch.equal(x, given)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert bool((model.fc.weight.grad == 7).all())
    assert not any(module.training for module in model.modules())
    frozen = groups.labels.axes["stem.weight", 0]
    assert bool((values["taylor"][frozen] > 0).all()), "a frozen parameter still has a gradient"


def test_an_in_place_first_operator_leaves_the_data_alone() -> None:
    model = lively(
        nn.Sequential(
            nn.ReLU(inplace=True), nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, CLASSES, 6), nn.Flatten()
        )
    )
    groups = grouped(model)
    x, y = data(32)
    given = x.clone()
    for name in ("activation", "taylor"):
        score(groups, name, batches=(x, y))
        assert torch.equal(x, given)


class Doubled(nn.Module):
    """Doubles in place what a sigmoid needs for its gradient: plain autograd refuses it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).mul_(2)


def test_gradients_through_in_place_operators() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3), Doubled(), nn.Conv2d(6, CLASSES, 6), nn.Flatten()))
    x, y = data(32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.cross_entropy(model(x), y).backward()
    first, _, second, _ = model
    F.cross_entropy(second(2 * torch.sigmoid(first(x))).flatten(1), y).backward()
    found = Evidence(grouped(model), (x, y)).gradients()
    assert torch.allclose(found["0.weight"], first.weight.grad, rtol=1e-4, atol=1e-7)


# ---- calibration data --------------------------------------------------------------------------------------


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = data()
        return x[index], y[index]


SPELLINGS: dict[str, Callable[[], Any]] = {
    "batches of unequal size": lambda: [
        (data()[0][a:b], data()[1][a:b]) for a, b in ((0, 7), (7, 60), (60, 96))
    ],
    "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 40),
    "dataset": _Rows,
    "function": lambda: lambda: iter([data()]),
    "generator": lambda: (pair for pair in [data()]),
    "list of two tensors": lambda: list(data()),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_data_gives_the_same(mixed: tuple[Any, Groups], spelling: str) -> None:
    """Losses are means over batches, so batches count by their rows."""
    _, groups = mixed
    for name in ("taylor", "activation"):
        want = score(groups, name, batches=data()).values
        got = score(groups, name, batches=SPELLINGS[spelling]()).values
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-6), name


def test_unlabelled_data(mixed: tuple[Any, Groups]) -> None:
    _, groups = mixed
    x = data()[0]
    want = score(groups, "activation", batches=data()).values
    for batches in (x, [x[:50], x[50:]], [x[:48], x[48:]], [(x,)], lambda: x):
        assert torch.allclose(score(groups, "activation", batches=batches).values, want, rtol=1e-5)

    def confidence(output: Tensor) -> Tensor:
        return output.softmax(1).square().sum(1).mean()

    model = mixed[0]
    twin = copy.deepcopy(model)
    confidence(twin(x)).backward()
    found = Evidence(groups, x, confidence).gradients()
    assert torch.allclose(found["back.weight"], twin.back.weight.grad, rtol=1e-4, atol=1e-7)


def test_targets_that_look_like_inputs() -> None:
    """A tuple of two tensors is inputs and targets, even where both have the shape of inputs."""
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)))
    x, noise = data()[0], torch.randn(96, *SHAPE)
    found = Evidence(grouped(model), (x, noise), F.mse_loss)
    F.mse_loss(model(x), noise).backward()
    assert torch.allclose(found.gradients()["0.weight"], model[0].weight.grad, rtol=1e-4, atol=1e-7)
    want = F.relu(model[0](x)).detach().double().mean((0, 2, 3))
    assert torch.allclose(found.activations()[0].mean, want, rtol=1e-5)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"scores": self.out(F.relu(self.a(left) + self.b(right)))}


def test_several_inputs_keywords_and_structured_outputs() -> None:
    model = lively_two = Two().eval()
    left, right, target = torch.randn(9, 4), torch.randn(9, 3), torch.randint(0, 2, (9,))
    want = F.relu(model.a(left) + model.b(right)).detach().double().mean(0)

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output["scores"], target)

    for example, batches in (
        ((left, right), [(left, right)]),
        ((left, right), [((left, right), target)]),
        ({"left": left, "right": right}, [{"left": left, "right": right}]),
        ({"left": left, "right": right}, {"left": left, "right": right}),
        ({"left": left, "right": right}, [({"left": left, "right": right}, target)]),
    ):
        groups = find_groups(label(trace(lively_two, example), REGISTRY))
        values = score(groups, "activation", normalisation="none", batches=batches).values
        assert torch.allclose(values[groups.families[0].groups], want, rtol=1e-5)
        if isinstance(batches, list) and isinstance(batches[0], tuple) and batches[0][1] is target:
            assert bool(score(groups, "taylor", batches=batches, loss=loss).values.isfinite().any())
            with pytest.raises(InputError, match="loss \\(cross-entropy\\) fails on calibration batch 0"):
                score(groups, "taylor", batches=batches)


def test_a_network_of_fixed_batch() -> None:
    model = FixedBatch().eval()
    groups = grouped(model, torch.randn(4, 4))
    assert not groups.graph.free_batch
    x = torch.randn(12, 4)
    want = F.relu(model.one(x)).detach().double().mean(0)
    values = score(groups, "activation", normalisation="none", batches=x).values
    assert torch.allclose(values[groups.families[0].groups], want, rtol=1e-5)
    with pytest.raises(InputError, match="batch 0 has 12 rows, but the forward fixes its batch size at 4"):
        score(groups, "activation", batches=[x])


def test_evidence_is_computed_once() -> None:
    groups = grouped(lively(Planted()))
    passes = []

    def batches() -> list[tuple[Tensor, Tensor]]:
        passes.append(1)
        return [data()]

    evidence = Evidence(groups, batches)
    score(groups, "activation", evidence=evidence)
    score(groups, "apoz", evidence=evidence)
    assert len(passes) == 1
    score(groups, "taylor", evidence=evidence)
    score(groups, "l2", evidence=evidence)
    assert len(passes) == 2


# ---- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["taylor", "activation", "apoz"])
def test_data_is_asked_for(name: str) -> None:
    groups = grouped(lively(Planted()))
    with pytest.raises(InputError, match=f"criterion '{name}': .* calibration data .*batches=loader"):
        score(groups, name)


@pytest.mark.parametrize("name", ["l1", "l2", "bn_scale", "fpgm", "random"])
def test_other_criteria_need_none(name: str) -> None:
    assert bool(score(grouped(lively(Planted())), name).values.isfinite().any())


def test_taylor_asks_for_targets() -> None:
    with pytest.raises(
        InputError, match=r"'taylor': .*no targets; pass batches of \(inputs, target\), or loss"
    ):
        score(grouped(lively(Planted())), "taylor", batches=data()[0])


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "gave no batch"),
        ([torch.randn(4, 3, 9, 8)], "batch 0 is a tensor \\(4, 3, 9, 8\\), but the network was traced with"),
        ([data(8), (torch.randn(4, 2), 1)], "batch 1 is a tuple"),
        ([{"x": torch.randn(2, *SHAPE)}], "batch 0 is a dict of \\['x'\\]"),
        (7, "calibration data is a int"),
        ([torch.zeros(2, *SHAPE, dtype=torch.uint8)], "network fails on calibration batch 0"),
    ],
)
def test_bad_data_is_told(batches: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        score(grouped(lively(Planted())), "activation", batches=batches)


def test_a_used_up_generator_is_told() -> None:
    evidence = Evidence(grouped(lively(Planted())), (pair for pair in [data()]))
    evidence.activations()
    with pytest.raises(InputError, match="generator can be used only once"):
        evidence.gradients()


@pytest.mark.parametrize(
    "loss",
    [lambda o, t: 3.0, lambda o, t: o, lambda o, t: o.argmax(1).float().mean()],
    ids=["float", "many", "argmax"],
)
def test_a_loss_without_gradient_is_told(loss: Any) -> None:
    with pytest.raises(InputError, match="one number that depends on the weights"):
        score(grouped(lively(Planted())), "taylor", batches=data(), loss=loss)


def test_unknown_names_list_the_known() -> None:
    groups = grouped(lively(Planted()))
    with pytest.raises(UnknownName, match=r"unknown criterion 'magnitude'; known: activation, .*taylor"):
        score(groups, "magnitude")
    for kind in ("reduction", "normalisation", "direction"):
        with pytest.raises(UnknownName, match=f"unknown {kind} 'median'; known: .*m"):
            score(groups, **{kind: "median"})
    with pytest.raises(InputError, match="criterion is a int; pass a name"):
        score(groups, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("contribution", "match"),
    [
        (lambda ids: (ids, torch.full((len(ids),), torch.nan)), "score of group .* \\(in 'conv1'\\) is nan"),
        (lambda ids: (ids, torch.ones(len(ids) + 1)), "both must have one axis of the same length"),
        (lambda ids: (ids.float(), torch.ones(len(ids))), "the groups int64"),
        (lambda ids: (ids + 10_000, torch.ones(len(ids))), "groups go from 0 to"),
        (lambda ids: torch.ones(len(ids)), "yields Tensor"),
    ],
)
def test_nonsense_from_a_users_criterion_is_told(contribution: Any, match: str) -> None:
    def mine(evidence: Evidence) -> list[Any]:
        return [contribution(evidence.groups.families[0].groups)]

    with pytest.raises(InputError, match=f"criterion 'mine': .*{match}"):
        score(grouped(lively(Planted())), mine)


def test_what_must_stay_may_have_any_score() -> None:
    def mine(evidence: Evidence) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.tensor([0]), torch.tensor([torch.nan])
        for family in evidence.groups:
            yield family.groups, torch.ones(family.channels)

    assert float(score(grouped(lively(Planted())), mine).values[0]) == torch.inf


def test_overflow_of_a_product_is_told() -> None:
    with pytest.raises(
        InputError, match="the prod over a group's members overflows; choose reduction='mean'"
    ):
        score(
            grouped(lively(Planted())),
            lambda e: [(f.groups, torch.ones(f.channels).double() * 1e200) for f in e.groups] * 2,
            reduction="prod",
        )


def test_evidence_of_other_groups_is_refused() -> None:
    one, other = grouped(lively(Planted())), grouped(lively(Planted()))
    for how in ({"evidence": Evidence(other)}, {"evidence": Evidence(one), "batches": data()}):
        with pytest.raises(InputError, match="evidence belongs to other groups, or comes along with"):
            score(one, "l2", **how)  # type: ignore[arg-type]


def test_families_left_out_fall_back_to_l2_and_are_named() -> None:
    model = lively(nn.Sequential(OrderedDict(
        first=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6), relu=nn.ReLU(), second=nn.Conv2d(6, 7, 3),
        third=nn.Conv2d(7, CLASSES, 1))))  # fmt: skip
    groups = grouped(model)
    scores = score(groups, "bn_scale")
    assert scores.notes == ("bn_scale does not score all channels of 'second' (7); l2 was used there",)
    first, second = groups.find("first")[0].groups, groups.find("second")[0].groups
    gamma = model.norm.weight.detach().abs().double()
    assert torch.allclose(scores.values[first], gamma / gamma.mean())
    assert torch.equal(scores.values[second], score(groups, "l2").values[second])
    assert "set a normalisation" in score(groups, "bn_scale", normalisation="none").notes[0]
    assert "bn_scale does not score" in str(scores)


def test_a_criterion_that_scores_nothing_is_an_error() -> None:
    groups = grouped(lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, CLASSES, 1))))
    with pytest.raises(InputError, match=r"'bn_scale' scores no channel of this model .*no batch norm"):
        score(groups, "bn_scale")
    with pytest.raises(InputError, match="scores no channel"):
        score(groups, lambda evidence: [])


def test_ties_are_noted() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Conv2d(6, CLASSES, 1)))
    scores = score(grouped(model), "apoz", batches=data())
    assert scores.notes == ("all channels score the same in '0' (6); which of them go first is arbitrary",)
    assert score(grouped(model), "activation", batches=data()).notes == ()


def test_nothing_to_prune_is_no_error() -> None:
    groups = grouped(lively(nn.Sequential(nn.Conv2d(3, CLASSES, 3))))
    assert len(groups) == 0
    assert bool((score(groups, "l2").values == torch.inf).all())
