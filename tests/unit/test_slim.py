"""Attention modules with fewer or narrower heads: what torch's class does, in a class of the same interface."""

from __future__ import annotations

import copy
import io
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.prune import slim
from prunekern.prune.slim import SlimMultiheadAttention
from tests.pruning import cut, first_units, groups_of, random_choice

N, L, S, E, H = 3, 4, 5, 8, 2
MAKES: dict[str, dict[str, Any]] = {
    "plain": {}, "batch first": {"batch_first": True}, "no bias": {"bias": False}, "zeros": {"add_zero_attn": True},
    "extra key": {"add_bias_kv": True}, "both extras": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 7, "batch_first": True}, "dropout": {"dropout": 0.5}}


def switched(module: nn.MultiheadAttention) -> SlimMultiheadAttention:
    """A slim copy that has lost nothing."""
    made: Any = copy.deepcopy(module)
    slim._switch(made, [torch.ones(E, dtype=torch.bool)] * 3)
    assert type(made) is SlimMultiheadAttention
    return made


def attention(**settings: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, **settings).double().eval()
    for parameter in module.parameters():                  # torch starts biases at zero
        nn.init.normal_(parameter)
    return module


def calls(module: nn.MultiheadAttention, batched: bool) -> list[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int, width: int) -> Tensor:
        x = torch.randn(N if batched else 1, length, width, generator=generator, dtype=torch.float64)
        return x[0] if not batched else x if module.batch_first else x.transpose(0, 1)
    inputs = draw(L, E), draw(S, module.kdim), draw(S, module.vdim)
    rows = N if batched else 1
    padding = torch.arange(S).expand(rows, S) >= torch.arange(3, 3 + rows)[:, None]
    padding = padding if batched else padding[0]
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    scores = torch.randn(rows * H, L, S, generator=generator, dtype=torch.float64)
    masks: list[dict[str, Any]] = [
        {}, {"attn_mask": causal}, {"attn_mask": causal, "is_causal": True}, {"attn_mask": scores},
        {"key_padding_mask": padding}, {"attn_mask": causal, "key_padding_mask": padding}]
    ways: list[dict[str, Any]] = [{}, {"need_weights": False}, {"average_attn_weights": False}]
    return [(inputs, {**mask, **way}) for mask, way in product(masks, ways)]


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one"])
@pytest.mark.parametrize("name", MAKES)
def test_does_what_torch_does(name: str, batched: bool) -> None:
    module = attention(**MAKES[name])
    other = switched(module)
    assert list(other.state_dict()) == list(module.state_dict())
    for inputs, settings in calls(module, batched):
        with torch.no_grad():
            expected, weights = module(*inputs, **settings)
            got, others = other(*inputs, **settings)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(others, weights, rtol=1e-10, atol=1e-12)


def test_a_hint_without_its_mask_is_refused() -> None:
    x = torch.randn(L, N, E, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="attn_mask"):
        switched(attention())(x, x, x, is_causal=True)


def test_dropout_follows_training() -> None:
    x = torch.randn(L, N, E, dtype=torch.float64)
    module = switched(attention(dropout=0.5)).train()
    for need_weights in (True, False):
        assert not torch.equal(*(module(x, x, x, need_weights=need_weights)[0] for _ in range(2)))


class Decoder(nn.Module):
    """Self-attention and attention to a memory of another width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = nn.MultiheadAttention(12, 3, batch_first=True)
        self.cross = nn.MultiheadAttention(12, 3, kdim=6, vdim=5, batch_first=True)
        self.memory, self.head = nn.Linear(12, 6), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.head(x + self.cross(x, self.memory(x).relu(), x[..., :5])[0])


def test_pruned_attention_keeps_its_class() -> None:
    model, x = Decoder().eval(), torch.randn(2, 4, 12)
    groups = groups_of(model, x)
    changed = []
    for seed in range(6):
        result = cut(model, groups, random_choice(groups, seed, 0.7))
        assert result.proof.form == "class", result.proof.notes
        for path in ("own", "cross"):
            part = result.model.get_submodule(path)
            assert isinstance(part, nn.MultiheadAttention)
            assert part.embed_dim == 12
            assert isinstance(part, SlimMultiheadAttention) == (part.out_proj.in_features < 12)
            changed += [path] if isinstance(part, SlimMultiheadAttention) else []
        assert type(model.own) is nn.MultiheadAttention
    assert set(changed) == {"own", "cross"}


def test_saved_copied_and_trained() -> None:
    model, x = Decoder().eval(), torch.randn(2, 4, 12)
    groups = groups_of(model, x)
    found = cut(model, groups, random_choice(groups, 0, 0.7)).model
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    for again in (copy.deepcopy(found), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), found(x))
    found.train()(x).sum().backward()
    assert all(p.grad is not None for p in found.parameters())


def test_encoders_take_padding_masks_as_before() -> None:
    """Torch's encoder packs padded batches on a fast path that knows torch's own attention, of even heads, only."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 4, 12)
    groups = groups_of(model, x)
    keep = groups.everything()
    for family in groups:
        if "attn" in family.name:
            keep[family.groups.unique()[:2]] = False
    result = cut(model, groups, keep)
    assert result.proof.form == "class"
    assert [part.num_heads for part in result.model.modules() if isinstance(part, SlimMultiheadAttention)] == [2, 2]
    padding = torch.tensor([[False, False, False, True], [False] * 4])
    with torch.no_grad():
        fast = result.model(x, src_key_padding_mask=padding)
    slow = result.model(x.clone().requires_grad_(), src_key_padding_mask=padding)
    torch.testing.assert_close(fast[~padding], slow[~padding])


class Tied(nn.Module):
    """Two attention modules of one set of projections."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.MultiheadAttention(12, 3, batch_first=True) for _ in range(2))
        self.two.in_proj_weight, self.two.in_proj_bias = self.one.in_proj_weight, self.one.in_proj_bias

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x, x, x, need_weights=False)[0] + self.two(x, x, x, need_weights=False)[0]


def test_tied_projections() -> None:
    model, x = Tied().eval(), torch.randn(2, 4, 12)
    groups = groups_of(model, x)
    result = cut(model, groups, first_units(groups))
    assert result.proof.form == "class", result.proof.notes
    assert result.model.one.num_heads == result.model.two.num_heads == 2
    assert result.model.one.in_proj_weight is result.model.two.in_proj_weight
