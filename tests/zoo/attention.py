"""Attention as people spell it: heads as axes, in the batch, in an equation; grouped, shared, mixed, linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import conv_bn_act, network


def apart(x: Tensor, width: int) -> Tensor:
    """[B, T, C] -> [B, heads, T, width]."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    """[B, heads, T, width] -> [B, T, C]."""
    return x.transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """x + out(mix(q, k, v)); networks differ in how the three are mixed. Heads are three wide."""

    def __init__(self, query: int = 12, key: int = 12, value: int = 12, out: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(10, width) for width in (query, key, value))
        self.out = nn.Linear(out, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.mix(self.q(x), self.k(x), self.v(x)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


@network("separate_qkv", (5, 10))
class SeparateQKV(Residual):
    """Three projections, scores by matmul, values wider than keys."""

    def __init__(self) -> None:
        super().__init__(12, 12, 20, 20)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = apart(q, 3), apart(k, 3), apart(v, 5)
        return together((q @ k.mT / 3**0.5).softmax(-1) @ v)


@network("gqa_expand", (5, 10))
class ExpandedKeys(Residual):
    """Two query heads share a key head: expanded on an axis of its own, then reshaped into the heads."""

    def __init__(self) -> None:
        super().__init__(12, 6, 6)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3) for x in (q, k, v))
        b, heads, t, width = k.shape
        k, v = (x[:, :, None].expand(b, heads, 2, t, width).reshape(b, heads * 2, t, width) for x in (k, v))
        return together((q @ k.mT).softmax(-1) @ v)


@network("gqa_interleave", (5, 10))
class InterleavedKeys(Residual):
    """Three query heads share a key head by repeat_interleave; fused attention."""

    def __init__(self) -> None:
        super().__init__(18, 6, 6, 18)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3) for x in (q, k, v))
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        return together(F.scaled_dot_product_attention(q, k, v))


@network("gqa_flag", (5, 10))
class GroupedByFlag(Residual):
    """Grouped queries by the operator's own flag."""

    def __init__(self) -> None:
        super().__init__(12, 6, 6)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3) for x in (q, k, v))
        return together(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@network("gqa_views", (5, 10))
class GroupedByView(Residual):
    """The queries get an axis for the group, along which keys and values broadcast."""

    def __init__(self) -> None:
        super().__init__(18, 9, 9, 18)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, _ = q.shape
        q = q.view(b, t, -1, 2, 3).permute(0, 2, 3, 1, 4)
        k, v = (x.view(b, t, -1, 3).transpose(1, 2).unsqueeze(2) for x in (k, v))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return y.permute(0, 3, 1, 2, 4).reshape(b, t, -1)


@network("multi_query", (5, 10))
class MultiQuery(Residual):
    """All query heads share the one key and value head."""

    def __init__(self) -> None:
        super().__init__(12, 3, 3)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3) for x in (q, k, v))
        return together((q @ k.transpose(-2, -1)).softmax(-1) @ v)


@network("talking_heads", (5, 10))
class TalkingHeads(Residual):
    """Linear layers over the heads, before and after the softmax (CaiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3) for x in (q, k, v))
        scores = self.before((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return together(self.after(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v)


@network("class_attention", (5, 10))
class ClassAttention(nn.Module):
    """CaiT's last blocks: the class token alone asks, all tokens answer; scaled per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(12, 10)
        self.scale = nn.Parameter(torch.empty(10))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(b, 1, -1, 3).permute(0, 2, 1, 3)
        k, v = (f(x).reshape(b, n, -1, 3).permute(0, 2, 1, 3) for f in (self.k, self.v))
        token = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 1, -1))
        return torch.cat((x[:, :1] + self.scale * token, x[:, 1:]), 1)


@network("cross_covariance", (5, 10))
class CrossCovariance(Residual):
    """XCiT: keys attend to queries, channel by channel; a temperature per head; the softmax holds the widths."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.empty(4, 1, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (apart(x, 3).mT for x in (q, k, v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        return together((scores.softmax(-1) @ v).mT)


@network("einsum_heads", (5, 10))
class EinsumHeads(Residual):
    """Attention by equations, with the heads last but one and never transposed."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, 3)) for x in (q, k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", scores, v).flatten(2)


@network("einsum_heads_last", (5, 10))
class EinsumHeadsLast(Residual):
    """Attention by equations with the heads behind the positions, and a projection by an equation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Parameter(torch.empty(4, 3, 12))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, 3)) for x in (q, k, v))
        scores = torch.einsum("...qhd,...khd->...qkh", q, k).softmax(-2)
        return torch.einsum("bqhd,hdc->bqc", torch.einsum("bqkh,bkhd->bqhd", scores, v), self.o)


@network("bmm_heads", (5, 10))
class HeadsInBatch(Residual):
    """fairseq: positions first, batch and heads in one axis, bmm, and back."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, _ = q.shape
        q, k, v = (x.transpose(0, 1).contiguous().view(t, -1, 3).transpose(0, 1) for x in (q, k, v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return y.transpose(0, 1).contiguous().view(t, b, -1).transpose(0, 1)


@network("chunked_heads", (5, 10))
class HeadsBeforeBatch(Residual):
    """Heads as chunks of the channels, one batch after the other: the batch is the inner one."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.cat(x.chunk(4, -1), 0) for x in (q, k, v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return torch.cat(y.chunk(4, 0), -1)


@network("linear_attention", (5, 10))
class LinearAttention(Residual):
    """Keys and values are multiplied first; the rows are normalised by a sum of keys."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = F.elu(apart(q, 3)) + 1, F.elu(apart(k, 3)) + 1, apart(v, 3)
        total = q @ k.sum(-2).unsqueeze(-1)
        return together(q @ (k.mT @ v) / (total + 1e-6))


@network("gated_heads", (5, 10))
class GatedHeads(Residual):
    """One gate per head from the input, and a learned gain per head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.gain = nn.Linear(10, 4), nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (apart(f(x), 3) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v) * self.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)
        return x + self.out(together(y * self.gain.view(1, -1, 1, 1)))


@network("axial_attention", (3, 6, 4))
class AxialAttention(nn.Module):
    """Rows, then columns of a map attend to themselves; both by the same packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv = conv_bn_act(3, 8), nn.Conv2d(8, 18, 1)
        self.out, self.head = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for axes in ((0, 1, 4, 3, 2), (0, 1, 3, 4, 2)):
            q, k, v = (part.unflatten(1, (2, -1)).permute(axes) for part in self.qkv(x).chunk(3, 1))
            y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
            back = [axes.index(axis) for axis in range(5)]
            x = x + self.out(y.permute(back).flatten(1, 2))
        return self.head(x)


@network("unfolded_patches", (3, 8, 8))
class MobileViT(nn.Module):
    """MobileViT: 2 x 2 patches by views; the same pixel of all patches attends to itself; a fusing convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.into, self.back = conv_bn_act(3, 6), nn.Conv2d(6, 8, 1, bias=False), nn.Conv2d(8, 6, 1)
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.fuse, self.head = nn.Conv2d(12, 7, 3, padding=1), nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.into(x)
        b, c, h, w = y.shape
        y = y.reshape(b * c * h // 2, 2, w // 2, 2).transpose(1, 2).reshape(b, c, -1, 4).transpose(1, 3)
        y = y.reshape(b * 4, -1, c)
        q, k, v = self.qkv(self.norm(y)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = y + self.proj(together(F.scaled_dot_product_attention(q, k, v)))
        y = y.view(b, 4, -1, c).transpose(1, 3).reshape(b * c * h // 2, w // 2, 2, 2)
        y = self.back(y.transpose(1, 2).reshape(b, c, h, w))
        return self.head(self.fuse(torch.cat((x, y), 1)))


@network("reduced_keys", (16, 10))
class SpatialReduction(nn.Module):
    """PVT: keys and values come from a map that a strided convolution made smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(10, 12), nn.Linear(10, 24), nn.Linear(12, 10)
        self.reduce, self.norm = nn.Conv2d(10, 10, 2, 2), nn.LayerNorm(10)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        small = self.reduce(x.transpose(1, 2).reshape(b, c, 4, 4)).reshape(b, c, -1).transpose(1, 2)
        k, v = self.kv(self.norm(small)).reshape(b, -1, 2, 4, 3).permute(2, 0, 3, 1, 4)
        y = (apart(self.q(x), 3) @ k.mT).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(b, n, 12))


@network("latent_queries", (7, 10))
class LatentQueries(nn.Module):
    """Perceiver: learned queries, expanded over the batch, ask the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(3, 8))
        self.q, self.kv, self.out, self.head = nn.Linear(8, 12), nn.Linear(10, 24), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        q, (k, v) = apart(self.q(latents), 3), (apart(part, 3) for part in self.kv(x).chunk(2, -1))
        return self.head(latents + self.out(together(F.scaled_dot_product_attention(q, k, v))))


@network("cross_attention", (5, 10), (7, 6))
class CrossAttention(nn.Module):
    """Queries from one input, keys and values from another; then a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(10, 12), nn.Linear(6, 24, bias=False), nn.Linear(12, 10)
        self.up, self.down = nn.Linear(10, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv(context).unflatten(-1, (2, -1, 3)).permute(2, 0, 3, 1, 4)
        x = x + self.out(together(F.scaled_dot_product_attention(apart(self.q(x), 3), k, v)))
        return x + self.down(F.gelu(self.up(x)))


@network("mha_variants", (5, 12), (7, 6))
class MultiheadVariants(nn.Module):
    """nn.MultiheadAttention, sequence first: keys of another width, a bias for keys and values, weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(12, 3, kdim=6, vdim=6)
        self.self = nn.MultiheadAttention(12, 4, add_bias_kv=True, bias=False)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x, context = x.transpose(0, 1), context.transpose(0, 1)
        y, weights = self.cross(x, context, context, average_attn_weights=True)
        x = x + y
        return self.head(x + self.self(x, x, x, need_weights=False)[0]).transpose(0, 1), weights


@network("decoder_layer", (5, 12), (7, 12))
class DecoderLayer(nn.Module):
    """nn.TransformerDecoderLayer, batch first, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(12, 3, 18, batch_first=True, norm_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = torch.triu(torch.full((5, 5), float("-inf"), dtype=x.dtype), 1)
        return self.head(self.layer(x, memory, tgt_mask=mask))
