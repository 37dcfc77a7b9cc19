"""Shared and tied weights, bare parameters, several inputs and outputs, ids as inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import conv_bn_act, network, tokens


@network("shared_twice", (3, 8, 8))
class SharedTwice(nn.Module):
    """One convolution called three times on its own output (a recurrent residual network)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = conv_bn_act(3, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = F.relu(norm(self.shared(x)))
        return self.head(x)


@network("shared_sizes", (3, 12, 12))
class SharedSizes(nn.Module):
    """One head called on two maps of different size and different producers (a detector's shared head)."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = conv_bn_act(3, 8), conv_bn_act(8, 8, stride=2)
        self.tower, self.boxes, self.classes = conv_bn_act(8, 6), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high = self.high(x)
        towers = [self.tower(level) for level in (high, self.low(high))]
        boxes = torch.cat([self.boxes(t).flatten(2).transpose(1, 2) for t in towers], 1)
        classes = torch.cat([self.classes(t).flatten(2).transpose(1, 2) for t in towers], 1)
        return boxes, classes


@network("siamese", (1, 8, 8), (1, 8, 8))
class Siamese(nn.Module):
    """Two images through one encoder, compared by distance, product and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv_bn_act(1, 6), nn.MaxPool2d(2), conv_bn_act(6, 8), nn.AdaptiveAvgPool2d(1)
        )
        self.fc = nn.Linear(32, 3)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        a, b = self.encoder(x1).flatten(1), self.encoder(x2).flatten(1)
        return self.fc(torch.cat([(a - b).abs(), a * b, a, b], dim=1))


@network("two_modalities", (3, 6, 6), (7,))
class TwoModalities(nn.Module):
    """Two inputs of different kind, an image modulated by a vector (FiLM: 1 + gamma, beta by chunk)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn_act(3, 8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.film = nn.Sequential(nn.Linear(7, 10), nn.ReLU(), nn.Linear(10, 16))
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        x = F.relu(self.conv2(self.conv1(image)) * (1 + gamma) + beta)
        return self.head(x.mean((2, 3)))


@network("tied_embedding", inputs=lambda batch: ((tokens(batch, 6, 13),), {}))
class TiedEmbedding(nn.Module):
    """A language model whose decoder is the embedding's own weight, with an MLP between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc1, self.fc2 = nn.Embedding(13, 8), nn.Linear(8, 14), nn.Linear(14, 8)
        self.decoder = nn.Linear(8, 13)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.decoder(x + self.fc2(F.relu(self.fc1(x))))


@network("tied_autoencoder", (12,))
class TiedAutoencoder(nn.Module):
    """The decoder multiplies by the encoder's weight transposed, with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Linear(12, 9), nn.Linear(9, 5)
        self.bias2, self.bias1 = nn.Parameter(torch.empty(9)), nn.Parameter(torch.empty(12))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.enc2(torch.sigmoid(self.enc1(x))))
        x = torch.sigmoid(F.linear(x, self.enc2.weight.t(), self.bias2))
        return F.linear(x, self.enc1.weight.t(), self.bias1)


@network("functional_conv", (3, 8, 8))
class FunctionalConv(nn.Module):
    """Bare parameters used by F.conv2d, F.batch_norm, F.linear and matmul; no layer modules at all."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.kernel_bias = nn.Parameter(torch.empty(8, 3, 3, 3)), nn.Parameter(torch.empty(8))
        self.gain, self.shift = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8))
        self.register_buffer("mean", torch.full((8,), 0.1))
        self.register_buffer("var", torch.full((8,), 0.7))
        self.weight, self.matrix = nn.Parameter(torch.empty(10, 8)), nn.Parameter(torch.empty(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.kernel_bias, stride=2, padding=1)
        x = F.relu(F.batch_norm(x, self.mean, self.var, 1 + self.gain, self.shift))
        x = F.relu(F.linear(x.mean((2, 3)), self.weight))
        return x @ self.matrix


@network("parameter_list", (6, 5))
class ParameterLists(nn.Module):
    """nn.ParameterList and ParameterDict weights, sliced from one bank per layer, multiplied with matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(a, b)) for a, b in ((5, 8), (8, 9), (9, 3)))
        self.biases = nn.ParameterDict({"a": torch.empty(8), "b": torch.empty(9)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.matmul(x, self.weights[0]) + self.biases["a"])
        x = F.relu(x @ self.weights[1] + self.biases["b"])
        return torch.matmul(x, self.weights[2])


@network("stacked_experts", (5, 6))
class StackedExperts(nn.Module):
    """Mixture of experts, dense form: weights [experts, in, out] by bmm, softmax over experts weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.empty(3, 6, 10)), nn.Parameter(torch.empty(3, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        weights = self.router(x).softmax(-1).reshape(b * n, 3)
        h = x.reshape(1, b * n, c).expand(3, -1, -1)
        y = torch.bmm(F.relu(torch.bmm(h, self.up)), self.down)
        return torch.einsum("ti,itc->tc", weights, y).view(b, n, c)


@network("masked_weight", (10,))
class MaskedWeight(nn.Module):
    """A weight masked by a buffer and scaled by a parameter before use (ticket search, MADE)."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.scale = nn.Linear(10, 12), nn.Linear(12, 4), nn.Parameter(torch.empty(12, 1))
        self.register_buffer("mask", (torch.arange(120).view(12, 10) % 3 != 0).float())

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.fc1.weight * self.mask * (1 + self.scale), self.fc1.bias)
        return self.fc2(F.relu(x))


@network("several_outputs", (3, 8, 8))
class SeveralOutputs(nn.Module):
    """A tuple with a nested list: an intermediate map goes out too, so its channels must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv_bn_act(3, 6), conv_bn_act(6, 9), conv_bn_act(9, 7)
        self.fc = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        a = self.conv1(x)
        b = self.conv3(self.conv2(a))
        return self.fc(b.mean((2, 3))), [a, b.amax((2, 3))]


@network("dict_output", (3, 8, 8))
class DictOutput(nn.Module):
    """Segmentation with an auxiliary head: a dict of outputs that share a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.deep = conv_bn_act(3, 8), conv_bn_act(8, 10, stride=2)
        self.head, self.aux = nn.Conv2d(10, 3, 1), nn.Sequential(conv_bn_act(8, 5), nn.Conv2d(5, 3, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        out = F.interpolate(self.head(self.deep(features)), size=x.shape[-2:], mode="bilinear")
        return {"out": out, "aux": self.aux(features)}


@network("reserved_names", (3, 6, 6))
class ReservedNames(nn.Module):
    """Layers called meta, graph and code, which a torch.fx.GraphModule keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.meta, self.graph, self.code = conv_bn_act(3, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(F.relu(self.graph(self.meta(x).mean((2, 3)))))


def _dict_inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ({"image": torch.randn(batch, 3, 6, 6), "meta": torch.randn(batch, 4)},), {}


@network("dict_input", inputs=_dict_inputs)
class DictInput(nn.Module):
    """One positional dict of tensors, as many training loops pass batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.age, self.head = conv_bn_act(3, 8), nn.Linear(4, 5), nn.Linear(13, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pooled = self.conv(batch["image"]).mean((2, 3))
        return self.head(torch.cat([pooled, F.relu(self.age(batch["meta"]))], dim=-1))


def _keyword_inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.arange(6).expand(batch, 6) < 4
    return (tokens(batch, 6, 17),), {"attention_mask": mask, "scale": 2.0}


@network("keyword_inputs", inputs=_keyword_inputs)
class KeywordInputs(nn.Module):
    """Keyword arguments: one left out, one a Python number, a mask over time (transformers style)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc1, self.fc2 = nn.Embedding(17, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(
        self, ids: Tensor, attention_mask: Tensor, token_type: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        x = self.embedding(ids) * scale
        if token_type is not None:
            x = x + token_type.unsqueeze(-1)
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        pooled = (F.relu(self.fc1(x)) * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return self.fc2(pooled)


@network("text_cnn", inputs=lambda batch: ((tokens(batch, 12, 19),), {}))
class TextCNN(nn.Module):
    """Kim's text CNN: embedding, Conv1d of three kernel sizes, max over time, concatenated, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, 8, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(8, 6, kernel) for kernel in (2, 3, 4))
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(18, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        pooled = [
            F.max_pool1d(F.relu(conv(x)), x.size(2) - conv.kernel_size[0] + 1).squeeze(2)
            for conv in self.convs
        ]
        return self.fc(self.dropout(torch.cat(pooled, 1)))


@network("positional_embedding", inputs=lambda batch: ((tokens(batch, 7, 19),), {}))
class PositionalEmbedding(nn.Module):
    """Token and position embeddings summed and normalised (BERT's input), the first token classified."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place, self.norm = nn.Embedding(19, 10), nn.Embedding(9, 10), nn.LayerNorm(10)
        self.fc1, self.fc2 = nn.Linear(10, 12), nn.Linear(12, 3)
        self.register_buffer("positions", torch.arange(9).unsqueeze(0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.word(ids) + self.place(self.positions[:, : ids.size(1)]))
        return self.fc2(torch.tanh(self.fc1(x[:, 0])))
