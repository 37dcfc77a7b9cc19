"""Blocks of language models as their libraries write them; mixing without attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import conv_bn_act, network, tokens


@network("llama_block", inputs=lambda batch: ((tokens(batch, 5, 11),), {}))
class LlamaBlock(nn.Module):
    """Sizes as attributes, an RMS norm by hand, rotary halves, keys expanded for groups, a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 6
        self.num_key_value_groups = 2
        self.embed = nn.Embedding(11, 12)
        self.gain1, self.gain2 = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))
        self.q_proj, self.o_proj = nn.Linear(12, 24, bias=False), nn.Linear(24, 12, bias=False)
        self.k_proj, self.v_proj = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(12, 14, bias=False), nn.Linear(12, 14, bias=False)
        self.down_proj, self.lm_head = nn.Linear(14, 12, bias=False), nn.Linear(12, 11, bias=False)

    @staticmethod
    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(5, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.5, 0.125], dtype=x.dtype).repeat(2)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-b, a), -1) * angles.sin()

    def repeated(self, x: Tensor) -> Tensor:
        b, heads, t, width = x.shape
        return x[:, :, None].expand(b, heads, self.num_key_value_groups, t, width).reshape(b, -1, t, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norm(x, self.gain1)
        b, t, _ = y.shape
        q = self.turned(self.q_proj(y).view(b, t, self.num_heads, self.head_dim).transpose(1, 2))
        k, v = (f(y).view(b, t, self.num_key_value_heads, self.head_dim).transpose(1, 2)
                for f in (self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, self.repeated(self.turned(k)), self.repeated(v), is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, t, -1))
        y = self.norm(x, self.gain2)
        return self.lm_head(x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y)))


class Transposed(nn.Module):
    """GPT-2's Conv1D: a linear layer whose weight is [inputs, outputs], by addmm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


@network("gpt_block", inputs=lambda batch: ((tokens(batch, 5, 11),), {}))
class GPTBlock(nn.Module):
    """GPT-2: transposed weights, split by a size, causal mask by where, the output embedding is the input's."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.split_size, self.num_heads, self.head_dim = 12, 3, 4
        self.wte, self.wpe = nn.Embedding(11, 12), nn.Embedding(5, 12)
        self.ln_1, self.ln_2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.c_attn, self.c_proj = Transposed(12, 36), Transposed(12, 12)
        self.c_fc, self.c_out = Transposed(12, 20), Transposed(20, 12)
        self.register_buffer("mask", torch.ones(5, 5).tril().bool().view(1, 1, 5, 5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(5))
        qkv = self.c_attn(self.ln_1(x)).split(self.split_size, dim=2)
        q, k, v = (y.view(*y.shape[:-1], -1, self.head_dim).transpose(1, 2) for y in qkv)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim)
        lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
        scores = torch.where(self.mask[:, :, :5, :5], scores, lowest).softmax(-1)
        y = torch.matmul(scores, v).transpose(1, 2).contiguous()
        x = x + self.c_proj(y.view(*y.shape[:-2], -1))
        return F.linear(x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")), self.wte.weight)


@network("bert_layer", inputs=lambda batch: ((tokens(batch, 5, 11), torch.ones(batch, 5)), {}))
class BertLayer(nn.Module):
    """BERT: transpose_for_scores with stored sizes, an additive mask, post-norm, a pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 3, 4, 12
        self.words, self.types, self.norm = nn.Embedding(11, 12), nn.Embedding(2, 12), nn.LayerNorm(12)
        self.query, self.key, self.value, self.dense = (nn.Linear(12, 12) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.intermediate, self.output, self.pooler = nn.Linear(12, 18), nn.Linear(18, 12), nn.Linear(12, 12)
        self.classifier = nn.Linear(12, 3)

    def split_heads(self, x: Tensor) -> Tensor:
        shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.types(torch.zeros_like(ids)))
        q, k, v = (self.split_heads(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        scores = (scores + (1.0 - mask[:, None, None, :]) * -10000.0).softmax(-1)
        y = torch.matmul(scores, v).permute(0, 2, 1, 3).contiguous()
        y = y.view(*y.size()[:-2], self.all_head_size)
        x = self.norm1(self.dense(y) + x)
        x = self.norm2(self.output(F.gelu(self.intermediate(x))) + x)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


@network("t5_layers", inputs=lambda batch: ((tokens(batch, 5, 11),), {}))
class T5Layers(nn.Module):
    """T5: a bias per head from an embedding of bucketed distances, shared by two layers; a norm without a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 10), nn.RMSNorm(10)
        self.relative = nn.Embedding(4, 2)
        self.layers = nn.ModuleList(nn.ModuleDict({
            "q": nn.Linear(10, 8, bias=False), "k": nn.Linear(10, 8, bias=False), "v": nn.Linear(10, 8, bias=False),
            "o": nn.Linear(8, 10, bias=False)}) for _ in range(2))

    def bias(self) -> Tensor:
        steps = torch.arange(5)
        distance = (steps[None, :] - steps[:, None]).abs()
        far = 2 + (torch.log(distance.float().clamp(min=1) / 2) / math.log(2)).long()
        buckets = torch.where(distance < 2, distance, far.clamp(max=3))
        return self.relative(buckets).permute(2, 0, 1).unsqueeze(0)

    def forward(self, ids: Tensor) -> Tensor:
        x, bias = self.embed(ids), self.bias()
        for layer in self.layers:
            y = self.norm(x)
            q, k, v = (layer[name](y).view(y.shape[0], -1, 2, 4).transpose(1, 2) for name in "qkv")
            scores = torch.matmul(q, k.transpose(3, 2)) + bias
            y = torch.matmul(F.softmax(scores, dim=-1), v)
            x = x + layer["o"](y.transpose(1, 2).contiguous().view(y.shape[0], -1, 8))
        return x


@network("fnet", (6, 8))
class FNet(nn.Module):
    """FNet: a Fourier transform over tokens and channels mixes; only the feed-forward layers can shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 14), nn.Linear(14, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return self.head(self.norm2(x + self.down(F.gelu(self.up(x)))))


@network("conformer_conv", (8, 6))
class ConformerConvolution(nn.Module):
    """Speech: GLU over a pointwise convolution, depthwise over time, batch norm, SiLU; macaron halves around."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6)
        self.into, self.deep = nn.Conv1d(6, 16, 1), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.batch, self.back, self.head = nn.BatchNorm1d(8), nn.Conv1d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.down(F.silu(self.up(x)))
        y = F.glu(self.into(self.norm(x).transpose(1, 2)), 1)
        x = x + self.back(F.silu(self.batch(self.deep(y)))).transpose(1, 2)
        return self.head(x)


@network("keyword_spotter", (1, 20, 9))
class KeywordSpotter(nn.Module):
    """A speech CNN: spectrogram strides by axis, depthwise separable blocks, pooled over time, then frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 8, (5, 3), (2, 1), (2, 1)), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.head = conv_bn_act(8, 10, kernel=1), nn.Linear(10 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(F.relu(self.deep(F.relu(self.stem(x)))))
        return self.head(F.avg_pool2d(x.mean(2, keepdim=True), (1, 3)).flatten(1))
