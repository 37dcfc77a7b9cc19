"""Recurrent layers: counted exactly; their channels, which return at every time step, stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, fx, nn

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


def _sample(name: str, build: Callable[[], nn.RNNBase]) -> Sample:
    return Sample(lambda: Last(build()), ((2, 6, 5),), name, prunable=False)


class Recurrent(OpRule):
    """lstm, gru, rnn with any number of layers and directions, padded (``.input``) or packed (``.data``)."""

    matches = aten("lstm", "gru", "rnn_tanh", "rnn_relu")
    samples: ClassVar[tuple[Sample, ...]] = (
        _sample("LSTM", lambda: nn.LSTM(5, 7, batch_first=True)),
        _sample("LSTM with projection, two layers, both directions", lambda: nn.LSTM(
            5, 7, num_layers=2, bidirectional=True, proj_size=3, batch_first=True)),
        _sample("GRU", lambda: nn.GRU(5, 13, bias=False, batch_first=True)),
        _sample("RNN", lambda: nn.RNN(5, 1, nonlinearity="relu", batch_first=True)),
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


RULES: tuple[OpRule, ...] = (Recurrent(),)
