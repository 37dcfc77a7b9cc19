"""Layers of the random networks that mix in more than one way: attention, tokens, rows of channels, experts.

All take and give [B, channels, positions...].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apart(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def interleaved(q: Tensor, k: Tensor, v: Tensor, width: int, times: int) -> Tensor:
    q, k, v = (apart(x, width) for x in (q, k, v))
    return together(F.scaled_dot_product_attention(q, *(x.repeat_interleave(times, 1) for x in (k, v))))


def flagged(q: Tensor, k: Tensor, v: Tensor, width: int, times: int) -> Tensor:
    return together(F.scaled_dot_product_attention(*(apart(x, width) for x in (q, k, v)), enable_gqa=times > 1))


def expanded(q: Tensor, k: Tensor, v: Tensor, width: int, times: int) -> Tensor:
    q, k, v = (apart(x, width) for x in (q, k, v))
    k, v = (x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (k, v))
    return together((q @ k.mT * width**-0.5).softmax(-1) @ v)


def by_equation(q: Tensor, k: Tensor, v: Tensor, width: int, times: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (-1, width)) for x in (q, k, v))
    q = q.unflatten(2, (-1, times))
    scores = torch.einsum("btgrd,bsgd->bgrts", q, k).softmax(-1)
    return torch.einsum("bgrts,bsgd->btgrd", scores, v).flatten(2)


def in_batch(q: Tensor, k: Tensor, v: Tensor, width: int, times: int) -> Tensor:
    batch = q.shape[0]
    q, k, v = (apart(x, width) for x in (q, k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)))
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return together(y.unflatten(0, (batch, -1)))


def linear(q: Tensor, k: Tensor, v: Tensor, width: int, times: int) -> Tensor:
    q, k, v = torch.sigmoid(apart(q, width)), torch.sigmoid(apart(k, width)), apart(v, width)
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    return together(q @ (k.mT @ v) / (q @ k.sum(2).unsqueeze(-1)))


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor, int, int], Tensor]] = {
    "interleaved": interleaved, "flagged": flagged, "expanded": expanded, "equation": by_equation,
    "batch": in_batch, "linear": linear,
}  # fmt: skip


class Attend(nn.Module):
    """Attention over positions; ``times`` query heads share a key head."""

    def __init__(self, channels: int, keys: int, times: int, width: int, spelling: str, packed: bool) -> None:
        super().__init__()
        sizes = keys * times * width, keys * width, keys * width
        self.sizes, self.width, self.times, self.spelling, self.packed = sizes, width, times, spelling, packed
        if packed:
            self.qkv = nn.Linear(channels, sum(sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(channels, size) for size in sizes)
        self.out = nn.Linear(sizes[0], channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(y).split(self.sizes, -1) if self.packed else (self.q(y), self.k(y), self.v(y))
        y = self.out(SPELLINGS[self.spelling](q, k, v, self.width, self.times))
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


class Tokens(nn.Module):
    """An MLP over the positions, the same for every channel; then the input again."""

    def __init__(self, positions: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(positions, hidden), nn.Linear(hidden, positions)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x.flatten(2)))).unflatten(2, x.shape[2:])


class Rows(nn.Module):
    """The channels as rows of columns: one factor per row or per column, shares within each row, one layer for all
    rows, or their sum."""

    def __init__(self, channels: int, rows: int, kind: str, width: int) -> None:
        super().__init__()
        self.rows, self.kind = rows, kind
        if kind in ("rows", "columns"):
            self.factor = nn.Parameter(torch.empty(*((rows, 1) if kind == "rows" else (1, channels // rows))))
        elif kind == "shared":
            self.layer = nn.Linear(channels // rows, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1).unflatten(-1, (self.rows, -1))
        if self.kind == "sum":
            return x.sum(-2).movedim(-1, 1)
        if self.kind == "shares":
            return x.softmax(-1).flatten(-2).movedim(-1, 1)
        y = self.layer(x) if self.kind == "shared" else x * self.factor
        return y.flatten(-2).movedim(-1, 1)


class Experts(nn.Module):
    """Every expert answers, from stacked weights; sigmoids of a router weigh them."""

    def __init__(self, channels: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(channels, experts)
        self.up = nn.Parameter(torch.empty(experts, channels, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x.movedim(1, -1)
        hidden = F.relu(torch.einsum("...c,ech->...eh", y, self.up))
        answers = torch.einsum("...eh,ehc->...ec", hidden, self.down)
        return (answers * self.router(y).sigmoid().unsqueeze(-1)).sum(-2).movedim(-1, 1)
