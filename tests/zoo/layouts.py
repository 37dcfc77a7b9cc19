"""Data movement: views, slices, permutations, repeats; sizes that somebody wrote down as numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import conv_bn_act, network


@network("view_hard_coded", (3, 8, 8))
class ViewHardCoded(nn.Module):
    """`x.view(-1, 512)` after 32 channels of 4x4, the line every tutorial has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 32, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(512, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = x.view(-1, 512)
        return self.fc2(F.relu(self.fc1(x)))


@network("channels_last_flatten", (3, 6, 6))
class ChannelsLastFlatten(nn.Module):
    """Permuted to NHWC before flattening (Keras imports), so the linear layer's inputs are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = conv_bn_act(3, 7), nn.Linear(7 * 36, 11), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1).contiguous()
        x = x.reshape(x.shape[0], 7 * 36)
        return self.fc2(torch.relu(self.fc1(x)))


@network("split_uneven", (3, 8, 8))
class SplitUneven(nn.Module):
    """split([4, 12]) whose parts meet different layers and never come together again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn_act(3, 16)
        self.small, self.large = nn.Conv2d(4, 5, 3), nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        small, large = torch.split(self.conv(x), [4, 12], dim=1)
        return self.small(small) - self.large(large)


@network("channel_slices", (3, 8, 8))
class ChannelSlices(nn.Module):
    """x[:, :8], x[:, 8:], x[:, -3:] and x[:, ::2]: overlapping slices of one convolution's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn_act(3, 14)
        self.a, self.b, self.c, self.d = (nn.Conv2d(width, 6, 1) for width in (8, 6, 3, 7))
        self.head = nn.Conv2d(6, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.a(x[:, :8]) + self.b(x[:, 8:]) + self.c(x[:, -3:]) + self.d(x[:, ::2])
        return self.head(F.relu(y))


@network("dropped_channels", (3, 8, 8))
class DroppedChannels(nn.Module):
    """Only channels 2 to 8 of twelve are ever used: the others are dead already."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv_bn_act(3, 12), nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).narrow(1, 2, 7))


@network("constant_index", (3, 8, 8))
class ConstantIndex(nn.Module):
    """Channels reordered and one doubled by a constant index buffer, flipped, picked by index_select."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv_bn_act(3, 8), conv_bn_act(9, 7), nn.Conv2d(4, 3, 1)
        self.register_buffer("order", torch.tensor([5, 1, 0, 3, 3, 7, 2, 4, 6]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)[:, self.order]
        x = torch.flip(self.conv2(x), dims=(1,))
        return self.head(torch.index_select(x, 1, self.order[:4] % 7))


@network("stack_unbind", (6,))
class StackUnbind(nn.Module):
    """unsqueeze, stack on new axes, squeeze, unbind and movedim between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(6, 10)
        self.c, self.head = nn.Linear(20, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pair = torch.stack((F.relu(self.a(x)), torch.tanh(self.b(x))), dim=2)
        first, second = pair.unbind(-1)
        mixed = torch.movedim(pair, 2, 1).flatten(1).unsqueeze(1)
        out = F.relu(self.c(mixed)).squeeze(1)
        return self.head(out) + (first * second).sum(1, keepdim=True)


@network("repeat_expand", (3, 6, 6))
class RepeatExpand(nn.Module):
    """A vector is expanded over the map and concatenated; channels are tiled and repeat_interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.vector = conv_bn_act(3, 6), nn.Linear(6, 4)
        self.mix, self.head = nn.Conv2d(10, 5, 1), nn.Conv2d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        v = self.vector(x.amax(dim=(2, 3)))[:, :, None, None].expand(-1, -1, 6, 6)
        x = F.relu(self.mix(torch.cat([x, v], 1)))
        return self.head(torch.cat([x.repeat(1, 2, 1, 1), x.repeat_interleave(2, dim=1)], 1))


@network("roll", (3, 8, 8))
class Roll(nn.Module):
    """Shift networks: groups of channels rolled in four directions, and the channels themselves by 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv_bn_act(3, 8), conv_bn_act(8, 9, kernel=1), nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.conv1(x).chunk(4, 1)
        x = torch.cat([a.roll(1, 2), b.roll(-1, 2), torch.roll(c, 1, dims=3), d.roll((1, -1), (2, 3))], 1)
        return self.head(torch.roll(self.conv2(x), 3, 1))


@network("constant_scale", (3, 8, 8))
class ConstantScale(nn.Module):
    """A fixed per-channel buffer multiplies, a per-channel constant is added, an image mean is subtracted."""

    scale: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.linspace(0.5, 2, 8).view(1, 8, 1, 1))
        self.register_buffer("shift", torch.linspace(-1, 1, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv((x - self.mean) / 0.226) * self.scale
        return self.head(F.relu(x + self.shift[None, :, None, None]))


@network("einsum", (6, 5))
class Einsum(nn.Module):
    """Contractions written with einsum over own parameters, an outer product of activations included."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(5, 8)), nn.Parameter(torch.empty(8, 3))
        self.gate = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btc,cd->btd", x, self.up)
        g = self.gate(x).softmax(1)
        pooled = torch.einsum("btd,btd->bd", F.relu(h), g)
        return torch.einsum("bd,de->be", pooled, self.down)


@network("outer_product", (3, 6, 6))
class BilinearPooling(nn.Module):
    """Bilinear pooling: every pair of channels of two branches becomes an input of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv_bn_act(3, 5), conv_bn_act(3, 4), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).flatten(2), self.b(x).flatten(2)
        return self.fc(torch.bmm(a, b.transpose(1, 2)).div(36).flatten(1))


@network("heads_view", (12,))
class HeadsView(nn.Module):
    """A linear layer's 24 outputs seen as 4 heads of 6, each head normalised by its own softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 24), nn.Linear(24, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x).unflatten(1, (4, 6)).softmax(-1)
        return self.fc3(F.relu(self.fc2(x.flatten(1))))
