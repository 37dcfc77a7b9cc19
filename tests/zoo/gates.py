"""Gates and attention inside convolutional networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import conv_bn_act, network


@network("se_block", (3, 8, 8))
class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation with linear layers and view(b, c, 1, 1), inside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn_act(3, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Sequential(nn.Linear(8, 3), nn.ReLU(inplace=True), nn.Linear(3, 8), nn.Sigmoid())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv(x)
        b, c, _, _ = out.size()
        gate = self.fc(F.adaptive_avg_pool2d(out, 1).view(b, c)).view(b, c, 1, 1)
        out = out * gate.expand_as(out)
        return self.head(F.relu(out + x).mean((2, 3)))


@network("cbam", (3, 8, 8))
class ConvBlockAttention(nn.Module):
    """CBAM: one MLP on average and max, then a spatial gate from the mean and max over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn_act(3, 10)
        self.mlp = nn.Sequential(nn.Conv2d(10, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 10, 1, bias=False))
        self.spatial = nn.Conv2d(2, 1, 3, padding=1, bias=False)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        average = torch.mean(x, dim=1, keepdim=True)
        largest, _ = torch.max(x, dim=1, keepdim=True)
        x = x * torch.sigmoid(self.spatial(torch.cat([average, largest], dim=1)))
        return self.head(x)


@network("spatial_gate", (3, 8, 8))
class SpatialGate(nn.Module):
    """Attention U-Net gate: a [B, 1, H, W] map multiplies every channel and says nothing about them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn_act(3, 8)
        self.gate = nn.Sequential(conv_bn_act(3, 6), nn.Conv2d(6, 1, 1), nn.Sigmoid())
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x) * self.gate(x))


@network("channel_conv_gate", (3, 8, 8))
class EfficientChannelAttention(nn.Module):
    """ECA: a Conv1d slides over the channel axis, so neighbours mix and channels cannot leave exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn_act(3, 8), conv_bn_act(8, 9)
        self.eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.head = nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.eca(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return self.head(x * y.sigmoid().expand_as(x))


@network("selective_kernel", (3, 8, 8))
class SelectiveKernel(nn.Module):
    """SKNet: two branches stacked on a new axis, softmax over that axis, weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_act(3, 8, kernel=3), conv_bn_act(3, 8, kernel=5)])
        self.squeeze = nn.Linear(8, 5)
        self.select = nn.ModuleList(nn.Linear(5, 8) for _ in range(2))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.stack([branch(x) for branch in self.branches], dim=1)
        squeezed = F.relu(self.squeeze(features.sum(dim=1).mean(-1).mean(-1)))
        weights = torch.cat([fc(squeezed).unsqueeze(1) for fc in self.select], dim=1).softmax(dim=1)
        return self.head((features * weights.unsqueeze(-1).unsqueeze(-1)).sum(dim=1))


@network("split_attention", (3, 8, 8))
class SplitAttention(nn.Module):
    """ResNeSt: radix 2 as a reshape of one wide grouped convolution, softmax over the radix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn_act(4, 12, groups=2)
        self.stem = conv_bn_act(3, 4)
        self.fc1, self.fc2 = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 12, 1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        b, _, h, w = x.shape
        x = x.reshape(b, 2, 6, h, w)
        gap = x.sum(dim=1).mean((2, 3), keepdim=True)
        gate = self.fc2(F.relu(self.fc1(gap))).view(b, 2, 6).softmax(dim=1)
        return self.head((x * gate.reshape(b, 2, 6, 1, 1)).sum(dim=1))


@network("glu", (12,))
class GatedLinear(nn.Module):
    """F.glu on linear layers and nn.GLU on maps: channel i and channel i + n/2 leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(10, 16)
        self.conv = nn.Conv1d(2, 10, 3, padding=1)
        self.gate = nn.GLU(dim=1)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.fc1(x), dim=-1)
        x = F.glu(self.fc2(x)).reshape(-1, 2, 4)
        return self.head(self.gate(self.conv(x)).flatten(1))


@network("swiglu", (5, 8))
class SwiGLU(nn.Module):
    """LLaMA's feed-forward: silu of one half of a packed projection times the other, by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.packed = nn.Linear(8, 28, bias=False)
        self.down = nn.Linear(14, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.packed(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


@network("wavenet_gate", (3, 20))
class WaveNetGate(nn.Module):
    """WaveNet: tanh times sigmoid of two halves by slices, causal left padding, residual and skip sums."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(3, 6, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(6, 16, 2, dilation=2**i) for i in range(2))
        self.mix = nn.ModuleList(nn.Conv1d(8, 6 + 5, 1) for _ in range(2))
        self.end = nn.Conv1d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        skip: Tensor | float = 0.0
        for conv, mix in zip(self.dilated, self.mix, strict=True):
            y = conv(F.pad(x, (conv.dilation[0], 0)))
            y = mix(torch.tanh(y[:, :8]) * torch.sigmoid(y[:, 8:]))
            x = x + y[:, :6]
            skip = skip + y[:, 6:]
        return self.end(F.relu(skip))


@network("nonlocal_block", (3, 6, 6))
class NonLocal(nn.Module):
    """Non-local block: attention over pixels by two matmuls of activations, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_act(3, 8)
        self.theta, self.phi, self.g = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 5, 1)
        self.out = nn.Conv2d(5, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        theta = self.theta(x).view(b, 6, -1).permute(0, 2, 1)
        attention = F.softmax(torch.matmul(theta, self.phi(x).view(b, 6, -1)), dim=-1)
        y = torch.matmul(attention, self.g(x).view(b, 5, -1).permute(0, 2, 1))
        y = y.permute(0, 2, 1).contiguous().view(b, 5, h, w)
        return self.head(self.out(y) + x)


@network("attention_pooling", (7, 6))
class AttentionPooling(nn.Module):
    """Softmax over time of a scalar score weighs the hidden vectors (multiple-instance pooling)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 12)
        self.score = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.hidden(x))
        weights = torch.softmax(self.score(h), dim=1)
        return self.head((weights * h).sum(1))


@network("global_context", (3, 6, 6))
class GlobalContext(nn.Module):
    """GCNet: softmax over pixels, matmul with the flattened map, a bottleneck with LayerNorm([C, 1, 1])."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mask = conv_bn_act(3, 8), nn.Conv2d(8, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(8, 5, 1), nn.LayerNorm([5, 1, 1]), nn.ReLU(True), nn.Conv2d(5, 8, 1)
        )
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.size()
        mask = self.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), mask).view(b, c, 1, 1)
        return self.head(x + self.transform(context))
