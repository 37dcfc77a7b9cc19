"""Mixtures of experts: all asked and weighed, or the best two, in stacked weights or modules of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import network


def best_two(scores: Tensor) -> Tensor:
    """The softmax of the two largest scores of each row; zeros elsewhere."""
    values, chosen = scores.topk(2, -1)
    return torch.zeros_like(scores).scatter(-1, chosen, values.softmax(-1))


@network("einsum_experts", (5, 6))
class EinsumExperts(nn.Module):
    """All experts answer, by equations over stacked weights; a softmax over experts weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up, self.bias = nn.Parameter(torch.empty(3, 6, 10)), nn.Parameter(torch.empty(3, 10))
        self.down = nn.Parameter(torch.empty(3, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btc,ech->bteh", x, self.up) + self.bias)
        answers = torch.einsum("bteh,ehc->btec", hidden, self.down)
        return x + torch.einsum("bte,btec->btc", self.router(x).softmax(-1), answers)


@network("gated_experts", (5, 6))
class GatedExperts(nn.Module):
    """Mixtral in its dense form: the best two by a scatter; SwiGLU experts packed in one stack, by bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4, bias=False)
        self.packed, self.down = nn.Parameter(torch.empty(4, 6, 16)), nn.Parameter(torch.empty(4, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        gate, up = torch.bmm(rows.expand(4, -1, -1), self.packed).chunk(2, -1)
        answers = torch.bmm(F.silu(gate) * up, self.down)
        return x + (answers * best_two(self.router(rows)).t()[..., None]).sum(0).view_as(x)


@network("one_hot_experts", (5, 6))
class OneHotExperts(nn.Module):
    """Top-k routing by one-hot masks, as Mesh and Switch transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.empty(4, 6, 9)), nn.Parameter(torch.empty(4, 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        combine = (F.one_hot(chosen, 4).to(x.dtype) * weights[..., None]).sum(-2)
        sent = torch.einsum("bte,btc->ebtc", (combine > 0).to(x.dtype), x)
        answers = torch.einsum("ebth,ehc->ebtc", F.relu(torch.einsum("ebtc,ech->ebth", sent, self.up)), self.down)
        return x + torch.einsum("bte,ebtc->btc", combine, answers)


@network("module_experts", (5, 6))
class ModuleExperts(nn.Module):
    """Experts as modules in a list, next to one that everybody asks; each has widths of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, n), nn.GELU(), nn.Linear(n, 6)) for n in (7, 8, 9))

    def forward(self, x: Tensor) -> Tensor:
        weights, out = best_two(self.router(x)), x + self.shared(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * weights[..., number, None]
        return out


@network("dynamic_convolution", (3, 6, 6))
class DynamicConvolution(nn.Module):
    """CondConv: kernels mixed from a bank by the image itself; the batch becomes groups of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Conv2d(3, 6, 3), nn.Linear(6, 3)
        self.bank, self.head = nn.Parameter(torch.empty(3, 8, 6, 3, 3)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        mix = self.router(x.mean((2, 3))).sigmoid()
        weight = (mix @ self.bank.flatten(1)).view(-1, c, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, groups=b)
        return self.head(F.relu(x.view(b, -1, h - 2, w - 2)))
