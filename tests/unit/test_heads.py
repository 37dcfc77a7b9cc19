"""What exactly leaves with a head, or with a width, in each spelling of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.core.labels import FIXED
from prunekern.core.policy import Policy
from prunekern.graph.groups import Groups
from prunekern.graph.labels import frozen_report
from tests.pruning import groups_of
from tests.zoo import ZOO

WIDTHS = Policy(attention="widths")


def found_in(name: str, policy: Policy | None = None) -> Groups:
    model, args, _ = ZOO[name]()
    return groups_of(model, args, policy or Policy())


def axis(found: Groups, name: str, number: int) -> list[Any]:
    return found.labels.axes[name, number].tolist()


def blocks(count: int, size: int, ids: list[int]) -> list[int]:
    """``count`` groups, each ``size`` times in a row."""
    assert len(dict.fromkeys(ids)) == count
    return [group for group in dict.fromkeys(ids) for _ in range(size)]


@pytest.mark.parametrize("name", ["separate_qkv", "einsum_heads", "bmm_heads", "alibi", "head_bias", "query_key_norm",
                                  "attention_sinks", "gated_heads", "linear_attention", "cross_covariance"])
def test_a_head_owns_its_rows_and_columns(name: str) -> None:
    found = found_in(name)
    q = axis(found, "q.weight", 0)
    assert q == blocks(4, 3, q)
    assert FIXED not in q
    assert axis(found, "k.weight", 0) == axis(found, "q.bias", 0) == q
    v = axis(found, "v.weight", 0)
    assert v == blocks(4, len(v) // 4, v)
    assert list(dict.fromkeys(v)) == list(dict.fromkeys(q))        # the same heads, in the same order
    assert axis(found, "out.weight", 1) == v
    assert axis(found, "out.weight", 0) == axis(found, "q.weight", 1) == [FIXED] * 10


@pytest.mark.parametrize(("name", "key", "number"), [
    ("alibi", "slopes", 0), ("head_bias", "bias", 0), ("attention_sinks", "sinks", 0), ("gated_heads", "gain", 0),
    ("gated_heads", "gate.weight", 0), ("gated_heads", "gate.bias", 0), ("cross_covariance", "temperature", 0)])
def test_what_belongs_to_a_head_goes_with_it(name: str, key: str, number: int) -> None:
    found = found_in(name)
    assert axis(found, key, number) == list(dict.fromkeys(axis(found, "q.weight", 0)))


def test_packed_projections() -> None:
    """Rows 0-11 are queries, 12-23 keys, 24-35 values: a head is four of each, and four columns of the projection."""
    found = found_in("packed_qkv")
    rows = axis(found, "qkv.weight", 0)
    assert rows[:12] == rows[12:24] == rows[24:] == axis(found, "proj.weight", 1) == blocks(3, 4, rows[:12])


def test_windows_know_their_heads_in_the_table() -> None:
    found = found_in("window_attention")
    heads = axis(found, "table", 1)
    assert len(set(heads)) == 2
    assert axis(found, "qkv.weight", 0) == [head for _ in range(3) for head in heads for _ in range(3)]
    assert axis(found, "table", 0) == [FIXED] * 49
    assert axis(found_in("cosine_windows"), "bias.2.weight", 0) == axis(found_in("cosine_windows"), "scale", 0)


@pytest.mark.parametrize(("name", "keys", "times"), [
    ("gqa_expand", 2, 2), ("gqa_interleave", 2, 3), ("gqa_flag", 2, 2), ("gqa_views", 3, 2)])
def test_query_heads_leave_with_their_key_head(name: str, keys: int, times: int) -> None:
    found = found_in(name)
    k = axis(found, "k.weight", 0)
    assert k == axis(found, "v.weight", 0) == blocks(keys, 3, k)
    heads = list(dict.fromkeys(k))
    assert axis(found, "q.weight", 0) == [head for head in heads for _ in range(3 * times)]
    assert axis(found, "out.weight", 1) == axis(found, "q.weight", 0)


def test_widths_of_queries_with_keys_and_of_values_with_what_reads_them() -> None:
    found = found_in("separate_qkv", WIDTHS)
    q, v = axis(found, "q.weight", 0), axis(found, "v.weight", 0)
    assert q == q[:3] * 4 == axis(found, "k.weight", 0)            # the same positions in every head
    assert v == v[:5] * 4 == axis(found, "out.weight", 1)
    assert len(set(q)) == 3
    assert len(set(v)) == 5
    assert not set(q) & set(v)


def test_widths_of_grouped_queries_and_of_a_single_key_head() -> None:
    for name, policy in (("gqa_expand", WIDTHS), ("gqa_flag", WIDTHS), ("multi_query", Policy())):
        found = found_in(name, policy)
        q, k = axis(found, "q.weight", 0), axis(found, "k.weight", 0)
        assert q == q[:3] * (len(q) // 3)
        assert k == q[:3] * (len(k) // 3)
        assert axis(found, "v.weight", 0)[:3] == axis(found, "out.weight", 1)[:3] != q[:3]


def test_rotary_widths_leave_in_pairs() -> None:
    """Halves turn with each other, or neighbours do; the angles go along; values have widths of their own."""
    q = axis(found_in("rope_gqa", WIDTHS), "q.weight", 0)
    assert q[:2] == q[2:4]
    found = found_in("rotary_interleaved", WIDTHS)
    q = axis(found, "q.weight", 0)
    assert q[0:6:2] == q[1:6:2] == axis(found, "cos", 1) == axis(found, "sin", 1)
    assert len(set(q)) == 3
    found = found_in("rotary_partial", WIDTHS)
    q = axis(found, "q.weight", 0)
    assert q[:2] == q[2:4]
    assert len(set(q[:6])) == 4                                    # two pairs, and two that do not turn


def test_norms_within_a_head_hold_its_widths() -> None:
    found = found_in("query_key_norm", WIDTHS)
    assert {family.name for family in found} == {"v"}
    assert axis(found, "q_norm.weight", 0) == [FIXED] * 3


def test_talking_heads_are_heads_before_between_and_after() -> None:
    found = found_in("talking_heads")
    assert axis(found, "before.weight", 1) == list(dict.fromkeys(axis(found, "q.weight", 0)))
    assert axis(found, "before.weight", 0) == axis(found, "after.weight", 1)
    assert axis(found, "after.weight", 0) == list(dict.fromkeys(axis(found, "v.weight", 0)))


def test_one_bias_for_two_layers_ties_their_heads() -> None:
    found = found_in("t5_layers")
    bias = axis(found, "relative.weight", 1)
    for layer in "01":
        assert axis(found, f"layers.{layer}.q.weight", 0) == [head for head in bias for _ in range(4)]


class Masked(nn.Module):
    """Attention whose mask comes with the call, one per head; ``shared``: one for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(10, 36), nn.Linear(12, 10)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (4, 3)])
def test_a_mask_per_head_leaves_widths(heads: int, size: int) -> None:
    """The caller goes on giving a mask for every head: all stay, so that 'auto' falls back to widths."""
    given = torch.randn(2, 5, 10), torch.randn(2, heads, 5, 5)
    found = groups_of(Masked().eval(), given)
    assert [family.channels for family in found] == [size]
    asked = groups_of(Masked().eval(), given, Policy(attention="heads"))
    assert len(asked) == (heads == 1)


def test_a_residual_around_the_heads_holds_them() -> None:
    """What is added to the heads' output is the input, of which nothing can leave: neither heads nor widths of v."""
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v = nn.Linear(12, 24), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.qk(x).unflatten(-1, (2, 4, 3)).permute(2, 0, 3, 1, 4).unbind(0)
            v = self.v(x).unflatten(-1, (4, 3)).transpose(1, 2)
            return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    found = groups_of(Net().eval(), torch.randn(2, 5, 12))
    rows = axis(found, "qk.weight", 0)
    assert rows == rows[:3] * 8                                    # the widths of queries and keys are still free
    assert len(set(rows)) == 3
    assert axis(found, "v.weight", 0) == [FIXED] * 12
    assert frozen_report(found.labels) == []


def test_experts_share_widths() -> None:
    found = found_in("gated_experts")
    packed = axis(found, "packed", 2)
    assert packed[:8] == packed[8:] == axis(found, "down", 1)      # a gate with its value
    assert axis(found, "packed", 0) == [FIXED] * 4
    whole = found_in("einsum_experts", Policy(norms="remaining"))
    experts = axis(whole, "router.weight", 0)
    assert FIXED not in experts
    assert axis(whole, "up", 0) == axis(whole, "down", 0) == axis(whole, "bias", 0) == experts
