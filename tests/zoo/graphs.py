"""Graph networks, and other reading and writing at positions that integers name.

The graphs are constant (a skeleton, a road map), so that the batch is on axis 0 as everywhere in this zoo; nodes
are on axis 1. ``tests/unit/test_graph_networks.py`` has those whose nodes are the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import conv_bn_act, network

SOURCE = torch.tensor([0, 1, 2, 3, 4, 0, 2, 4, 1])
TARGET = torch.tensor([1, 2, 3, 4, 0, 2, 4, 1, 0])


class Edges(nn.Module):
    """Nine edges between five nodes, as a buffer."""

    source: Tensor
    target: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("source", SOURCE.clone())
        self.register_buffer("target", TARGET.clone())


@network("graph_convolution", (5, 7))
class GraphConvolution(Edges):
    """Messages gathered with index_select, summed with index_add, divided by the degree (scatter_add of ones)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(7, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def propagate(self, x: Tensor) -> Tensor:
        degree = x.new_zeros(5).scatter_add_(0, self.target, x.new_ones(9)).clamp(min=1)
        total = torch.zeros_like(x).index_add(1, self.target, x.index_select(1, self.source))
        return total / degree.view(1, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.propagate(self.fc1(x)))
        x = F.relu(self.propagate(self.fc2(x)))
        return self.head(x.mean(1))


@network("graph_attention", (5, 7))
class GraphAttention(Edges):
    """Heads of 4 x 3: scores from products with a parameter [1, 1, heads, width], a softmax over each node's edges
    (scatter_reduce of maxima, then sums), and sizes written down as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(7, 12), nn.Linear(12, 3)
        self.left, self.right = nn.Parameter(torch.empty(1, 1, 4, 3)), nn.Parameter(torch.empty(1, 1, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x).view(-1, 5, 4, 3)
        scores = (x * self.left).sum(-1)[:, self.source] + (x * self.right).sum(-1)[:, self.target]
        scores = F.leaky_relu(scores, 0.2)
        index = self.target.view(1, -1, 1).expand(x.shape[0], -1, 4)
        largest = scores.new_zeros(x.shape[0], 5, 4).scatter_reduce(1, index, scores, "amax", include_self=False)
        weights = (scores - largest.gather(1, index)).exp()
        total = weights.new_zeros(x.shape[0], 5, 4).scatter_add(1, index, weights)
        weights = weights / total.gather(1, index)
        messages = x[:, self.source] * weights.unsqueeze(-1)
        out = torch.zeros_like(x).index_add(1, self.target, messages)
        return self.head(F.elu(out.reshape(-1, 5, 12))).amax(1)


@network("neighbours", (6, 8, 8))
class Neighbours(nn.Module):
    """Point clouds: each position's most similar ones are found by topk over distances and gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.edge, self.head = nn.Conv1d(6, 9, 1), nn.Conv2d(18, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        near = (x[:, :3].flatten(2).unsqueeze(3) - x[:, :3].flatten(2).unsqueeze(2)).square().sum(1)
        index = near.topk(4, dim=-1, largest=False)[1]                      # [N, 64, 4]
        x = F.relu(self.embed(x.flatten(2)))
        flat = index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        found = x.gather(2, flat).unflatten(2, (64, 4))
        own = x.unsqueeze(3).expand_as(found)
        return self.head(F.relu(self.edge(torch.cat((own, found - own), 1))).amax((2, 3)))


@network("channel_order", (3, 8, 8))
class ChannelOrder(nn.Module):
    """CondenseNet: a buffer says in which order, and how often, a convolution reads its channels."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv_bn_act(3, 8), conv_bn_act(10, 8), nn.Conv2d(8, 3, 1)
        self.register_buffer("order", torch.tensor([5, 1, 0, 3, 3, 7, 2, 4, 6, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(torch.index_select(self.conv1(x), 1, self.order)))


@network("channel_numbers", (3, 8, 8))
class ChannelNumbers(nn.Module):
    """Channels reordered by a list of numbers in forward: x[:, [7, 6, ...]]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv_bn_act(3, 8), conv_bn_act(8, 6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(x)[:, [7, 6, 5, 4, 3, 2, 1, 0]]))


@network("written_places", (3, 8, 8))
class WrittenPlaces(nn.Module):
    """Assignments to parts of a map: rows by number, corners by a table, positions by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv_bn_act(3, 8), conv_bn_act(3, 8), nn.Conv2d(8, 5, 3)
        self.token, self.head = nn.Parameter(torch.empty(8)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.conv1(x), self.conv2(x)
        x = x.clone()
        x[:, :, torch.tensor([0, 3, 5])] = y[:, :, :3]
        x[:, :, torch.tensor([1, 6]), torch.tensor([2, 7])] = self.token.view(1, -1, 1)
        x = x.flatten(2).index_fill(2, torch.tensor([9, 17]), 0.5).unflatten(2, (8, 8))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))


@network("global_filter", (3, 8, 8))
class GlobalFilter(nn.Module):
    """GFNet: a Fourier transform over positions, a complex weight per channel, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv_bn_act(3, 8), conv_bn_act(8, 6), nn.Linear(6, 3)
        self.filter = nn.Parameter(torch.empty(8, 8, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        x = x + torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho")
        return self.head(self.conv2(x).amax((2, 3)))


@network("unfold_fold", (3, 8, 8))
class UnfoldFold(nn.Module):
    """VOLO: windows as columns (unfold), weighted, and summed back (fold); a second unfold feeds a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weigh, self.mix = conv_bn_act(3, 6), conv_bn_act(3, 1), conv_bn_act(6, 5)
        self.head = nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(self.conv(x), 3, padding=1) * torch.sigmoid(self.weigh(x)).flatten(2)
        x = self.mix(F.fold(columns, (8, 8), 3, padding=1))
        return self.head(F.unfold(x, 2, stride=2).transpose(1, 2)).mean(1)


@network("sampled", (3, 8, 8))
class Sampled(nn.Module):
    """A spatial transformer: six numbers from the image say where grid_sample reads."""

    def __init__(self) -> None:
        super().__init__()
        self.locate, self.conv, self.head = nn.Conv2d(3, 6, 8), conv_bn_act(3, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        theta = 0.1 * torch.tanh(self.locate(x)).view(-1, 2, 3)
        maps = self.conv(x)
        maps = F.grid_sample(maps, F.affine_grid(theta, list(maps.shape), align_corners=False), align_corners=False)
        return self.head(maps.sort(3)[0].cummax(2)[0].mean((2, 3)))


def bags(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(0, 20, (batch, 6)), torch.randint(0, 4, (batch,))), {}


@network("embedding_bag", inputs=bags)
class BagOfWords(nn.Module):
    """Recommenders: means of embeddings, next to a category as one_hot."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.fc, self.head = nn.EmbeddingBag(20, 8), nn.Linear(8, 9), nn.Linear(13, 3)

    def forward(self, words: Tensor, category: Tensor) -> Tensor:
        x = F.relu(self.fc(self.bag(words)))
        return self.head(torch.cat((x, F.one_hot(category, 4).to(x)), 1))
