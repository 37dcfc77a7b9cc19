"""Normalisations, activations, reductions over channels, and ops that few pruners know."""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import conv_bn_act, network


@network("group_norm", (3, 8, 8))
def group_norm() -> nn.Module:
    """GroupNorm of 4 groups of 3 and of one group (a layer norm over channels and pixels)."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.ReLU(),
        nn.Conv2d(12, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(),
        nn.Conv2d(8, 10, 1), nn.ReLU(), nn.Conv2d(10, 3, 1),
    )  # fmt: skip


@network("instance_norm", (3, 9, 9))
def instance_norm() -> nn.Module:
    """Style transfer: InstanceNorm without parameters, with them, and with running statistics."""
    return nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 10, 3, stride=2), nn.InstanceNorm2d(10, affine=True), nn.ReLU(),
        nn.Conv2d(10, 6, 1), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.Conv2d(6, 3, 1),
    )  # fmt: skip


@network("ibn", (3, 8, 8))
class InstanceBatchNorm(nn.Module):
    """IBN-Net: the first 5 of 12 channels go through instance norm, the other 7 through batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.instance, self.batch = nn.InstanceNorm2d(5, affine=True), nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.conv(x), [5, 7], 1)
        x = torch.cat((self.instance(parts[0].contiguous()), self.batch(parts[1].contiguous())), 1)
        return self.head(F.relu(x))


@network("bn1d_mlp", (14,))
def bn1d_mlp() -> nn.Module:
    """A tabular MLP: BatchNorm1d after and before linear layers, without gains once, with dropout."""
    return nn.Sequential(
        nn.BatchNorm1d(14), nn.Linear(14, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(20, 13), nn.BatchNorm1d(13, affine=False), nn.ELU(), nn.AlphaDropout(0.1), nn.Linear(13, 4),
    )  # fmt: skip


@network("local_response_norm", (3, 10, 10))
def local_response_norm() -> nn.Module:
    """AlexNet's local response norm: each channel is divided by its neighbours."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(3, k=2.0), nn.MaxPool2d(2),
        nn.Conv2d(8, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4),
    )  # fmt: skip


@network("layer_norm_mlp", (12,))
def layer_norm_mlp() -> nn.Module:
    """LayerNorm over the hidden units: removing one changes the statistics of all."""
    return nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3)
    )


@network("activations", (3, 8, 8))
class Activations(nn.Module):
    """Twelve activations in a row, in place and not, some that do not map zero to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleList(
            [
                nn.LeakyReLU(0.1, inplace=True), nn.ELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(inplace=True),
                nn.Hardswish(), nn.Mish(), nn.Softplus(), nn.SELU(inplace=True), nn.CELU(0.5), nn.Softsign(),
                nn.Hardtanh(-0.7, 0.9),
            ]
        )  # fmt: skip
        widths = [3, 6, 5, 7, 6, 5, 8, 6, 7, 5, 6, 8, 4]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for conv, act in zip(self.convs, self.acts, strict=True):
            x = act(conv(x))
        return x


@network("functional_activations", (9,))
class FunctionalActivations(nn.Module):
    """Activations by hand: clamp, exp, sqrt, abs, pow, minimum, where, x * sigmoid(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in ((9, 12), (12, 11), (11, 10), (10, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fcs[0](x)
        x = (x * torch.sigmoid(x)).clamp(min=-1, max=3)
        x = self.fcs[1](x)
        x = torch.sqrt(x.abs() + 1e-3) - torch.exp(-x.pow(2)) / 2
        x = self.fcs[2](x)
        x = torch.where(x > 0, torch.minimum(x, 1 + x / 3), 0.2 * x)
        return F.log_softmax(self.fcs[3](x), dim=-1)


@network("prelu", (3, 8, 8))
def prelu() -> nn.Module:
    """PReLU with one slope per channel, and once with one slope for all."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 10, 3), nn.PReLU(),
        nn.Conv2d(10, 7, 1), nn.PReLU(7), nn.Flatten(), nn.Linear(7 * 16, 4), nn.PReLU(4),
    )  # fmt: skip


@network("maxout", (3, 8, 8))
class Maxout(nn.Module):
    """LightCNN's max-feature-map: the maximum of two halves of the channels; both leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 10, 3)
        self.fc = nn.Linear(5 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.conv1(x), 6, dim=1)
        c, d = torch.chunk(self.conv2(torch.max(a, b)), 2, dim=1)
        return self.fc(torch.flatten(torch.maximum(c, d), 1))


@network("channel_reductions", (3, 8, 8))
class ChannelReductions(nn.Module):
    """Mean and sum over channels feed on: a sum forgives removed zeros, a mean divides by the width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, width, 3, padding=1) for width in (8, 9, 7))
        self.head = nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        total = F.relu(self.conv1(x)).sum(dim=1, keepdim=True)
        mean = F.relu(self.conv2(x)).mean(1, True)
        return self.head(torch.cat([total / 8, mean, F.relu(self.conv3(x))], dim=1))


@network("unit_embedding", (3, 8, 8))
class UnitEmbedding(nn.Module):
    """Face recognition: the last features are divided by their own length before a cosine classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = conv_bn_act(3, 8), nn.Linear(8, 10)
        self.centres = nn.Parameter(torch.empty(4, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.fc(self.conv(x).mean((2, 3))), dim=1)
        return 16.0 * F.linear(x, F.normalize(self.centres))


@network("weight_standardised", (3, 8, 8))
class WeightStandardised(nn.Module):
    """Big Transfer: weights are standardised over their inputs at every call, with GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(8, 8)
        self.conv2, self.conv3 = nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 4, 1)

    @staticmethod
    def _standardised(conv: nn.Conv2d, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(conv.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (conv.weight - mean) / torch.sqrt(var + 1e-6)
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self._standardised(self.conv1, x)))
        return self.conv3(F.relu(self._standardised(self.conv2, x)))


@network("parametrised", (3, 8, 8))
def parametrised() -> nn.Module:
    """Weight norm in its new form (torch.nn.utils.parametrizations) on a convolution and a linear layer."""
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(),
        weight_norm(nn.Linear(8 * 36, 10)), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


@network("spectral", (3, 8, 8))
def spectral() -> nn.Module:
    """Spectral norm in its new form on a convolution: all of its weights are divided by one number."""
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 9, 1), nn.ReLU(),
        nn.utils.parametrizations.orthogonal(nn.Conv2d(9, 6, 1)), nn.Flatten(), nn.Linear(6 * 36, 3),
    )  # fmt: skip


@network("hooked_norms", (3, 8, 8))
def hooked_norms() -> nn.Module:
    """Weight norm and spectral norm in their old forms: hooks that set the weight before each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.utils.spectral_norm(nn.Conv2d(8, 9, 1)),
            nn.ReLU(), nn.Flatten(), nn.utils.weight_norm(nn.Linear(9 * 36, 10)), nn.ReLU(), nn.Linear(10, 3),
        )  # fmt: skip


class ScaledStandardised(nn.Conv2d):
    """NFNet's convolution: standardised weights with a gain per channel, by a batch norm of the weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.gain * self.weight[0].numel() ** -0.5).view(-1)
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, weight=scale, training=True,
                              momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@network("normalizer_free", (3, 8, 8))
class NormalizerFree(nn.Module):
    """NFNet block: scaled standardised convolutions, no norms, squeeze-and-excitation, a skip gain, alpha and beta."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = ScaledStandardised(3, 8, 3), ScaledStandardised(8, 6, 1)
        self.conv2, self.conv3 = ScaledStandardised(6, 6, 3, groups=2), ScaledStandardised(6, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.gain, self.head = nn.Parameter(torch.tensor(0.5)), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv2(F.gelu(self.conv1(F.gelu(x) * 0.9)) * 1.7)
        y = self.conv3(F.gelu(y) * 1.7)
        y = 2.0 * self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid() * y
        return self.head(y.mul_(self.gain) * 0.2 + x)


@network("fourier_middle", (3, 8, 8))
class FourierMiddle(nn.Module):
    """A rare op in the middle: a spectral filter between two convolutions, by rfft2 and irfft2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv_bn_act(3, 8), conv_bn_act(8, 6), nn.Conv2d(6, 4, 1)
        self.filter = nn.Parameter(torch.empty(8, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.conv1(x), norm="ortho")
        x = torch.fft.irfft2(spectrum * self.filter, s=(8, 8), norm="ortho")
        return self.conv3(self.conv2(x))


@network("cumsum_middle", (6, 5))
class CumsumMiddle(nn.Module):
    """Running totals: over time, where channels stay apart, and over channels, where they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 8), nn.Linear(8, 7)
        self.fc3, self.fc4 = nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(F.relu(self.fc1(x)), dim=1)
        x = torch.cumsum(F.relu(self.fc2(x)), dim=-1)
        return self.fc4(F.relu(self.fc3(x)))


@network("sorted_channels", (12,))
class SortedChannels(nn.Module):
    """Top-k over the features: which unit lands where depends on the data, so they must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 10), nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        values, _ = torch.topk(self.fc1(x), 4, dim=1)
        return self.fc3(F.relu(self.fc2(values)))


@network("recurrent", (7, 5))
class Recurrent(nn.Module):
    """A tagger: convolution over time, a two-layer bidirectional LSTM, a GRU, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.gru, self.fc = nn.GRU(12, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x, _ = self.lstm(x)
        x, _ = self.gru(x)
        return self.fc(x[:, -1])
