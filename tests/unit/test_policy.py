"""Policies: what they select, what they are held to, where they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekern as pk
from prunekern.core.policy import Policy, as_policy
from prunekern.errors import PlanError, TargetError
from tests.pruning import double, groups_of
from tests.tolerances import assert_equal_fp64
from tests.zoo import ZOO


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(10, 36), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


X = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(2))


def two() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Attention(), Attention()).eval()


@pytest.mark.parametrize(("attention", "channels"), [
    ("auto", [4, 4]), ("heads", [4, 4]), ("widths", [3, 3, 3, 3]),
    ({"0": "widths"}, [3, 3, 4]), ({"1*": "widths"}, [4, 3, 3]), ({"*": "widths", "0": "heads"}, [3, 3, 3, 3]),
    ({"0": "heads", "*": "widths"}, [4, 3, 3]), ({"nothing": "widths"}, [4, 4])])
def test_attention_by_layer(attention: Any, channels: list[int]) -> None:
    found = groups_of(two(), X, Policy(attention=attention))
    assert [family.channels for family in found] == channels


@pytest.mark.parametrize(("asked", "words"), [
    ({"attention": "head"}, "'head' is none of 'auto', 'heads', 'widths'"),
    ({"attention": {"0": "some"}}, "'some' is none of"),
    ({"attentions": "heads"}, "its fields are attention, outputs and norms"),
    ("widths", "is no policy")])
def test_bad_policies_are_refused(asked: Any, words: str) -> None:
    for use in (as_policy, lambda policy: pk.prune(two(), X, pk.Target(macs=0.5), policy=policy)):
        with pytest.raises(TargetError, match=words):
            use(asked)


def test_only_differences_are_written() -> None:
    assert Policy().to_json() == {}
    asked = Policy(attention={"0": "widths"}, norms="counted")
    assert asked.to_json() == {"attention": {"0": "widths"}, "norms": "counted"}
    assert as_policy(asked.to_json()) == asked


class Normalised(nn.Module):
    """A stream that is normalised, averaged and turned into shares: nothing of it can leave exactly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.rms = nn.Linear(6, width), nn.LayerNorm(width), nn.RMSNorm(width)
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.norm(x) + self.rms(x) * x.mean(-1, keepdim=True) + x.softmax(-1)
        return self.last(x / x.norm(dim=-1, keepdim=True))


def test_remaining_is_the_smaller_module() -> None:
    """The norms, the softmax and the averages run on what remains, as they do in a module built so narrow."""
    torch.manual_seed(5)
    model, x = Normalised(12).eval(), torch.randn(4, 6)
    nn.init.normal_(model.norm.weight)
    assert not len(groups_of(model, x, Policy(norms="fixed")))
    result = pk.prune(model, x, pk.Target(layers={"first": 0.5}), policy={"norms": "remaining"})
    kept = torch.tensor(result.plan.kept["first.weight"][0])
    assert len(kept) == 6
    small = Normalised(6).eval()
    state = model.state_dict()
    small.load_state_dict({name: state[name].index_select(-1, kept) if name == "last.weight" else
                           state[name] if name == "last.bias" else state[name][kept] for name in state})
    with torch.no_grad():
        assert_equal_fp64(double(result.model)(double(x)), double(small)(double(x)))
    assert any("inexact, as asked" in note for note in result.notes)
    assert result.plan.policy == {"norms": "remaining"}


def test_outputs_name_what_they_keep() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert pk.prune(model, x, pk.Target(layers={"*": 0.5})).plan.outputs == {}
    result = pk.prune(model, x, pk.Target(layers={"*": 0.5}), policy={"outputs": True})
    kept = result.plan.outputs["0"][1]
    assert result.plan.kept["2.weight"][0] == kept
    assert len(kept) == 5
    with torch.no_grad():
        assert result.model(x).shape == (2, 5, 4, 4)
        model[2].weight[:, [i for i in range(8) if i not in result.plan.kept["0.weight"][0]]] = 0
        assert_equal_fp64(double(result.model)(double(x)), double(model)(double(x))[:, kept])


def test_outputs_of_several_tensors() -> None:
    model, args, _ = ZOO["several_outputs"]()
    result = pk.prune(model, args, pk.Target(layers={"*": 0.5}), policy={"outputs": True})
    with torch.no_grad():
        before, after = (torch.utils._pytree.tree_leaves(m(*args)) for m in (model, result.model))
    assert result.plan.outputs
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        kept = result.plan.outputs.get(str(number), {})
        assert new.shape == tuple(len(kept.get(axis, range(size))) for axis, size in enumerate(old.shape))


@pytest.mark.parametrize("policy", [{"attention": "widths"}, {"norms": "remaining", "outputs": True}], ids=str)
def test_policies_survive(policy: dict[str, Any], tmp_path: Path) -> None:
    """In plans, applied again without a word about it, and in results on disk, loaded both ways."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(10, 10), Attention(), nn.LayerNorm(10), nn.Linear(10, 6)).eval()
    result = pk.compress(model, X, pk.Target(layers={"*": 0.5}), policy=policy)
    plan = result.plan
    assert plan.policy == policy
    assert bool(plan.outputs) == ("outputs" in policy)
    plan.save(tmp_path / "plan.json")
    again = pk.apply_plan(model, X, tmp_path / "plan.json")
    assert again.plan.kept == plan.kept
    assert again.plan.policy == policy
    result.save(tmp_path / "out")
    with torch.no_grad():
        wanted = result.model(X)
        for loaded in (pk.load(tmp_path / "out"), pk.load(tmp_path / "out", model=model)):
            assert loaded.plan == plan
            assert torch.allclose(loaded.model(X), wanted, atol=1e-6)


def test_plans_of_another_policy_are_refused() -> None:
    """A plan belongs to the groups it was made from: those of another policy have another fingerprint."""
    model = two()
    default, widths = (groups_of(model, X, Policy(attention=kind)) for kind in ("auto", "widths"))
    assert default.fingerprint() != widths.fingerprint()
    plan = pk.prune(model, X, pk.Target(layers={"*": 0.5})).plan
    with pytest.raises(PlanError, match="graph"):
        pk.apply_plan(model, X, plan, groups=widths)
