"""Random small networks that are valid by construction, for property-based tests.

A `Spec` is a list of blocks whose settings do not depend on each other: what does not fit where a block
stands (a group count, a stride inside a branch) is adapted or left out when the network is built. So any
part of a spec can be deleted, and hypothesis shrinks a failure to the few blocks that matter. The failing
example prints as `build(Spec(...))`, which can be pasted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.weights import calibrate_, randomise_

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from tests.interpreter import Call


def _one_of(*options: Any) -> Any:
    """A setting; the simplest value comes first, a likelier one is named more often."""
    return field(default=options[0], metadata={"options": options})


def _blocks(low: int, high: int) -> Any:
    """A tuple of `low` to `high` nested blocks."""
    return field(default=(), metadata={"blocks": (low, high)})


_WIDTHS = (4, 1, 3, 6, 7, 8, 12, 13)
_ACTIVATIONS = (
    "none", "relu", "relu", "relu_", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", "elu", "hardswish",
    "softplus", "prelu",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One step of a spec. Width-changing blocks say so by themselves; all others keep the channels."""


@dataclass(frozen=True)
class Conv(Block):
    """A convolution (a linear layer in an MLP), then a norm, then an activation."""

    width: int = _one_of(*_WIDTHS)
    kernel: int = _one_of(1, 3, 3, 2)
    stride: int = _one_of(1, 1, 1, 2)
    groups: str = _one_of("1", "1", "1", "2", "3", "depthwise")
    padding: str = _one_of("half", "half", "same", "none")
    bias: bool = _one_of(True, False)
    norm: str = _one_of("none", "batch", "batch", "batch", "group")
    activation: str = _one_of(*_ACTIVATIONS)


@dataclass(frozen=True)
class Activate(Block):
    """A batch norm or none, then an activation: the pre-activation order."""

    norm: str = _one_of("none", "batch")
    activation: str = _one_of(*_ACTIVATIONS)


@dataclass(frozen=True)
class Pool(Block):
    """Max or average pooling; keeps the map's size inside a branch."""

    kind: str = _one_of("max", "average", "average_ceil")
    kernel: int = _one_of(2, 3)


@dataclass(frozen=True)
class Gate(Block):
    """The activation is multiplied by something made from itself, by a buffer or by a parameter."""

    kind: str = _one_of("buffer", "parameter", "squeeze", "spatial", "glu", "halves", "mean")


@dataclass(frozen=True)
class Shuffle(Block):
    """ShuffleNet's channel shuffle, its sizes literal or taken from the tensor."""

    groups: int = _one_of(2, 3)
    literal: bool = _one_of(False, True)


@dataclass(frozen=True)
class Move(Block):
    """Data movement that keeps every channel, or makes two of each one."""

    kind: str = _one_of("roll", "flip", "permute", "pad", "reflect", "repeat", "dropout", "reverse")


@dataclass(frozen=True)
class Slice(Block):
    """Some of the channels, by literal bounds."""

    kind: str = _one_of("head", "tail", "step")


@dataclass(frozen=True)
class Grow(Block):
    """A map twice as large."""

    kind: str = _one_of("nearest", "linear", "transposed", "pixel_shuffle")


@dataclass(frozen=True)
class Recur(Block):
    """A recurrent layer along the positions of a map, row by row; a cell, called twice, where there are none."""

    kind: str = _one_of("gru", "lstm", "rnn")
    width: int = _one_of(4, 3, 5, 6, 7)
    layers: int = _one_of(1, 1, 2)
    both: bool = _one_of(False, True)


@dataclass(frozen=True)
class Attend(Block):
    """Attention over the positions of a map: ``times`` query heads for each of ``keys`` key heads; residual or not."""

    keys: int = _one_of(2, 3, 1)
    times: int = _one_of(1, 1, 2, 3)
    width: int = _one_of(3, 2, 4)
    spelling: str = _one_of("interleaved", "flagged", "expanded", "equation", "batch", "linear")
    packed: bool = _one_of(False, True)
    add: bool = _one_of(True, False)


@dataclass(frozen=True)
class Mix(Block):
    """An MLP over the positions of a map, as in MLP-Mixer."""

    hidden: int = _one_of(5, 3, 8)


@dataclass(frozen=True)
class Rows(Block):
    """Two axes of channels by a view: a factor per row or column, shares, a layer for every row, the rows' sum."""

    rows: int = _one_of(2, 3)
    kind: str = _one_of("rows", "columns", "shares", "shared", "sum")
    width: int = _one_of(3, 2, 5)


@dataclass(frozen=True)
class Experts(Block):
    """A mixture of experts with stacked weights."""

    experts: int = _one_of(3, 2)
    hidden: int = _one_of(4, 7)


@dataclass(frozen=True)
class Split(Block):
    """The channels are split at a literal, the blocks are applied to one part, all is concatenated."""

    at: int = _one_of(2, 1, 3)
    body: tuple[Block, ...] = _blocks(1, 2)


@dataclass(frozen=True)
class Residual(Block):
    """x + body(x); where widths differ the body is projected or x is padded (option A)."""

    shortcut: str = _one_of("project", "pad")
    down: bool = _one_of(False, False, True)
    inplace: bool = _one_of(False, True)
    body: tuple[Block, ...] = _blocks(1, 2)


@dataclass(frozen=True)
class Cat(Block):
    """Two branches side by side; an empty one passes its input on."""

    left: tuple[Block, ...] = _blocks(0, 2)
    right: tuple[Block, ...] = _blocks(1, 2)


@dataclass(frozen=True)
class Merge(Block):
    """Two branches of the same width, combined element by element."""

    how: str = _one_of("add", "sub", "mul", "maximum", "stack")
    left: tuple[Block, ...] = _blocks(0, 2)
    right: tuple[Block, ...] = _blocks(1, 2)


@dataclass(frozen=True)
class Twice(Block):
    """The same modules called on their own output."""

    body: tuple[Block, ...] = _blocks(1, 2)


LEAVES: tuple[type[Block], ...] = (Conv, Conv, Conv, Conv, Activate, Pool, Recur, Gate, Gate, Shuffle, Move, Slice,
                                   Grow, Attend, Attend, Mix, Rows, Experts)
NESTED: tuple[type[Block], ...] = (Split, Residual, Residual, Cat, Cat, Merge, Twice)


@dataclass(frozen=True)
class Spec:
    """A network: `dims` spatial axes of `size` (0: an MLP on `[B, channels]`), blocks, a head.

    With two inputs the first block is shared by both (a siamese network), or both are concatenated.
    """

    dims: int = _one_of(2, 2, 2, 2, 1, 0)
    channels: int = _one_of(3, 1, 4, 6)
    size: int = _one_of(6, 5, 8, 9, 12)
    inputs: str = _one_of("one", "one", "one", "one", "siamese", "cat")
    head: str = _one_of("pool", "flatten", "view", "channels_last", "map", "two")
    hidden: int = _one_of(0, 5, 9)
    blocks: tuple[Block, ...] = _blocks(1, 6)


class Network(nn.Module):
    """Interprets the calls that a spec was turned into. `calls[i]` gives value `i + number of inputs`."""

    def __init__(
        self, layers: dict[str, nn.Module], calls: tuple[Call, ...], outputs: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.calls = calls
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: list[Any] = list(inputs)
        for call in self.calls:
            target = self.layers[call.target] if isinstance(call.target, str) else call.target
            values.append(target(*(values[i] for i in call.inputs), *call.settings))
        outputs = tuple(values[i] for i in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


class Case(NamedTuple):
    """A network in eval mode, its inputs (batch first), and the spec that it came from."""

    model: nn.Module
    args: tuple[Tensor, ...]
    spec: Spec

    def __repr__(self) -> str:
        return f"build({self.spec!r})"


def build(spec: Spec, seed: int = 0, batch: int = 2) -> Case:
    """The network of a spec, all weights and statistics drawn from `seed`; the global state is left alone.

    Weights under which the samples' outputs hardly differ (a lone channel behind a ReLU) are drawn again, a
    few times: a test on a constant network shows nothing.
    """
    from tests.interpreter import compile_spec

    layers, calls, outputs = compile_spec(spec)
    shape = (spec.channels, *[spec.size] * spec.dims)
    count = 1 if spec.inputs == "one" else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network(layers, calls, outputs).eval()
        for _ in range(5):
            calibrate_(randomise_(model), *(torch.randn(8, *shape) for _ in range(count)))
            args = tuple(torch.randn(batch, *shape) for _ in range(count))
            if batch == 1 or _lively(model, args):
                break
        return Case(model, args, spec)


@torch.no_grad()
def _lively(model: nn.Module, args: tuple[Tensor, ...]) -> bool:
    outputs = model(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return all(bool(out.std(0).max() > 1e-2 * out.abs().max()) for out in outputs)


def random_spec(seed: int) -> Spec:
    """A spec drawn from the same table as `networks()`, without hypothesis."""
    return _draw(Spec, random.Random(seed), depth=2)


def random_network(seed: int, batch: int = 2) -> Case:
    """`build(random_spec(seed), seed)`: about three milliseconds."""
    return build(random_spec(seed), seed, batch)


def networks(batch: int = 2) -> SearchStrategy[Case]:
    """Hypothesis strategy: `@given(networks())` gets a `Case`, i.e. `model, args, spec`."""
    return _strategy(Spec, 2).map(lambda spec: build(spec, batch=batch))


def _draw(kind: type[Any], rng: random.Random, depth: int) -> Any:
    settings: dict[str, Any] = {}
    for name, meta in _settings(kind):
        if "options" in meta:
            settings[name] = rng.choice(meta["options"])
        else:
            kinds = LEAVES + NESTED if depth else LEAVES
            count = rng.randint(*meta["blocks"])
            settings[name] = tuple(_draw(rng.choice(kinds), rng, max(depth - 1, 0)) for _ in range(count))
    return kind(**settings)


@cache
def _strategy(kind: type[Any], depth: int) -> SearchStrategy[Any]:
    from hypothesis import strategies as st

    settings: dict[str, SearchStrategy[Any]] = {}
    for name, meta in _settings(kind):
        if "options" in meta:
            settings[name] = st.sampled_from(meta["options"])
        else:
            low, high = meta["blocks"]
            kinds = LEAVES + NESTED if depth else LEAVES
            choices = st.one_of([_strategy(k, max(depth - 1, 0)) for k in kinds])
            settings[name] = st.lists(choices, min_size=low, max_size=high).map(tuple)
    return st.builds(kind, **settings)


def _settings(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    return ((f.name, f.metadata) for f in fields(kind))
