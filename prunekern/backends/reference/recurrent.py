"""Recurrent layers: one matrix product for the inputs of all time steps, then a loop over the state.

Sources: S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of F. Gers et al. (2000);
K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), the reset gate behind the product as
in torch; J. Elman, "Finding Structure in Time" (1990).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunekern.backends.reference.engine import Kernel, Layout
from prunekern.core.program import Step

State = tuple[Tensor, ...]                                     # h, and c of an LSTM; [N, H] each
Cell = Callable[[Tensor, Tensor, State], State]                # of (W_ih x + b, W_hh h + b, state)


def lstm(x: Tensor, h: Tensor, state: State) -> State:
    """Gates in torch's order: input, forget, cell, output."""
    enter, forget, fresh, leave = (x + h).chunk(4, -1)
    c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(fresh)
    return torch.sigmoid(leave) * torch.tanh(c), c


def gru(x: Tensor, h: Tensor, state: State) -> State:
    """Gates in torch's order: reset, update, new."""
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = x.chunk(3, -1), h.chunk(3, -1)
    new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
    update = torch.sigmoid(x_update + h_update)
    return ((1 - update) * new + update * state[0],)


CELLS: dict[str, Cell] = {"lstm": lstm, "gru": gru, "rnn_tanh": lambda x, h, _: (torch.tanh(x + h),),
                          "rnn_relu": lambda x, h, _: (torch.relu(x + h),)}


def recurrent(layout: Layout, step: Step) -> Kernel:
    layout.algorithms[step.name] = "GEMM, loop over time"
    at = step.attributes
    weights = {role: layout.weight(name) for role, name in step.weights.items()}
    reads, binds = [layout.get(slot) for slot in step.inputs], [layout.put(slot) for slot in step.outputs]
    for slot in step.outputs:
        layout.hints[slot.name] = torch.empty(layout.shape(slot), dtype=slot.dtype, device="meta")

    def run() -> None:
        x, *states = (read() for read in reads)
        x = x.unsqueeze(0) if at["cell"] else x.transpose(0, 1) if at["batch_first"] else x         # [T, N, I]
        if at["cell"]:
            states = [state.unsqueeze(0) for state in states]
        y, found = layers(x, states, weights, at["kind"], at["layers"], at["directions"])
        values = [state[0] for state in found] if at["cell"] else \
            [y.transpose(0, 1) if at["batch_first"] else y, *found]
        for bind, value in zip(binds, values, strict=True):
            bind(value)
    return run


def layers(x: Tensor, states: list[Tensor], weights: dict[str, Tensor], kind: str, count: int,
           directions: int) -> tuple[Tensor, State]:
    """x [T, N, I] and states [layers * directions, N, H] (none: zeros) -> y [T, N, directions * H], last states."""
    found: list[State] = []
    for layer in range(count):
        outputs = []
        for suffix in (f"_l{layer}", f"_l{layer}_reverse")[:directions]:
            hidden = weights[f"weight_hh{suffix}"].shape[1]
            state = tuple(each[len(found)] for each in states) or \
                (x.new_zeros(x.shape[1], hidden),) * (2 if kind == "lstm" else 1)
            y, last = direction(x, state, weights, suffix, CELLS[kind])
            outputs.append(y)
            found.append(last)
        x = torch.cat(outputs, -1)
    return x, tuple(torch.stack(each) for each in zip(*found, strict=True))


def direction(x: Tensor, state: State, weights: dict[str, Tensor], suffix: str, cell: Cell) -> tuple[Tensor, State]:
    """One direction of one layer."""
    inward, around = weights[f"weight_ih{suffix}"].t(), weights[f"weight_hh{suffix}"].t()
    bias_in, bias_around = (weights.get(f"{name}{suffix}", x.new_zeros(())) for name in ("bias_ih", "bias_hh"))
    gates = torch.matmul(x, inward) + bias_in                       # of all time steps at once
    outputs = []
    for gate in gates.flip(0) if suffix.endswith("reverse") else gates:
        state = cell(gate, torch.matmul(state[0], around) + bias_around, state)
        outputs.append(state[0])
    y = torch.stack(outputs)
    return (y.flip(0) if suffix.endswith("reverse") else y), state
