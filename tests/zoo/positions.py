"""Attention that knows where: rotary, per-head biases and tables, norms of queries and keys, sinks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.attention import Residual, apart, together
from tests.zoo.registry import network


class Rotary(Residual):
    """Heads of six, turned by angles in buffers."""

    cos: Tensor
    sin: Tensor

    def __init__(self, angles: int) -> None:
        super().__init__(18, 18, 18, 18)
        turns = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.5, 0.1])[:angles])
        self.register_buffer("cos", turns.cos())
        self.register_buffer("sin", turns.sin())

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return together(F.scaled_dot_product_attention(self.turned(apart(q, 6)), self.turned(apart(k, 6)), apart(v, 6)))

    def turned(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@network("rotary_interleaved", (5, 10))
class InterleavedRotary(Rotary):
    """Pairs of neighbours turn: x[..., ::2] with x[..., 1::2], stacked again."""

    def __init__(self) -> None:
        super().__init__(3)

    def turned(self, x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * self.cos - b * self.sin, a * self.sin + b * self.cos), -1).flatten(-2)


@network("rotary_partial", (5, 10))
class PartialRotary(Rotary):
    """GPT-NeoX: the first four of six turn by halves, the others pass."""

    def __init__(self) -> None:
        super().__init__(2)

    def turned(self, x: Tensor) -> Tensor:
        turning, passing = x[..., :4], x[..., 4:]
        cos, sin = torch.cat((self.cos, self.cos), -1), torch.cat((self.sin, self.sin), -1)
        a, b = turning.chunk(2, -1)
        return torch.cat((turning * cos + torch.cat((-b, a), -1) * sin, passing), -1)


@network("rotary_complex", (5, 10))
class ComplexRotary(Rotary):
    """Pairs as complex numbers, multiplied by numbers of length one."""

    def __init__(self) -> None:
        super().__init__(3)

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(self.cos, self.sin)).flatten(-2)


@network("alibi", (5, 10))
class Alibi(Residual):
    """A slope per head, as a buffer, times the distance; causal."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, 5.0))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3) for x in (q, k, v))
        steps = torch.arange(q.shape[2], dtype=q.dtype)
        bias = self.slopes.view(-1, 1, 1) * (steps[None, :] - steps[:, None])
        scores = (q @ k.mT + bias).masked_fill(steps[None, :] > steps[:, None], torch.finfo(q.dtype).min)
        return together(scores.softmax(-1) @ v)


@network("head_bias", (5, 10))
class HeadBias(Residual):
    """LeViT: a learned bias per head and distance, picked by a table of numbers, as a mask of fused attention."""

    numbers: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(4, 5))
        steps = torch.arange(5)
        self.register_buffer("numbers", (steps[:, None] - steps[None, :]).abs())

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3) for x in (q, k, v))
        return together(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, self.numbers]))


@network("query_key_norm", (5, 10))
class QueryKeyNorm(Residual):
    """Each head's queries and keys are RMS-normalised with gains that all heads share: widths stay, heads may go."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(3), nn.RMSNorm(3)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.q_norm(apart(q, 3)), self.k_norm(apart(k, 3))
        return together(F.scaled_dot_product_attention(q, k, apart(v, 3)))


@network("attention_sinks", (5, 10))
class Sinks(Residual):
    """A learned score per head that no token gets: concatenated before the softmax, dropped behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.empty(4))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3) for x in (q, k, v))
        scores = q @ k.mT
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        return together(torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ v)


@network("cosine_windows", (8, 8, 6))
class CosineWindows(nn.Module):
    """Swin v2: 4 x 4 windows, cosines times a clamped scale per head, a bias that an MLP makes from coordinates."""

    coordinates: Tensor
    numbers: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(6, 18, bias=False), nn.Linear(6, 6), nn.Linear(6, 4)
        self.q_bias, self.v_bias = nn.Parameter(torch.empty(6)), nn.Parameter(torch.empty(6))
        self.scale = nn.Parameter(torch.empty(2, 1, 1))
        self.bias = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 2, bias=False))
        row, col = (axis.flatten() for axis in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
        self.register_buffer("numbers", (row[:, None] - row + 3) * 7 + col[:, None] - col + 3)
        self.register_buffer("coordinates", torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4)) / 3)
        far = torch.arange(4)[:, None, None] % 2 * (col[:, None] - col) > 1
        self.register_buffer("mask", torch.where(far, -9.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        packed = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(y, self.qkv.weight, packed)
        q, k, v = qkv.reshape(y.shape[0], 16, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale.clamp(max=4.6).exp()
        table = self.bias(self.coordinates)[self.numbers.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        scores = scores + 16 * table.sigmoid().unsqueeze(0)
        scores = scores.view(-1, 4, scores.shape[1], 16, 16) + self.mask[None, :, None]
        y = self.proj((scores.flatten(0, 1).softmax(-1) @ v).transpose(1, 2).reshape(y.shape[0], 16, -1))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head(x + y)
