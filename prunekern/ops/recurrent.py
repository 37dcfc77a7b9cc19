"""Recurrent layers and cells: a hidden unit leaves with all its gates. Packing of sequences of unequal lengths.

A unit that is gone is one that nobody hears: not the next layer, nor its own layer a time step later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from prunekern.core.arguments import by_name
from prunekern.core.builder import Builder
from prunekern.core.graph import Shape, ShapeOf, at
from prunekern.core.labels import Tape, spread, varying
from prunekern.core.rule import OpRule, Sample, aten, numel


class Last(nn.Module):
    """A sample's module: the outputs of a recurrent layer without its states, with channels on axis 1."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2))[0].transpose(1, 2)  # type: ignore[no-any-return]


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
    return Sample(lambda: Last(build()), ((2, 5, 6),), name)


def _cell(name: str, build: Callable[[], nn.RNNCellBase]) -> Sample:
    return Sample(lambda: Steps(build()), ((2, 5),), name)


SUFFIXES = ("", "_reverse")


def roles(layers: int, directions: int, biases: bool) -> list[str]:
    """What a layer's weights are called, in the order in which torch passes them."""
    kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if biases else ()))
    return [f"{kind}_l{layer}{suffix}" for layer in range(layers) for suffix in SUFFIXES[:directions] for kind in kinds]


def is_zero(build: Builder, node: fx.Node) -> bool:
    """Whether a state is the zeros that a module makes for itself."""
    made = _name(node) in ("zeros", "zeros_like", "new_zeros")
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
        given = by_name(node)
        directions, weights = 1 + bool(given["bidirectional"]), list(given["params"])
        each = len(weights) // (given["num_layers"] * directions)
        source = _source(node, tape, given["input"] if "input" in given else given["data"])
        units: list[tuple[Tensor, Tensor]] = []                      # of h and of c, by layer and direction
        for first in range(0, len(weights), each):
            units.append(_direction(node, tape, source, weights[first:first + each]))
            if len(units) % directions == 0:
                source = torch.cat([hidden for hidden, _ in units[-directions:]])
        states = _states(given["hx"])
        tables = [torch.stack(each) for each in zip(*units, strict=True)][:len(states)]
        for table, state in zip(tables, states, strict=True):
            _begin(node, tape, state, table)
        if _is_projected(node):
            _outnumber(node, tape, *tables)
        else:
            tape.balanced += tables[:1]          # one tensor holds the states of all layers: as many units in each
        # Nobody hears the rows of a unit that is gone; its columns are what has to count as zeros.
        tape.masked.setdefault(node, []).extend(weight for weight in weights if len(tape.shape(weight)) == 2)
        y, *ends = at(tape.graph.dims[node.name], tape.graph.batch)
        last = [table if _is_read(node, i) else table[:1] for i, table in enumerate(tables, 1)]
        tape.give_list(node, [[spread(source, len(y) - 1, y)], *(     # type: ignore[arg-type]
            [table.unsqueeze(1).expand(shape)] for table, shape in zip(last, ends, strict=True))])

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        inward, around, *_ = self._weights(node, shape)
        sizes = {"input_size": inward[1], "hidden_size": around[0] // GATES[_kind(node)]}
        return {**sizes, "proj_size": around[1]} if _is_projected(node) else sizes

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

    def label(self, node: fx.Node, tape: Tape) -> None:
        given = by_name(node)
        weights = [given.get(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        units, _ = _direction(node, tape, _source(node, tape, given["input"]), [w for w in weights if w is not None])
        states = _states(given["hx"])
        for number, state in enumerate(states):
            found, rest = (tape.along(node, tape.planes(state), 1) if number else     # nobody but its unit hears a c
                           tape.consume(node, state, 1))
            tape.freeze_planes(node, rest)
            if found is not None:
                tape.unify(found, units)
            elif len(units) > 1:
                tape.freeze(node, units, OUTSIDE)
        planes = (spread(units, 1, tape.shape(states[0])),)
        if len(states) == 1:
            tape.give(node, planes)
        else:
            tape.give_list(node, [planes, planes])

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


OUTSIDE = "the state that it begins with comes from outside"
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _is_projected(node: fx.Node) -> bool:
    """Whether an LSTM puts out a projection of its units."""
    given = by_name(node)
    if "params" not in given:
        return False
    directions = given["num_layers"] * (1 + bool(given["bidirectional"]))
    return bool(len(given["params"]) > directions * (4 if given["has_biases"] else 2))


def _source(node: fx.Node, tape: Tape, x: fx.Node) -> Tensor | None:
    """The channels that are read; time steps and sequences stay."""
    source, rest = tape.consume(node, x, -1)
    tape.freeze_planes(node, rest, "its time steps are mixed by a recurrent layer")
    return source


def _direction(node: fx.Node, tape: Tape, source: Tensor | None, weights: Sequence[fx.Node]) -> tuple[Tensor, Tensor]:
    """One direction of one layer, or a cell: labels of what it puts out [P] and of its units [H].

    weights: weight_ih [G * H, I] and weight_hh [G * H, P]; perhaps biases [G * H]; perhaps a projection [P, H], without
    which P is H.
    """
    inward, around, *rest = weights
    projection = next((weight for weight in rest if len(tape.shape(weight)) == 2), None)
    hidden = units = tape.fresh(tape.shape(around if projection is None else projection)[1])
    gates = units.repeat(tape.shape(around)[0] // len(units))
    for weight in (inward, around):
        tape.tie(node, gates, tape.produce(node, weight, 0))
    for bias in rest:
        if bias is not projection:
            tape.tie(node, gates, tape.axis(node, bias, 0))
    if projection is not None:
        hidden = tape.fresh(tape.shape(projection)[0])
        tape.tie(node, units, tape.read(node, projection, 1))
        tape.tie(node, hidden, tape.produce(node, projection, 0))
    tape.tie(node, source, tape.read(node, inward, 1))
    tape.tie(node, hidden, tape.read(node, around, 1))
    return hidden, units


def _outnumber(node: fx.Node, tape: Tape, outputs: Tensor, units: Tensor) -> None:
    """Keep more units [layers * directions, H] than outputs [layers * directions, P] of a projection, which torch knows
    by these sizes. As many of the first P units stay as outputs do, and one of the others."""
    count = outputs.shape[1]
    same = _is_read(node, 1)                     # all rows of the outputs run together
    tape.balanced += [torch.cat((outputs[:1] if same else outputs, units[:, :count])), units[:, count:]]
    tape.freeze(node, units[:, -1])


def _begin(node: fx.Node, tape: Tape, state: fx.Node, table: Tensor) -> None:
    """Units [layers * directions, H] and the state [layers * directions, N, H] that they begin with: one axis for all,
    so that the same ones of each stay where it matters which."""
    found = False
    for plane in tape.planes(state):
        if 2 not in varying(plane):
            tape.freeze(node, plane)                              # layers, sequences
        else:
            found = True
            tape.unify(plane, table[:1] if _is_uniform(state) else table.unsqueeze(1))
    if not found and table.shape[1] > 1:
        tape.freeze(node, table, OUTSIDE)


MADE = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
KEPT = ("index_select", "expand", "to", "_to_copy", "clone", "contiguous")


def _is_uniform(state: fx.Node) -> bool:
    """Whether a state is made of one value, so that it does not matter which units go, but how many."""
    while _name(state) in KEPT:
        state = state.all_input_nodes[0]
    return _name(state) in MADE


def _is_read(node: fx.Node, item: int) -> bool:
    """Whether anybody looks at one of the results."""
    return any(user.args[1] == item and user.users for user in node.users)


def _name(node: fx.Node) -> str:
    """The bare name of an operator."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _kind(node: fx.Node) -> str:
    """lstm, gru, rnn_tanh or rnn_relu."""
    return _name(node).removesuffix("_cell")


def _states(given: Any) -> Sequence[fx.Node]:
    return [given] if isinstance(given, fx.Node) else list(given)


class Packing(OpRule):
    """_pack_padded_sequence and _pad_packed_sequence: sequences of unequal lengths as one list of time steps
    [T, N, ...] <-> [all steps, ...]; their channels pass."""

    matches = aten("_pack_padded_sequence", "_pad_packed_sequence")

    def label(self, node: fx.Node, tape: Tape) -> None:
        steps = 2 if "_pack_padded" in _name(node) else 1                 # axes in front of the channels
        shape = at(tape.graph.dims[node.name], tape.graph.batch)[0]
        passed = []
        for plane in tape.planes(node.args[0]):
            if min(varying(plane)) < steps:
                tape.freeze(node, plane, "its time steps are packed")
            else:
                passed.append(plane[(0,) * steps].expand(shape))
        tape.give_list(node, [passed, []])


RULES: tuple[OpRule, ...] = (Recurrent(), Cell(), Packing())
