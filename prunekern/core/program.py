"""A Program: a traced network as Steps that say *what* is computed. Layout, halos, packing and the choice of
algorithm belong to the backend that places it.

Operators that every backend implements (slots hold logical shapes, channels on axis 1 of a convolution):

| op               | attributes                                                    | weights                     |
|------------------|---------------------------------------------------------------|-----------------------------|
| `conv`           | kernel, stride, padding [[low, high]...], dilation, groups    | weight [O, I/g, k...]       |
| `conv_transpose` | the same, output_padding                                      | weight [I, O/g, k...]       |
| `linear`         |                                                               | weight [O, I]               |
| `matmul`         |                                                               |                             |
| `attention`      | causal, scale (None: 1/sqrt(E)); inputs q, k, v, mask (optional; bool or added). Fewer heads of k |
|                  | and v than of q are shared by as many heads of q in a row                                    |
| `scale`          | axis: y = x * scale + shift along it                          | scale, shift: [n] or [1]    |
| `activation`     | (in the epilogue)                                             |                             |
| `binary`         | kind: add, sub, mul, div, maximum, minimum (broadcasting)     |                             |
| `pool`           | kind: max, avg; kernel, stride, padding, dilation, ceil, count_include_pad, divisor |       |
| `adaptive_pool`  | kind: avg, max; size                                          |                             |
| `reduce`         | kind: mean, sum, amax, amin; axes, keepdim                    |                             |
| `pad`            | amounts [[low, high]...] per axis, mode, value                |                             |
| `resize`         | mode, size, scales (None: from the sizes), align_corners      |                             |
| `cat`            | axis                                                          |                             |
| `move`           | kind: reshape, permute (axes), slice (axis, start, step), expand |                          |
| `softmax`        | axis, log                                                     |                             |
| `layer_norm`     | axes (how many, from the last), eps; of (optional)            | weight, bias (optional)     |
| `rms_norm`       | axes, eps                                                     | weight (optional)           |
| `group_norm`     | groups, eps; of (optional)                                    | weight, bias (optional)     |
| `recurrent`      | kind: lstm, gru, rnn_tanh, rnn_relu; layers, directions,      | weight_ih_l0, weight_hh_l0, |
|                  | batch_first. cell: one time step, and no axis of time. Inputs | bias_ih_l0, bias_hh_l0; for |
|                  | x, h, c (LSTM), or x alone where states are zero; outputs y   | more layers _l1, ..., for   |
|                  | (not of a cell), h, c (LSTM); shapes as in torch.nn           | the other way _l0_reverse   |
| `embedding`      |                                                               | weight [V, D]               |
| `prelu`          | axis                                                          | slope [n]                   |
| `constant`       | the slot holds a weight                                       | value                       |
| `aten`           | target, args, kwargs: any other operator, by name             | as the arguments name them  |

A norm with ``of`` counts so many values (a group norm: channels), of which those that are not there are zeros
(``core/counted.py``). The first three may carry any Epilogue; `matmul`, `scale`, `binary` and `activation` an
activation only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunekern.core.graph import Dim, Shape
from prunekern.errors import LoweringError

GEMMS = ("conv", "conv_transpose", "linear")
ACTIVATED = (*GEMMS, "matmul", "scale", "binary", "activation")
OPS = frozenset((*ACTIVATED, "pool", "adaptive_pool", "reduce", "pad", "resize", "cat", "move", "softmax", "layer_norm",
                 "rms_norm", "group_norm", "attention", "recurrent", "embedding", "prelu", "constant", "aten"))


@dataclass(frozen=True, slots=True)
class Slot:
    """One value that flows between Steps. ``shape`` is logical (as torch has it) and affine in the batch."""

    name: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype

    def at(self, batch: int) -> Shape:
        return tuple(dim.at(batch) for dim in self.shape)

    def __str__(self) -> str:
        return f"{self.name}[{'x'.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function by name; the meaning of the constants is in ``core/activations.py``."""

    kind: str
    constants: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.kind + (f"({', '.join(f'{c:g}' for c in self.constants)})" if self.constants else "")


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What is done to a Step's output while it is at hand.

    ``activation(y + bias + residual)``, or ``activation(y + bias) + residual`` where ``residual_last``.
    bias: name of a weight [channels], along the op's channel axis (the last one of linear, 1 of a convolution).
    """

    bias: str | None = None
    activation: Activation | None = None
    residual: Slot | None = None
    residual_last: bool = False

    def __bool__(self) -> bool:
        return self != Epilogue()

    def __str__(self) -> str:
        bias, act = "bias" if self.bias else "", str(self.activation or "")
        add = f"add {self.residual.name}" if self.residual else ""
        return " + ".join(filter(None, (bias, act, add) if self.residual_last else (bias, add, act)))


NO_EPILOGUE, NO_MACS = Epilogue(), Dim(0, 0)


@dataclass(frozen=True)
class Step:
    """One operation of a Program.

    name:       unique; the traced node it started from.
    attributes: JSON-able geometry; the table at the top of this file.
    weights:    role -> name in ``Program.weights``.
    macs:       multiply-accumulates, affine in the batch.
    source:     path of the module in the original model; ``place`` is what messages say.
    """

    op: str
    name: str
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    epilogue: Epilogue = NO_EPILOGUE
    macs: Dim = NO_MACS
    source: str = ""
    place: str = ""

    @property
    def output(self) -> Slot:
        return self.outputs[0]

    @property
    def reads(self) -> tuple[Slot, ...]:
        """Every slot the Step reads, the residual included."""
        residual = self.epilogue.residual
        return self.inputs if residual is None else (*self.inputs, residual)

    def weight_names(self) -> Iterator[str]:
        yield from self.weights.values()
        if self.epilogue.bias is not None:
            yield self.epilogue.bias

    def with_epilogue(self, **changes: Any) -> Step:
        return replace(self, epilogue=replace(self.epilogue, **changes))

    def __str__(self) -> str:
        tail = f"  [{self.epilogue}]" if self.epilogue else ""
        return (f"{self.op:<14} {', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))} "
                f"{dict(self.attributes) or ''}{tail}")


@dataclass(frozen=True)
class Program:
    """A network as Steps in order, backend-neutral.

    inputs:  one per leaf of the call: a Slot, or the constant (None, number, string) it was traced with.
    outputs: one per leaf of the result: a Slot, a Dim (a size) or a constant.
    in_spec, out_spec: pytree structure of ``(args, kwargs)`` and of the result.
    parameters: names of the forward's positional parameters, to accept arguments by keyword or position.
    kept:    slot -> (axis, the indices of the traced tensor that are left along it); absent where all are.
    batch:   the one batch size the Program holds for; None where it is free.
    """

    steps: tuple[Step, ...]
    weights: Mapping[str, Tensor]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    in_spec: Any
    out_spec: Any
    parameters: tuple[str, ...] = ()
    kept: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    batch: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def input_slots(self) -> tuple[Slot, ...]:
        return tuple(item for item in self.inputs if isinstance(item, Slot))

    @property
    def output_slots(self) -> tuple[Slot, ...]:
        return tuple(item for item in self.outputs if isinstance(item, Slot))

    def slots(self) -> dict[str, Slot]:
        """Every slot by name, in the order in which they come to be."""
        return {slot.name: slot for slot in (*self.input_slots, *(s for step in self.steps for s in step.outputs))}

    def producers(self) -> dict[str, Step]:
        return {slot.name: step for step in self.steps for slot in step.outputs}

    def consumers(self) -> dict[str, list[Step]]:
        """Slot name -> the Steps that read it (once each); a slot that leaves the Program is not told here."""
        found: dict[str, list[Step]] = {name: [] for name in self.slots()}
        for step in self.steps:
            for name in dict.fromkeys(slot.name for slot in step.reads):
                found[name].append(step)
        return found

    def macs(self, batch: int) -> int:
        return sum(step.macs.at(batch) for step in self.steps)

    def with_steps(self, steps: Iterable[Step], weights: Mapping[str, Tensor] | None = None, **changes: Any) -> Program:
        """Another Program of these Steps, with the weights they name and no others; checked."""
        steps = tuple(steps)
        pool = self.weights if weights is None else weights
        used = {name: pool[name] for step in steps for name in step.weight_names() if name in pool}
        program = replace(self, steps=steps, weights=used, **changes)
        program.check()
        return program

    def owned(self) -> Program:
        """With weights that share no memory with anybody's."""
        return replace(self, weights={name: tensor.detach().clone(memory_format=torch.contiguous_format)
                                      for name, tensor in self.weights.items()})

    def check(self) -> None:
        """Every Step reads what is there, and writes what nobody has written. Raises LoweringError naming it."""
        known = {slot.name: slot for slot in self.input_slots}
        for step in self.steps:
            if step.op not in OPS:
                raise _broken(step, f"no such op {step.op!r}")
            if step.epilogue and step.op not in GEMMS and (
                    step.op not in ACTIVATED or step.epilogue != Epilogue(activation=step.epilogue.activation)):
                raise _broken(step, f"carries an epilogue ({step.epilogue}) that {step.op} cannot have")
            for slot in step.reads:
                if known.get(slot.name) != slot:
                    raise _broken(step, f"reads {slot}, which is {known.get(slot.name, 'not there yet')}")
            for slot in step.outputs:
                if slot.name in known:
                    raise _broken(step, f"writes {slot.name}, which is there already")
                known[slot.name] = slot
            for name in step.weight_names():
                if name not in self.weights:
                    raise _broken(step, f"names the weight {name!r}, which is not there")
        for slot in self.output_slots:
            if known.get(slot.name) != slot:
                raise LoweringError(f"the output {slot} is not computed by any step; this is a bug of a pass.")

    def __str__(self) -> str:
        return "\n".join((f"{len(self.steps)} steps, {len(self.weights)} weights, batch {self.batch or 'free'}",
                          *(f"  {step}" for step in self.steps)))


def _broken(step: Step, what: str) -> LoweringError:
    return LoweringError(f"step {step.name!r} ({step.op}, from {step.place or step.source!r}) {what}; "
                         "the Program is inconsistent: a pass or a file made it so.")
