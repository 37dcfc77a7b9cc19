"""Turns a `tests.networks.Spec` into layers and calls, keeping track of every value's shape."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, singledispatchmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import networks as spec_
from tests import parts

MOST_CHANNELS, LARGEST_MAP = 24, 12


@dataclass(frozen=True)
class Call:
    """`target` (a layer's name or a function) on earlier values, then on constant settings."""

    target: str | Callable[..., Any]
    inputs: tuple[int, ...]
    settings: tuple[Any, ...] = ()


class Shape(NamedTuple):
    """`[B, channels]` with `dims` axes of `size` behind; sizes are known when the network is built."""

    channels: int
    size: int


class Scale(nn.Module):
    """One factor per channel, a parameter or a constant."""

    def __init__(self, channels: int, dims: int, learned: bool) -> None:
        super().__init__()
        values = torch.linspace(0.5, 1.5, channels).view(channels, *[1] * dims)
        if learned:
            self.factor = nn.Parameter(values)
        else:
            self.register_buffer("factor", values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Scan(nn.Module):
    """A recurrent layer along every row of a map: few steps, as tracing takes them one by one."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        y, _ = self.layer(rows.flatten(0, -3))
        return y.unflatten(0, rows.shape[:-2]).movedim(-1, 1)


class Twice(nn.Module):
    """A cell on one input, from zeros and from what came out."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x, self.cell(x))
        return state if isinstance(state, Tensor) else state[0]


def cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1)


def stacked_sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], dim=0).sum(0)


def shuffle(x: Tensor, groups: int, literal: tuple[int, ...] | None) -> Tensor:
    _, channels, *space = x.shape if literal is None else (0, *literal)
    x = x.view(-1, groups, channels // groups, *space)
    return x.transpose(1, 2).contiguous().view(-1, channels, *space)


def gated_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


def mean_gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.mean(dim=1, keepdim=True))


def through_channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def flat_channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(1)


def space_mean(x: Tensor, keepdim: bool = False) -> Tensor:
    return x.mean(dim=list(range(2, x.dim())), keepdim=keepdim) if x.dim() > 2 else x


def every_second_pixel(x: Tensor) -> Tensor:
    return x[(slice(None), slice(None), *[slice(None, None, 2)] * (x.dim() - 2))]


def channel_slice(x: Tensor, start: int | None, stop: int | None, step: int | None) -> Tensor:
    return x[:, start:stop:step]


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu, "relu_": partial(F.relu, inplace=True), "leaky_relu": F.leaky_relu, "elu": F.elu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
    "softplus": F.softplus,
}  # fmt: skip


def compile_spec(spec: spec_.Spec) -> tuple[dict[str, nn.Module], tuple[Call, ...], tuple[int, ...]]:
    """Layers by name, calls in order, and the numbers of the values that go out."""
    builder = Builder(spec.dims)
    size = spec.size if spec.dims else 1
    builder.values += [Shape(spec.channels, size)] * (1 if spec.inputs == "one" else 2)
    x, blocks = 0, spec.blocks
    if spec.inputs == "cat":
        x = builder.concatenate(0, 1)
    elif spec.inputs == "siamese":
        a, b = builder.shared(blocks[:1], 0, 1)
        x, blocks = builder.call(torch.sub, a, b), blocks[1:]
    x = builder.chain(blocks, x, keep=False)
    outputs = builder.head(spec.head, spec.hidden, x)
    return builder.layers, tuple(builder.calls), outputs


class Builder:
    """Emits layers and calls. `keep`: the block stands in a branch and may not change the map's size."""

    def __init__(self, dims: int) -> None:
        self.dims = dims
        self.layers: dict[str, nn.Module] = {}
        self.calls: list[Call] = []
        self.values: list[Shape] = []
        self.fresh: set[int] = set()  # values that nobody else reads: they may be changed in place
        self._scope, self._count, self._scopes = "", 0, 0

    def call(
        self, target: str | Callable[..., Any], *inputs: int, settings: tuple[Any, ...] = (),
        channels: int | None = None, size: int | None = None,
    ) -> int:  # fmt: skip
        before = self.values[inputs[0]]
        self.calls.append(Call(target, inputs, settings))
        self.values.append(Shape(channels or before.channels, size or before.size))
        return len(self.values) - 1

    def layer(
        self, make: Callable[[], nn.Module], x: int, channels: int | None = None, size: int | None = None
    ) -> int:
        """A layer under the next name of this scope; in a scope entered again, the layer made before."""
        name = f"{self._scope}{self._count}"
        self._count += 1
        if name not in self.layers:
            self.layers[name] = make()
        out = self.call(name, x, channels=channels, size=size)
        self.fresh.add(out)
        return out

    def shared(
        self, blocks: tuple[spec_.Block, ...], first: int, second: int | None = None
    ) -> tuple[int, int]:
        """The same layers on two values or, without a second, on the first and then on what comes out."""
        outer = self._scope, self._count
        self._scopes += 1
        scope, scopes = f"shared{self._scopes}_", self._scopes
        results: list[int] = []
        for _ in range(2):
            start = first if not results else results[0] if second is None else second
            # Entered from the same state, so that layers and nested scopes get the same names again.
            self._scope, self._count, self._scopes = scope, 0, scopes
            x = self.chain(blocks, start, keep=True)
            results.append(self.fit(x, self.values[start].channels))
        self._scope, self._count = outer
        return results[0], results[1]

    def chain(self, blocks: tuple[spec_.Block, ...], x: int, keep: bool) -> int:
        for block in blocks:
            x = self.emit(block, x, keep)
        return x

    def pointwise(self, x: int, width: int, stride: int = 1) -> int:
        channels, size = self.values[x]
        if self.dims == 0:
            return self.layer(lambda: nn.Linear(channels, width), x, channels=width)
        conv = (nn.Conv1d, nn.Conv2d)[self.dims - 1]
        make = partial(conv, channels, width, 1, stride)
        return self.layer(make, x, channels=width, size=-(-size // stride))

    def fit(self, x: int, width: int) -> int:
        return x if self.values[x].channels == width else self.pointwise(x, width)

    def concatenate(self, *parts: int) -> int:
        total = sum(self.values[p].channels for p in parts)
        x = self.call(cat, *parts, channels=total)
        return x if total <= MOST_CHANNELS else self.pointwise(x, MOST_CHANNELS // 2)

    def norm(self, kind: str, x: int) -> int:
        channels, size = self.values[x]
        if kind == "batch":
            norm = nn.BatchNorm2d if self.dims == 2 else nn.BatchNorm1d
            return self.layer(partial(norm, channels), x)
        if kind == "group":
            groups = [g for g in (4, 2, 1) if channels % g == 0 and channels // g * size**self.dims >= 4]
            # Statistics over one to three values leave little but signs: there it stands aside.
            return self.layer(partial(nn.GroupNorm, groups[0], channels), x) if groups else x
        return x

    def activate(self, kind: str, x: int) -> int:
        if kind == "none":
            return x
        if kind == "prelu":
            return self.layer(partial(nn.PReLU, self.values[x].channels), x)
        if kind == "relu_" and x not in self.fresh:
            kind = "relu"
        x = self.call(ACTIVATIONS[kind], x)
        self.fresh.add(x)
        return x

    @singledispatchmethod
    def emit(self, block: spec_.Block, x: int, keep: bool) -> int:
        raise TypeError(f"no rule for {block}")

    @emit.register
    def _(self, block: spec_.Recur, x: int, keep: bool) -> int:
        channels = self.values[x].channels
        if self.dims == 0:
            cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "rnn": nn.RNNCell}[block.kind]
            return self.layer(lambda: Twice(cell(channels, block.width)), x, channels=block.width)
        kind = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}[block.kind]
        make = partial(kind, channels, block.width, block.layers, batch_first=True, bidirectional=block.both)
        return self.layer(lambda: Scan(make()), x, channels=block.width * (1 + block.both))

    @emit.register
    def _(self, block: spec_.Attend, x: int, keep: bool) -> int:
        if self.dims == 0:
            return x
        make = partial(parts.Attend, self.values[x].channels, block.keys, block.times, block.width, block.spelling,
                       block.packed)
        y = self.layer(make, x)
        return self.call(torch.add, x, y) if block.add else y

    @emit.register
    def _(self, block: spec_.Mix, x: int, keep: bool) -> int:
        positions = self.values[x].size**self.dims
        return self.layer(partial(parts.Tokens, positions, block.hidden), x) if self.dims else x

    @emit.register
    def _(self, block: spec_.Rows, x: int, keep: bool) -> int:
        channels, rows = self.values[x].channels, block.rows
        if channels % rows:
            return x
        widths = {"sum": channels // rows, "shared": rows * block.width}
        make = partial(parts.Rows, channels, rows, block.kind, block.width)
        return self.layer(make, x, channels=widths.get(block.kind, channels))

    @emit.register
    def _(self, block: spec_.Experts, x: int, keep: bool) -> int:
        return self.layer(partial(parts.Experts, self.values[x].channels, block.experts, block.hidden), x)

    @emit.register
    def _(self, block: spec_.Conv, x: int, keep: bool) -> int:
        channels, size = self.values[x]
        if self.dims == 0:
            x = self.layer(lambda: nn.Linear(channels, block.width, block.bias), x, channels=block.width)
            return self.activate(block.activation, self.norm(block.norm, x))
        width, groups = block.width, 1
        if block.groups == "depthwise":
            groups, width = (
                channels,
                channels * (2 if block.width % 2 and 2 * channels <= MOST_CHANNELS else 1),
            )
        elif channels % int(block.groups) == 0:
            groups = int(block.groups)
            width = -(-width // groups) * groups
        stride, padding, out = self._geometry(block, size, keep)
        conv = (nn.Conv1d, nn.Conv2d)[self.dims - 1]
        make = partial(conv, channels, width, block.kernel, stride, padding, groups=groups, bias=block.bias)
        x = self.layer(make, x, channels=width, size=out)
        return self.activate(block.activation, self.norm(block.norm, x))

    @staticmethod
    def _geometry(block: spec_.Conv, size: int, keep: bool) -> tuple[int, int | str, int]:
        """Stride, padding and the size that comes out; inside a branch the size stays."""
        if keep or block.padding == "same":
            return 1, "same", size
        half = block.kernel // 2 if block.padding == "half" or size < block.kernel else 0
        return block.stride, half, (size + 2 * half - block.kernel) // block.stride + 1

    @emit.register
    def _(self, block: spec_.Activate, x: int, keep: bool) -> int:
        return self.activate(block.activation, self.norm(block.norm, x))

    @emit.register
    def _(self, block: spec_.Pool, x: int, keep: bool) -> int:
        size = self.values[x].size
        if self.dims == 0 or size < block.kernel:
            return x
        maximum = (F.max_pool1d, F.max_pool2d)[self.dims - 1]
        average = (F.avg_pool1d, F.avg_pool2d)[self.dims - 1]
        pool = maximum if block.kind == "max" else average
        if keep:
            return self.call(pool, x, settings=(3, 1, 1))
        if block.kind == "average_ceil":
            rounded = -(-(size - block.kernel) // 2) + 1
            return self.call(average, x, settings=(block.kernel, 2, 0, True), size=rounded)
        return self.call(pool, x, settings=(block.kernel, 2), size=(size - block.kernel) // 2 + 1)

    @emit.register
    def _(self, block: spec_.Gate, x: int, keep: bool) -> int:
        channels = self.values[x].channels
        if block.kind in ("buffer", "parameter"):
            return self.layer(partial(Scale, channels, self.dims, block.kind == "parameter"), x)
        if block.kind == "squeeze":
            gate = self.call(space_mean, x, settings=(True,), size=1)
            gate = self.pointwise(
                self.activate("relu", self.pointwise(gate, max(channels // 2, 1))), channels
            )
            return self.call(torch.mul, x, self.call(torch.sigmoid, gate))
        if block.kind == "spatial":
            return self.call(torch.mul, x, self.call(torch.sigmoid, self.pointwise(x, 1)))
        if block.kind == "mean":
            return self.call(mean_gate, x)
        if channels % 2:
            return x
        gate_halves, settings = (F.glu, (1,)) if block.kind == "glu" else (gated_halves, ())
        return self.call(gate_halves, x, settings=settings, channels=channels // 2)

    @emit.register
    def _(self, block: spec_.Shuffle, x: int, keep: bool) -> int:
        channels, size = self.values[x]
        if channels % block.groups:
            return x
        literal = (channels, *[size] * self.dims) if block.literal else None
        return self.call(shuffle, x, settings=(block.groups, literal))

    @emit.register
    def _(self, block: spec_.Move, x: int, keep: bool) -> int:
        channels, size = self.values[x]
        if block.kind in ("flip", "reverse"):
            return self.call(torch.flip, x, settings=([1] if block.kind == "reverse" else [-1],))
        if block.kind == "dropout":
            fresh = x in self.fresh
            x = self.layer(partial(nn.Dropout, 0.3), x)
            if not fresh:  # in eval mode its output is its input
                self.fresh.discard(x)
            return x
        if block.kind == "repeat" and 2 * channels <= MOST_CHANNELS:
            return self.call(torch.repeat_interleave, x, settings=(2, 1), channels=2 * channels)
        if self.dims == 0:
            return x
        if block.kind == "roll":
            return self.call(torch.roll, x, settings=(1, 2))
        if block.kind == "permute":
            return self.call(through_channels_last, x)
        if block.kind in ("pad", "reflect") and not keep and 2 <= size < LARGEST_MAP:
            mode = "reflect" if block.kind == "reflect" else "constant"
            return self.call(F.pad, x, settings=([1, 0] * self.dims, mode), size=size + 1)
        return x

    @emit.register
    def _(self, block: spec_.Slice, x: int, keep: bool) -> int:
        channels = self.values[x].channels
        half = (channels + 1) // 2
        bounds = {"head": (None, half, None), "tail": (-half, None, None), "step": (None, None, 2)}[
            block.kind
        ]
        return self.call(channel_slice, x, settings=bounds, channels=half)

    @emit.register
    def _(self, block: spec_.Grow, x: int, keep: bool) -> int:
        channels, size = self.values[x]
        if keep or self.dims == 0 or 2 * size > LARGEST_MAP:
            return x
        if block.kind == "transposed":
            conv = (nn.ConvTranspose1d, nn.ConvTranspose2d)[self.dims - 1]
            return self.layer(partial(conv, channels, 5, 4, 2, 1), x, channels=5, size=2 * size)
        if block.kind == "pixel_shuffle":
            if self.dims != 2 or channels % 4:
                return x
            return self.call(F.pixel_shuffle, x, settings=(2,), channels=channels // 4, size=2 * size)
        mode = "nearest" if block.kind == "nearest" else ("linear", "bilinear")[self.dims - 1]
        return self.call(F.interpolate, x, settings=(None, 2.0, mode), size=2 * size)

    @emit.register
    def _(self, block: spec_.Split, x: int, keep: bool) -> int:
        channels = self.values[x].channels
        first = min(block.at, channels - 1)
        if first < 1:
            return self.chain(block.body, x, keep)
        parts = self.call(torch.split, x, settings=([first, channels - first], 1))
        a = self.call(operator.getitem, parts, settings=(0,), channels=first)
        b = self.call(operator.getitem, parts, settings=(1,), channels=channels - first)
        return self.concatenate(a, self.chain(block.body, b, keep=True))

    @emit.register
    def _(self, block: spec_.Residual, x: int, keep: bool) -> int:
        channels, size = self.values[x]
        self.fresh.discard(x)
        shortcut = body = x
        if block.down and not keep and self.dims and size > 1:
            conv = (nn.Conv1d, nn.Conv2d)[self.dims - 1]
            make = partial(conv, channels, min(channels + 2, MOST_CHANNELS), 3, 2, 1)
            body = self.layer(make, x, channels=min(channels + 2, MOST_CHANNELS), size=-(-size // 2))
        body = self.chain(block.body, body, keep=True)
        width = self.values[body].channels
        if self.values[body].size != size:
            pad = block.shortcut == "pad"
            small = self.call(every_second_pixel, x, size=-(-size // 2)) if pad else None
            shortcut = self.pointwise(x, width, stride=2) if small is None else small
        missing = width - self.values[shortcut].channels
        if missing > 0 and block.shortcut == "pad":
            pads = [0, 0] * self.dims + [missing // 2, missing - missing // 2]
            shortcut = self.call(F.pad, shortcut, settings=(pads,), channels=width)
        else:
            body = self.fit(body, self.values[shortcut].channels)
        inplace = block.inplace and body in self.fresh and body != shortcut
        return self.call(operator.iadd if inplace else torch.add, body, shortcut)

    @emit.register
    def _(self, block: spec_.Cat, x: int, keep: bool) -> int:
        self.fresh.discard(x)
        return self.concatenate(self.chain(block.left, x, keep=True), self.chain(block.right, x, keep=True))

    @emit.register
    def _(self, block: spec_.Merge, x: int, keep: bool) -> int:
        self.fresh.discard(x)
        left, right = self.chain(block.left, x, keep=True), self.chain(block.right, x, keep=True)
        right = self.fit(right, self.values[left].channels)
        function = stacked_sum if block.how == "stack" else getattr(torch, block.how)
        return self.call(function, left, right)

    @emit.register
    def _(self, block: spec_.Twice, x: int, keep: bool) -> int:
        return self.shared(block.body, x)[-1]

    def head(self, kind: str, hidden: int, x: int) -> tuple[int, ...]:
        """The last layers and the values that go out: logits, a map, or the features and logits."""
        channels, size = self.values[x]
        if kind == "map":
            return (self.pointwise(x, 3),)
        features = channels
        if self.dims and kind in ("pool", "two"):
            flat = self.call(space_mean, x)
        elif self.dims:
            features = channels * size**self.dims
            flat = self._flatten(kind, features, x)
        else:
            flat = x
        if hidden:
            fan_in, features = features, hidden
            flat = self.call(F.relu, self.layer(partial(nn.Linear, fan_in, hidden), flat))
        logits = self.layer(partial(nn.Linear, features, 3), flat)
        return (x, logits) if kind == "two" else (logits,)

    def _flatten(self, kind: str, features: int, x: int) -> int:
        if kind == "view":
            return self.call(torch.reshape, x, settings=((-1, features),))
        if kind == "channels_last":
            return self.call(flat_channels_last, x)
        return self.call(torch.flatten, x, settings=(1,))
