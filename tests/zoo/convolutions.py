"""Convolutions of every kind, pooling, padding and resizing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import conv_bn_act, network


@network("plain_cnn", (3, 12, 12))
class PlainCNN(nn.Module):
    """conv - bn - relu - pool, flattened by a size computed at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_act(3, 8), nn.MaxPool2d(2), conv_bn_act(8, 12), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(12 * 9, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


@network("bnless_cnn", (1, 14, 14))
class BnLessCNN(nn.Module):
    """No normalisation, biases everywhere, one ReLU module used after every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 7, 5, stride=2)
        self.conv2 = nn.Conv2d(7, 13, 3)
        self.fc = nn.Linear(13, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.fc(x.mean([2, 3]))


@network("odd_widths", (3, 9, 9))
def odd_widths() -> nn.Module:
    """Widths 13, 37 and 1 with even kernels: nothing is a multiple of anything."""
    return nn.Sequential(
        nn.Conv2d(3, 13, 2), nn.ReLU(),
        nn.Conv2d(13, 37, (3, 2), stride=(2, 1)), nn.ReLU(),
        nn.Conv2d(37, 1, 1), nn.ReLU(),
        nn.Conv2d(1, 11, 3), nn.Flatten(), nn.Linear(11 * 5, 3),
    )  # fmt: skip


@network("depthwise_separable", (3, 10, 10))
def depthwise_separable() -> nn.Module:
    """MobileNet v1 blocks: depthwise 3x3 then pointwise, batch norm after both."""
    return nn.Sequential(
        conv_bn_act(3, 8, stride=2),
        conv_bn_act(8, 8, groups=8), conv_bn_act(8, 16, kernel=1),
        conv_bn_act(16, 16, stride=2, groups=16), conv_bn_act(16, 12, kernel=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


@network("depthwise_multiplier", (4, 10, 10))
def depthwise_multiplier() -> nn.Module:
    """Depthwise convolutions that give two and three channels for each one."""
    return nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.ReLU(),
        nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 36, 3, groups=12, bias=False), nn.ReLU(),
        nn.Conv2d(36, 5, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
    )  # fmt: skip


@network("depthwise_on_input", (6, 8, 8))
def depthwise_on_input() -> nn.Module:
    """A depthwise convolution straight on the network's input, whose channels cannot leave."""
    return nn.Sequential(
        nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(),
        nn.Conv2d(12, 9, 1), nn.ReLU(), nn.Conv2d(9, 4, 3),
    )  # fmt: skip


@network("resnext", (3, 8, 8))
class ResNeXtBlock(nn.Module):
    """ResNeXt bottleneck: a grouped 3x3 convolution inside a residual, four groups of four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_act(3, 12)
        self.body = nn.Sequential(
            conv_bn_act(12, 16, kernel=1),
            conv_bn_act(16, 16, groups=4),
            nn.Conv2d(16, 12, 1, bias=False),
            nn.BatchNorm2d(12),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.body(x), inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@network("grouped_uneven", (4, 8, 8))
def grouped_uneven() -> nn.Module:
    """Grouped convolutions in a row with different group counts (2 of 6, 3 of 4), no norm between."""
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, groups=2), nn.ReLU(),
        nn.Conv2d(12, 12, 1, groups=3), nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip


@network("conv1d_net", (2, 40))
def conv1d_net() -> nn.Module:
    """Audio style: strided, dilated and depthwise Conv1d, BatchNorm1d on maps, then a linear layer."""
    return nn.Sequential(
        nn.Conv1d(2, 8, 7, stride=2, padding=3), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 12, 3, dilation=2, padding=2), nn.BatchNorm1d(12), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(12, 12, 5, padding=2, groups=12), nn.Conv1d(12, 10, 1), nn.ReLU(),
        nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(30, 4),
    )  # fmt: skip


@network("conv3d_net", (1, 6, 8, 8))
def conv3d_net() -> nn.Module:
    """Video style: a 3x3x3 convolution, then the factored 1x3x3 and 3x1x1 pair."""
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(6, 9, (1, 3, 3), padding=(0, 1, 1), bias=False),
        nn.Conv3d(9, 8, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(8), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@network("dilated_same", (3, 11, 11))
def dilated_same() -> nn.Module:
    """Dilated convolutions with string padding, 'same' (also for an even kernel) and 'valid'."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", dilation=2), nn.ReLU(),
        nn.Conv2d(8, 8, (4, 3), padding="same"), nn.ReLU(),
        nn.Conv2d(8, 10, 3, padding="valid", dilation=3), nn.ReLU(), nn.Conv2d(10, 4, 1),
    )  # fmt: skip


@network("pad_modes", (3, 9, 9))
class PadModes(nn.Module):
    """Reflect, replicate and circular padding as module, as padding_mode and as F.pad; a constant of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3))
        self.conv2 = nn.Conv2d(8, 7, 3, padding=1, padding_mode="circular")
        self.conv3 = nn.Conv2d(7, 6, 3)
        self.conv4 = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(F.pad(x, (1, 1, 2, 0), mode="replicate")))
        return self.conv4(F.pad(x, (0, 1, 0, 1), value=1.0))


@network("zero_pad_bias", (2, 8, 8))
def zero_pad_bias() -> nn.Module:
    """A channel that is constant (sigmoid of a bias) next to a zero-padded convolution: borders differ."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Sigmoid(),
        nn.Conv2d(6, 5, 3, padding=1, stride=2), nn.Hardsigmoid(), nn.Conv2d(5, 3, 3, padding=2),
    )  # fmt: skip


@network("asymmetric", (3, 10, 7))
def asymmetric() -> nn.Module:
    """Inception-like 1x7 and 7x1 convolutions, a map that is not square, strides and pads by axis."""
    return nn.Sequential(
        nn.Conv2d(3, 8, (1, 7), padding=(0, 3), bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 9, (7, 1), padding=(3, 0)), nn.ReLU(inplace=True),
        nn.Conv2d(9, 6, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Flatten(), nn.Linear(6 * 5 * 3, 4),
    )  # fmt: skip


@network("pool_variety", (3, 13, 13))
class PoolVariety(nn.Module):
    """Average pools with ceil_mode, without counted padding, with a divisor; overlapping max; power pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1)
        self.fc = nn.Linear(10 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True) + F.avg_pool2d(x, 3, 2, divisor_override=5)
        x = F.lp_pool2d(x.abs() + 0.1, 2.0, 2, stride=1)
        return self.fc(torch.flatten(x, 1))


@network("adaptive_pools", (3, 11, 9))
class AdaptivePools(nn.Module):
    """Adaptive average and max pools of several sizes, flattened and concatenated (pyramid pooling)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn_act(3, 8)
        self.fc = nn.Linear(8 * (1 + 4 + 6), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        pools = [F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 2), F.adaptive_avg_pool2d(x, (3, 2))]
        return self.fc(torch.cat([p.flatten(1) for p in pools], dim=1))


@network("spatial_pyramid", (3, 8, 8))
class SpatialPyramid(nn.Module):
    """YOLO's SPPF: three stride-1 max pools in a row, all concatenated with their input."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = conv_bn_act(3, 6, kernel=1)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.out = conv_bn_act(24, 8, kernel=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        a = self.pool(x)
        b = self.pool(a)
        return self.head(self.out(torch.cat((x, a, b, self.pool(b)), 1)))


@network("resize", (3, 6, 7))
class Resize(nn.Module):
    """F.interpolate nearest, bilinear with aligned corners and to a size taken from another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn_act(3, 8)
        self.conv2 = conv_bn_act(8, 6, stride=2)
        self.conv3 = conv_bn_act(6, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.conv1(x)
        low = self.conv2(high)
        up = F.interpolate(low, size=high.shape[-2:], mode="bilinear", align_corners=False)
        out = self.conv3(up) + high
        out = F.interpolate(out, scale_factor=2, mode="nearest")
        return F.interpolate(self.head(out), scale_factor=0.5, mode="bilinear", align_corners=True)


@network("autoencoder", (3, 8, 8))
def autoencoder() -> nn.Module:
    """Strided down, transposed up: grouped, overlapping and output-padded transposed convolutions."""
    return nn.Sequential(
        conv_bn_act(3, 8, stride=2), conv_bn_act(8, 12, stride=2),
        nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8, bias=False), nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1), nn.Tanh(),
    )  # fmt: skip


@network("generator", (10,))
class Generator(nn.Module):
    """GAN generator: linear, a hard-coded view to [B, 8, 4, 4], transposed convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 8 * 4 * 4)
        self.bn = nn.BatchNorm2d(8)
        self.up1 = nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.up2 = nn.ConvTranspose2d(6, 1, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.fc(z).view(-1, 8, 4, 4)
        x = F.relu(self.bn(x))
        x = F.leaky_relu(self.bn1(self.up1(x)), 0.2)
        return torch.tanh(self.up2(x))


@network("super_resolution", (1, 6, 6))
class SuperResolution(nn.Module):
    """ESPCN: pixel_shuffle twice as big, so four channels of the convolution make one of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, padding=2)
        self.conv2 = nn.Conv2d(8, 24, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv3 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(x))
        x = F.relu(self.shuffle(self.conv2(x)))
        return F.pixel_shuffle(self.conv3(x), 2)


@network("space_to_depth", (3, 8, 8))
class SpaceToDepth(nn.Module):
    """YOLOv5's Focus on the image and pixel_unshuffle on features: pixels become channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn_act(12, 7)
        self.conv2 = conv_bn_act(28, 6, kernel=1)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        x = F.pixel_unshuffle(self.conv1(x), 2)
        return self.head(self.conv2(x))


@network("segnet", (2, 8, 8))
class SegNet(nn.Module):
    """Max pooling that returns indices, un-pooled in the decoder: indices carry channels too."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = conv_bn_act(2, 6)
        self.enc2 = conv_bn_act(6, 9)
        self.dec = conv_bn_act(9, 6)
        self.head = nn.Conv2d(6, 3, 1)
        self.pool = nn.MaxPool2d(2, 2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(self.enc1(x))
        x = self.dec(self.enc2(x))
        return self.head(self.unpool(x, indices))


@network("octave", (3, 8, 8))
class Octave(nn.Module):
    """Octave convolution: a high and a low map, each fed by both; half of the channels at half of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = conv_bn_act(3, 6), conv_bn_act(3, 4)
        self.mix = nn.ModuleDict({key: nn.Conv2d(a, b, 3, padding=1, bias=False) for key, a, b in
                                 (("hh", 6, 7), ("hl", 6, 5), ("lh", 4, 7), ("ll", 4, 5))})
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.high(x), self.low(F.avg_pool2d(x, 2))
        up = F.interpolate(self.mix["lh"](low), scale_factor=2.0)
        high, low = self.mix["hh"](high) + up, self.mix["ll"](low) + self.mix["hl"](F.avg_pool2d(high, 2))
        return self.head(torch.cat((F.relu(high), F.interpolate(F.relu(low), scale_factor=2.0)), 1))


@network("high_resolution", (3, 8, 8))
class HighResolution(nn.Module):
    """HRNet: two streams side by side, fused both ways by a list of lists of layers, some of them None."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv_bn_act(3, 6), conv_bn_act(6, 8, stride=2)
        self.branches = nn.ModuleList([conv_bn_act(6, 6), conv_bn_act(8, 8)])
        up = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Upsample(scale_factor=2.0))
        down = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.fuse = nn.ModuleList([nn.ModuleList([nn.Identity(), up]), nn.ModuleList([down, nn.Identity()])])
        self.head = nn.Conv2d(14, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        streams = [branch(y) for branch, y in zip(self.branches, (x, self.down(x)), strict=True)]
        high, low = (F.relu(sum(f(y) for f, y in zip(row, streams, strict=True))) for row in self.fuse)
        return self.head(torch.cat((high, F.interpolate(low, size=high.shape[-2:], mode="bilinear")), 1))
