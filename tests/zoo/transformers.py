"""Transformers, mixers and ConvNeXt: layer norms, heads, token axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import network, tokens


@network("mha_block", (6, 12))
class AttentionBlock(nn.Module):
    """Pre-norm transformer block with nn.MultiheadAttention (averaged weights asked for) and a GELU FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Dropout(0.1), nn.Linear(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y)
        x = x + y
        return x + self.ffn(self.norm2(x))


@network("encoder_layer", (6, 12))
class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer with the sequence first (its default), post-norm, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=18)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1)).mean(0))


@network("encoder_stack", (6, 12))
class EncoderStack(nn.Module):
    """nn.TransformerEncoder, batch first: in eval mode PyTorch may run a fused fast path instead."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=18, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, -1])


@network("packed_qkv", (5, 12))
class PackedQKV(nn.Module):
    """timm's attention: one qkv linear, reshape to [3, B, heads, N, 4], unbind, fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.norm, self.qkv, self.proj = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return x + self.proj(y)


@network("manual_attention", (5, 10))
class ManualAttention(nn.Module):
    """minGPT: softmax(q k^T / sqrt(d)) with a causal mask buffer; q, k narrower than v."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(10, 8)
        self.out = nn.Linear(8, 10)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)).bool())

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 2, 3).transpose(1, 2)
        k = self.k(x).view(b, n, 2, 3).transpose(1, 2)
        v = self.v(x).view(b, n, 2, 4).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / 3**0.5)
        scores = scores.masked_fill(~self.mask[:n, :n], float("-inf")).softmax(-1)
        return x + self.out((scores @ v).transpose(1, 2).contiguous().view(b, n, 8))


@network("rope_gqa", inputs=lambda batch: ((tokens(batch, 6, 11),), {}))
class RotaryGroupedQuery(nn.Module):
    """LLaMA: rotary positions by halves, two query heads per key head, RMSNorm, tied output embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 12), nn.RMSNorm(12)
        self.q, self.k, self.v = (nn.Linear(12, width, bias=False) for width in (16, 8, 8))
        self.o, self.lm_head = nn.Linear(16, 12, bias=False), nn.Linear(12, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1])).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def _rotate(self, x: Tensor) -> Tensor:
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * self.cos + torch.cat((-x2, x1), dim=-1) * self.sin

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norm(x)
        b, n, _ = y.shape
        q, k, v = (f(y).view(b, n, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = self._rotate(k).repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(self._rotate(q), k, v, is_causal=True)
        return self.lm_head(x + self.o(y.transpose(1, 2).reshape(b, n, 16)))


@network("vit", (3, 8, 8))
class TinyViT(nn.Module):
    """Patches by a strided convolution, a class token expanded and concatenated, positions added."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token, self.position = nn.Parameter(torch.empty(1, 1, 12)), nn.Parameter(torch.empty(1, 5, 12))
        self.norm1, self.attention = nn.LayerNorm(12), nn.MultiheadAttention(12, 4, batch_first=True)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


@network("window_attention", (8, 8, 6))
class WindowAttention(nn.Module):
    """Swin: rolled by half a window, 4x4 windows by a six-axis view, attention with a bias table."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 4)
        self.table = nn.Parameter(torch.empty(49, 2))
        row, col = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        points = torch.stack((row.flatten(), col.flatten()))
        delta = points[:, :, None] - points[:, None, :] + 3
        self.register_buffer("index", delta[0] * 7 + delta[1])

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = torch.roll(x, shifts=(-2, -2), dims=(1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 3).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(16, 16, 2).permute(2, 0, 1).unsqueeze(0)
        y = ((q @ k.transpose(-2, -1)) * 3**-0.5 + bias).softmax(dim=-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head(x + torch.roll(y, shifts=(2, 2), dims=(1, 2)))


@network("mlp_mixer", (3, 8, 8))
class MLPMixer(nn.Module):
    """MLP-Mixer: one MLP over the token axis (transposed), one over channels, layer norms before both."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 10, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(10), nn.LayerNorm(10)
        self.tokens = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4))
        self.channels = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 10))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(dim=1))


@network("gmlp", (6, 8))
class SpatialGatingUnit(nn.Module):
    """gMLP: the second half of the channels is normalised and mixed over tokens, then gates the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.spatial = nn.Linear(8, 20), nn.LayerNorm(10), nn.Conv1d(6, 6, 1)
        self.down = nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(x)).chunk(2, dim=-1)
        return x + self.down(u * self.spatial(self.norm(v)))


@network("convnext", (3, 8, 8))
class ConvNeXt(nn.Module):
    """ConvNeXt block: depthwise 7x7, permuted to NHWC, LayerNorm, two linear layers, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dwconv = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 24), nn.Linear(24, 8)
        self.gamma = nn.Parameter(torch.empty(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.fc2(F.gelu(self.fc1(self.norm(y))))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean([-2, -1]))


@network("layer_scale", (3, 8, 8))
class PoolFormer(nn.Module):
    """PoolFormer: pooling minus identity as the mixer, layer scales [C, 1, 1] as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.norm2 = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(1, 8), nn.GroupNorm(1, 8)
        self.mlp = nn.Sequential(nn.Conv2d(8, 18, 1), nn.GELU(), nn.Conv2d(18, 8, 1))
        self.scale1, self.scale2 = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8, 1, 1))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm1(x)
        x = x + self.scale1.unsqueeze(-1).unsqueeze(-1) * (
            F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y
        )
        return self.head(x + self.scale2 * self.mlp(self.norm2(x)))
