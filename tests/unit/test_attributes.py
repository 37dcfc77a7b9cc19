"""The user's class comes back wherever its sizes live in attributes; where they are literals, the line is named."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from prunekern.ops import REGISTRY
from prunekern.prune import attributes
from prunekern.prune.attributes import hard_coded
from prunekern.prune.oneshot import prune
from prunekern.prune.rebuild import rebuild
from prunekern.prune.target import Target
from tests.pruning import Cut, cut, groups_of, random_choice

X = torch.randn(2, 3, 4, 4)


def shrunk(model: nn.Module, x: Tensor = X, seed: int = 3, most: float = 0.7) -> Cut:
    groups = groups_of(model.eval(), x)
    return cut(model, groups, random_choice(groups, seed, most))


class Net(nn.Module):
    """conv - `between` - conv - linear; `between` is where subclasses hold sizes."""

    def __init__(self, width: int = 12, out: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width if out is None else out, 8, 1)
        self.head = nn.Linear(8 * 16, 5)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x).relu())).sigmoid().flatten(1))


class Plain(Net):
    width = 99                                         # what a class holds is nobody's instance's

    def __init__(self) -> None:
        super().__init__()
        self.width, self.scale = 12, 12 ** -0.5

    def between(self, x: Tensor) -> Tensor:
        return x.view(-1, self.width, 16).view(-1, self.width, 4, 4) * self.scale


class Lists(Net):
    def __init__(self) -> None:
        super().__init__()
        self.splits, self.table = [5, 7], {"low": (5, 7), "kernel": 12}

    def between(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, self.splits, 1)
        x = torch.cat([a.sigmoid(), b.tanh()], 1)
        return torch.cat([x[:, :self.table["low"][0]] + 1, x[:, self.table["low"][0]:]], 1)


class Halves(NamedTuple):
    left: int
    right: int


class Derived(Net):
    """Arithmetic, a helper function, a named tuple, a size read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.parts = 6, Halves(4, 8)

    def between(self, x: Tensor) -> Tensor:
        a, b = x.split(tuple(self.parts), dim=1)
        x = torch.cat((a.relu(), b.sigmoid()), 1)
        return reshaped(x, self.pairs * 2, x.shape[1] * 1)


def reshaped(x: Tensor, width: int, same: int) -> Tensor:
    return x.reshape(len(x), width, 16).reshape(x.size(0), same, 4, 4)


class EqualNumbers(nn.Module):
    """Heads and their width are both 4; the sequence and the batch of the input are 4 and 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.width, self.inner = 4, 4, 16
        self.qkv, self.out = nn.Linear(4, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(b, n, self.inner))


class Checked(Net):
    """A size that is only compared with that of a tensor, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.expected, self.width = 12, 12

    def between(self, x: Tensor) -> Tensor:
        _, c, _, _ = x.shape
        if c != self.expected:
            raise ValueError(f"expected {self.expected} channels")
        return x.view(-1, self.width, 4, 4)


class Configured(nn.Module):
    """Two blocks that read their widths from one configuration."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = SimpleNamespace(width=12, name="net", inner=SimpleNamespace(kernel=3))
        self.config = config
        self.blocks = nn.ModuleList(ConfiguredBlock(config) for _ in range(2))
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(torch.cat((x, x), 1).flatten(1))


class ConfiguredBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = nn.Conv2d(3, config.width, config.inner.kernel, padding=1), nn.Conv2d(config.width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().view(len(x), self.config.width, -1, 4))


class Selected(Net):
    """A split by a quotient of two attributes that are sizes of nothing else; all pieces run together."""

    def __init__(self) -> None:
        super().__init__(out=6)
        self.total, self.paths = 12, 2

    def between(self, x: Tensor) -> Tensor:
        a, b = x.split(self.total // self.paths, 1)
        return a.relu() + b.sigmoid()


class Depthwise(nn.Conv2d):
    """A layer with a forward of its own that reads what torch's layer reads."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, (1, 1), self.dilation, self.groups)


class Literal(Net):
    def between(self, x: Tensor) -> Tensor:
        return x.view(-1, 12, 4, 4)


class Chunked(Net):
    def between(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat((a.relu(), b.sigmoid()), 1)


def test_numbers_lists_and_dicts_follow() -> None:
    model = Plain()
    result = shrunk(model)
    assert result.proof.form == "class"
    width = result.model.first.out_channels
    assert result.model.width == width < 12 == model.width
    assert Plain.width == 99
    assert result.model.scale == 12 ** -0.5


def test_pieces_of_a_split_follow() -> None:
    model = Lists()
    result = shrunk(model)
    assert result.proof.form == "class"
    a, b = result.model.splits
    assert a + b == result.model.first.out_channels < 12
    assert result.model.table == {"low": (a, 7), "kernel": 12}
    assert model.splits == [5, 7]
    assert model.table == {"low": (5, 7), "kernel": 12}


def test_arithmetic_and_helpers_are_seen_through() -> None:
    for seed in range(20):
        result = shrunk(Derived(), seed=seed)
        width = result.model.first.out_channels
        if width % 2 == 0 and width < 12:
            break
    assert result.proof.form == "class"
    assert 2 * result.model.pairs == width == sum(result.model.parts)
    assert isinstance(result.model.parts, Halves)


def test_equal_numbers_are_told_apart() -> None:
    groups = groups_of(EqualNumbers().eval(), torch.randn(2, 4, 4))
    seen = set()
    for seed in range(6):
        result = cut(EqualNumbers().eval(), groups, random_choice(groups, seed, 0.7))
        assert result.proof.form == "class", result.proof.notes
        heads, width = result.model.heads, result.model.width
        assert heads * width == result.model.inner == result.model.out.in_features
        seen.add((heads == 4, width == 4))
    assert len(seen) > 1, "every choice left the sizes equal"


def test_of_two_unknowns_the_larger_follows() -> None:
    result = shrunk(Selected())
    assert result.proof.form == "class", result.proof.notes
    assert result.model.paths == 2
    assert result.model.total == result.model.first.out_channels < 12


def test_what_a_forward_compares_follows() -> None:
    result = shrunk(Checked())
    assert result.proof.form == "class"
    assert result.model.expected == result.model.width == result.model.first.out_channels < 12


def test_shared_settings_are_changed_where_all_agree_and_copied_where_not() -> None:
    model = Configured()
    groups = groups_of(model.eval(), X)
    own = copy.deepcopy(vars(model.config))
    agreed = differing = 0
    for seed in range(12):
        result = cut(model, groups, random_choice(groups, seed, 0.7))
        assert result.proof.form == "class", result.proof.notes
        first, second = result.model.blocks
        assert [block.config.width for block in (first, second)] == [block.up.out_channels for block in (first, second)]
        assert first.config.inner.kernel == 3
        assert first.config.name == "net"
        if first.up.out_channels == second.up.out_channels:
            agreed += 1
            assert first.config is second.config is result.model.config
        else:
            differing += 1
            assert first.config is not second.config
    assert agreed
    assert differing
    assert vars(model.config) == own


def test_literals_are_named_with_their_line() -> None:
    model = Literal()
    result = shrunk(model)
    assert result.proof.form == "graph"
    (line,) = hard_coded(model, result.groups, result.keep, REGISTRY)
    number = Literal.between.__code__.co_firstlineno + 1
    width = int(result.keep[result.groups.families[0].groups].sum())
    assert line == f"Literal ({__file__}:{number} `return x.view(-1, 12, 4, 4)`: 12 -> {width})"
    said = prune(model, X, Target(macs=0.5))
    assert said.proof.form == "graph"
    assert any(f":{number} `return x.view(-1, 12, 4, 4)`" in note for note in said.notes), said.notes


def test_pieces_that_are_no_longer_even_are_named() -> None:
    model = Chunked()
    for seed in range(9):
        result = shrunk(model, seed=seed)
        if result.proof.form == "graph":
            break
    (line,) = hard_coded(model, result.groups, result.keep, REGISTRY)
    assert "`a, b = x.chunk(2, 1)`: 6 -> " in line


def test_nothing_is_run_where_no_size_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of torch.nn, and those like them, follow their rules; a model of them costs nothing more."""
    monkeypatch.setattr(attributes, "traced_copy", lambda *_: pytest.fail("the model was run"))
    assert shrunk(Net()).proof.form == "class"
    result = shrunk(nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), Depthwise(12, 12, 3, groups=12), nn.Conv2d(12, 4, 1)))
    assert result.proof.form == "class"
    assert result.model[2].groups < 12


def test_a_model_comes_back_from_its_plan() -> None:
    model = Lists().eval()
    result = shrunk(model)
    again = rebuild(model, result.groups, result.plan, "class", result.model.state_dict())
    assert again.splits == result.model.splits
    assert torch.equal(again(X), result.model(X))
