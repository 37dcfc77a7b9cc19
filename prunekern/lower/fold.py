"""Scales and shifts disappear into the weights of the GEMMs around them; all arithmetic in fp64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from prunekern.core.program import GEMMS, Program, Slot, Step


class Weights(dict[str, Tensor]):
    """Weights of a Program being rewritten: new ones get names of their own, shared ones stay as they are."""

    def add(self, name: str, tensor: Tensor) -> str:
        fresh, count = name, 1
        while fresh in self:
            fresh, count = f"{name}.{count}", count + 1
        self[fresh] = tensor.contiguous()
        return fresh


def readers(program: Program) -> Counter[str]:
    """How often each slot is read; leaving the Program counts too."""
    count = Counter(slot.name for step in program.steps for slot in step.reads)
    count.update(slot.name for slot in program.output_slots)
    return count


def fold_after(program: Program) -> Program:
    """A scale that alone reads a GEMM (batch norm behind a convolution), or another scale, becomes part of it.

    W'[o] = s[o] W[o], b' = s b + t. Exact up to rounding.
    """
    weights, count = Weights(program.weights), readers(program)
    steps: list[Step] = []
    made: dict[str, int] = {}
    for step in program.steps:
        index = made.get(step.inputs[0].name) if step.op == "scale" and not step.epilogue else None
        before = None if index is None or count[step.inputs[0].name] > 1 else steps[index]
        merged = None if before is None else _merge(before, step, weights)
        if merged is None or index is None:
            made.update({slot.name: len(steps) for slot in step.outputs})
            steps.append(step)
        else:
            steps[index] = merged
            made[step.output.name] = index
    return program.with_steps(steps, weights)


def _merge(before: Step, scale: Step, weights: Weights) -> Step | None:
    if before.epilogue.activation is not None or before.epilogue.residual is not None:
        return None
    gain, shift = (weights[scale.weights[role]].double() for role in ("scale", "shift"))
    axis = scale.attributes["axis"]
    if before.op == "scale" and not before.epilogue:
        return _chain(before, scale, gain, shift, weights)
    if before.op not in GEMMS or (gain.numel() > 1 and axis != channel_axis(before)):
        return None
    weight, bias = weights[before.weights["weight"]], before.epilogue.bias
    channels = before.output.shape[channel_axis(before)].offset
    gain, shift = gain.expand(channels), shift.expand(channels)
    moved = shift if bias is None else weights[bias].double() * gain + shift
    name = weights.add(f"{before.name}.weight", (weight.double() * per_output(before, gain, weight)).to(weight.dtype))
    return replace(before, outputs=scale.outputs, weights={**before.weights, "weight": name},
                   epilogue=replace(before.epilogue, bias=weights.add(f"{before.name}.bias", moved.to(weight.dtype))))


def _chain(before: Step, scale: Step, gain: Tensor, shift: Tensor, weights: Weights) -> Step | None:
    first, offset = (weights[before.weights[role]] for role in ("scale", "shift"))
    axes = {step.attributes["axis"] for step, vector in ((before, first), (scale, gain)) if vector.numel() > 1}
    if len(axes) > 1:
        return None
    axis = next(iter(axes), scale.attributes["axis"])
    new = {"scale": first.double() * gain, "shift": offset.double() * gain + shift}
    new["scale"], new["shift"] = torch.broadcast_tensors(new["scale"], new["shift"])
    names = {role: weights.add(f"{scale.name}.{role}", tensor.to(first.dtype)) for role, tensor in new.items()}
    return replace(before, outputs=scale.outputs, attributes={"axis": axis}, weights=names)


def channel_axis(step: Step) -> int:
    """The axis of a GEMM's output channels."""
    return len(step.output.shape) - 1 if step.op == "linear" else 1


def per_output(step: Step, vector: Tensor, weight: Tensor) -> Tensor:
    """A vector over output channels, shaped to broadcast against the step's weight."""
    if step.op != "conv_transpose":
        return vector.view(-1, *[1] * (weight.dim() - 1))
    groups = step.attributes["groups"]
    table = vector.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return table.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def per_input(step: Step, vector: Tensor, weight: Tensor) -> Tensor:
    """A vector over input channels, shaped to broadcast against the step's weight."""
    tail = [1] * (weight.dim() - 2)
    if step.op == "linear":
        return vector
    if step.op == "conv_transpose":
        return vector.view(-1, 1, *tail)
    groups = step.attributes["groups"]
    table = vector.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return table.reshape(weight.shape[0], -1, *tail)


def is_padded(step: Step) -> bool:
    """Whether zeros take part in a convolution's sums (for a transposed one, whether borders have fewer terms)."""
    return step.op == "conv_transpose" or any(p for pair in step.attributes.get("padding", ()) for p in pair)


def fold_before(program: Program) -> Program:
    """A scale whose only reader is a GEMM becomes part of it: W' = W s, b' = b + W t.

    A shift cannot pass zero padding, so it stays in front of a padded convolution.
    """
    weights, count = Weights(program.weights), readers(program)
    scales = {step.output.name: step for step in program.steps if step.op == "scale" and not step.epilogue}
    gone: set[str] = set()
    steps: list[Step] = []
    for step in program.steps:
        scale = scales.get(step.inputs[0].name) if step.op in GEMMS else None
        if scale is not None and count[scale.output.name] == 1 and _passes(scale, step, weights):
            step = _absorb(scale, step, weights)
            gone.add(scale.name)
        steps.append(step)
    return program.with_steps((step for step in steps if step.name not in gone), weights)


def _passes(scale: Step, step: Step, weights: Weights) -> bool:
    wanted = len(scale.output.shape) - 1 if step.op == "linear" else 1
    along = weights[scale.weights["scale"]].numel() == 1 or scale.attributes["axis"] == wanted
    return along and not (is_padded(step) and bool(weights[scale.weights["shift"]].any()))


def _absorb(scale: Step, step: Step, weights: Weights) -> Step:
    weight = weights[step.weights["weight"]]
    channels = step.inputs[0].shape[len(step.inputs[0].shape) - 1 if step.op == "linear" else 1].offset
    gain, shift = (weights[scale.weights[role]].double().expand(channels) for role in ("scale", "shift"))
    wide = weight.double()
    bias = step.epilogue.bias
    if bool(shift.any()):
        bias = weights.add(f"{step.name}.bias", _shifted_bias(step, wide, shift, bias, weights).to(weight.dtype))
    name = weights.add(f"{step.name}.weight", (wide * per_input(step, gain, weight)).to(weight.dtype))
    return replace(step, inputs=scale.inputs, weights={**step.weights, "weight": name},
                   epilogue=replace(step.epilogue, bias=bias))


def _shifted_bias(step: Step, wide: Tensor, shift: Tensor, bias: str | None, weights: Weights) -> Tensor:
    """The bias after a constant per input channel has gone into it (conv without padding, linear)."""
    moved = (wide * per_input(step, shift, wide)).flatten(1).sum(1)
    return moved if bias is None else moved + weights[bias].double()


def swap_slots(step: Step, new: dict[str, Slot]) -> Step:
    """The step on other slots of the same names."""
    residual = step.epilogue.residual
    changed = replace(step, inputs=tuple(new.get(s.name, s) for s in step.inputs),
                      outputs=tuple(new.get(s.name, s) for s in step.outputs))
    return changed if residual is None else changed.with_epilogue(residual=new.get(residual.name, residual))
