"""Recurrent layers and cells: counted exactly; their channels, which return at every time step, stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from prunekern.core.builder import Builder
from prunekern.core.graph import Shape, ShapeOf
from prunekern.core.labels import Tape
from prunekern.core.rule import OpRule, Sample, aten, numel


class Last(nn.Module):
    """A sample's module: the outputs of a recurrent layer without its states."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]  # type: ignore[no-any-return]


class Whole(nn.Module):
    """A sample's module: a recurrent layer from given states (batch first), with all that it returns."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> Tensor:
        given = [state.transpose(0, 1).contiguous() for state in states]
        y, last = self.layer(x, given[0] if len(given) == 1 else tuple(given))
        found = [last] if isinstance(last, Tensor) else last
        return torch.cat([y.flatten(1), *(state.transpose(0, 1).flatten(1) for state in found)], 1)


class Steps(nn.Module):
    """A sample's module: a cell, called twice on one input."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        found = self.cell(x, self.cell(x))
        return found if isinstance(found, Tensor) else torch.cat(found, 1)


def _sample(name: str, build: Callable[[], nn.RNNBase]) -> Sample:
    return Sample(lambda: Last(build()), ((2, 6, 5),), name, prunable=False)


def _cell(name: str, build: Callable[[], nn.RNNCellBase]) -> Sample:
    return Sample(lambda: Steps(build()), ((2, 5),), name, prunable=False)


SUFFIXES = ("", "_reverse")


def roles(layers: int, directions: int, biases: bool) -> list[str]:
    """What a layer's weights are called, in the order in which torch passes them."""
    kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if biases else ()))
    return [f"{kind}_l{layer}{suffix}" for layer in range(layers) for suffix in SUFFIXES[:directions] for kind in kinds]


def is_zero(build: Builder, node: fx.Node) -> bool:
    """Whether a state is the zeros that a module makes for itself."""
    made = str(node.target).removeprefix("aten.").partition(".")[0] in ("zeros", "zeros_like", "new_zeros")
    return made or (build.is_constant(node) and not bool(build.constant(node).any()))


class Recurrent(OpRule):
    """lstm, gru, rnn with any number of layers and directions, padded (``.input``) or packed (``.data``)."""

    matches = aten("lstm", "gru", "rnn_tanh", "rnn_relu")
    samples: ClassVar[tuple[Sample, ...]] = (
        _sample("LSTM", lambda: nn.LSTM(5, 7, batch_first=True)),
        _sample("LSTM with projection, two layers, both directions", lambda: nn.LSTM(
            5, 7, num_layers=2, bidirectional=True, proj_size=3, batch_first=True)),
        _sample("GRU", lambda: nn.GRU(5, 13, bias=False, batch_first=True)),
        _sample("GRU, two layers, both directions", lambda: nn.GRU(
            5, 33, num_layers=2, bidirectional=True, batch_first=True)),
        _sample("RNN", lambda: nn.RNN(5, 1, nonlinearity="relu", batch_first=True)),
        Sample(lambda: Whole(nn.LSTM(5, 18, num_layers=2, batch_first=True)), ((2, 6, 5), (2, 2, 18), (2, 2, 18)),
               "LSTM with states", prunable=False),
        Sample(lambda: Whole(nn.RNN(5, 35, bidirectional=True, batch_first=True)), ((2, 6, 5), (2, 2, 35)),
               "RNN with states", prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        for arg in node.all_input_nodes:
            tape.freeze_planes(node, tape.planes(arg), "its channels return at every time step")

    def _rows(self, node: fx.Node, shape: ShapeOf) -> int:
        """Time steps times batch."""
        return numel(shape(node.args[0])[:-1])  # type: ignore[arg-type]

    def _weights(self, node: fx.Node, shape: ShapeOf) -> list[Shape]:
        packed = str(node.target).endswith(".data")
        return [shape(weight) for weight in node.args[3 if packed else 2]]  # type: ignore[union-attr,arg-type]

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """T * N * (elements of all weight matrices): each step multiplies its input and its state with them.

        fvcore does not count this operator, FlopCounterMode only where it runs as matrix products. Source:
        Hochreiter, Schmidhuber, "Long Short-Term Memory" (1997); Cho et al. (2014) for the GRU; Sak, Senior,
        Beaufays (2014) for the projection.
        """
        matrices = (size for size in self._weights(node, shape) if len(size) == 2)
        return self._rows(node, shape) * sum(numel(size) for size in matrices)

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """About three per gate: adding input and state, the nonlinearity, the gating; and one per bias."""
        weights = self._weights(node, shape)
        gates = sum(size[0] for size in weights if len(size) == 2) // 2
        return self._rows(node, shape) * (3 * gates + sum(size[0] for size in weights if len(size) == 1))

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """fvcore does not know recurrent layers."""
        return 0

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given = build.arguments(node)
        if "input" not in given or (given["train"] and given["dropout"]) or not build.is_float(given["input"]):
            return False
        kind = _kind(node)
        directions, states = 1 + bool(given["bidirectional"]), _states(given["hx"])
        names = roles(given["num_layers"], directions, bool(given["has_biases"]))
        if len(names) != len(given["params"]) or not all(build.is_constant(each) for each in given["params"]):
            return False                                          # a projection, or weights that are computed
        inputs = [given["input"], *([] if all(is_zero(build, state) for state in states) else states)]
        build.several("recurrent", node, inputs, {
            "kind": kind, "layers": given["num_layers"], "directions": directions, "cell": False,
            "batch_first": bool(given["batch_first"])},
            {role: build.weight(each) for role, each in zip(names, given["params"], strict=True)})
        return True


class Cell(Recurrent):
    """lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell: one time step, x [N, I] and states [N, H]."""

    matches = aten("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
    samples: ClassVar[tuple[Sample, ...]] = (
        _cell("LSTM cell", lambda: nn.LSTMCell(5, 7)), _cell("GRU cell", lambda: nn.GRUCell(5, 20)),
        _cell("RNN cell", lambda: nn.RNNCell(5, 3, bias=False, nonlinearity="relu")))

    def _weights(self, node: fx.Node, shape: ShapeOf) -> list[Shape]:
        return [shape(weight) for weight in node.args[2:] if weight is not None]  # type: ignore[arg-type]

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """fvcore sees the linear maps of a cell."""
        return self.macs(node, shape)

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given = build.arguments(node)
        kind = _kind(node)
        weights = [given["w_ih"], given["w_hh"], given.get("b_ih"), given.get("b_hh")]
        weights = [each for each in weights if each is not None]
        if build.rank(given["input"]) != 2 or len(weights) == 3 or not build.is_float(given["input"]) \
                or not all(map(build.is_constant, weights)):
            return False
        states = _states(given["hx"])
        inputs = [given["input"], *([] if all(is_zero(build, state) for state in states) else states)]
        attributes = {"kind": kind, "layers": 1, "directions": 1, "batch_first": False, "cell": True}
        named = {role: build.weight(each) for role, each in zip(roles(1, 1, len(weights) == 4), weights, strict=True)}
        if kind == "lstm":
            build.several("recurrent", node, inputs, attributes, named)
        else:
            build.step("recurrent", node, inputs, attributes, named)
        return True


def _kind(node: fx.Node) -> str:
    """lstm, gru, rnn_tanh or rnn_relu."""
    return str(node.target).removeprefix("aten.").partition(".")[0].removesuffix("_cell")


def _states(given: Any) -> Sequence[fx.Node]:
    return [given] if isinstance(given, fx.Node) else list(given)


RULES: tuple[OpRule, ...] = (Recurrent(), Cell())
