"""Output channels that nobody reads, or that are constant, are not computed. Exact; no tolerance is involved.

A channel of a GEMM is *unread* where every weight that meets it is zero, and *constant* where its own weights
are all zero: it is ``activation(bias)`` everywhere, and its consumers' biases take it in. Into a convolution
with zero padding only the constant 0 may go (at the border the sum has fewer terms), so any other stays.
Between the GEMM and its consumers may lie whatever keeps channels apart; anything else ends the search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunekern.core.activations import apply
from prunekern.core.graph import Dim
from prunekern.core.program import GEMMS, NO_EPILOGUE, Epilogue, Program, Slot, Step
from prunekern.lower.fold import Weights, channel_axis, is_padded, per_input, swap_slots


@dataclass(frozen=True)
class Lane:
    """The channels of one GEMM as they are found along an axis of a slot further down.

    owner:    the GEMM's channel behind every index.
    constant: which indices hold one value at all positions and for all inputs; ``value``: that value, in fp64.
    """

    slot: Slot
    axis: int
    owner: Tensor
    constant: Tensor
    value: Tensor


@dataclass(frozen=True)
class Use:
    """A step that reads a Lane; ``lane`` as it reads it, ``after`` as it passes it on (None: it ends here)."""

    step: Step
    lane: Lane
    after: Lane | None


def drop_dead_channels(program: Program) -> Program:
    """Without unread and constant channels, as far as they can go; every GEMM keeps at least one channel."""
    changed = True
    while changed:
        changed = False
        for name in [step.name for step in reversed(program.steps) if _has_channels(step)]:
            smaller = _shrunk(program, next(step for step in program.steps if step.name == name))
            if smaller is not None:
                program, changed = smaller, True
    return program


def _has_channels(step: Step) -> bool:
    return step.op in GEMMS and step.epilogue.residual is None and step.attributes.get("groups", 1) == 1


def _shrunk(program: Program, step: Step) -> Program | None:
    weight = program.weights[step.weights["weight"]]
    start = _start(program, step, weight)
    removable = torch.ones(len(start.owner), dtype=torch.bool)
    uses: list[Use] = []
    readers = program.consumers()
    leaving = {slot.name for slot in program.output_slots}
    lanes = [start]
    while lanes:
        lane = lanes.pop()
        if lane.slot.name in leaving:
            return None
        for reader in readers[lane.slot.name]:
            use, fine = _use(program, reader, lane)
            if use is None:
                return None
            removable[lane.owner[~fine]] = False
            uses.append(use)
            if use.after is not None:
                lanes.append(use.after)
        if not bool(removable.any()):
            return None
    if bool(removable.all()):
        removable[0] = False
    return _cut(program, step, start, ~removable, uses) if bool(removable.any()) else None


def _start(program: Program, step: Step, weight: Tensor) -> Lane:
    constant = _zero(weight, 1 if step.op == "conv_transpose" else 0)
    value = torch.zeros(len(constant), dtype=torch.double)
    if step.epilogue.bias is not None:
        value = program.weights[step.epilogue.bias].double().cpu()
    return _lane(step, step.output, channel_axis(step), torch.arange(len(constant)), constant, value)


def _lane(step: Step, slot: Slot, axis: int, owner: Tensor, constant: Tensor, value: Tensor) -> Lane:
    """A Lane behind a step's epilogue."""
    act = step.epilogue.activation
    if act is not None:
        value = apply(act.kind, act.constants, value)
    return Lane(slot, axis, owner, constant & torch.isfinite(value), value)


def _use(program: Program, step: Step, lane: Lane) -> tuple[Use | None, Tensor]:
    """How a step reads a Lane, and which of its channels may go as far as this step is concerned.

    None where the step mixes channels in a way that keeps them all.
    """
    fine = torch.ones(len(lane.owner), dtype=torch.bool)
    if step.epilogue.residual is not None and (step.epilogue.residual.name == lane.slot.name
                                               or step.op not in GEMMS or _is_depthwise(program, step)):
        return None, fine
    if len(step.inputs) != 1:
        return None, fine
    if step.op in GEMMS and not _is_depthwise(program, step):
        return _contracted(program, step, lane)
    after = _passed_on(program, step, lane)
    return (None if after is None else Use(step, lane, after)), fine


def _contracted(program: Program, step: Step, lane: Lane) -> tuple[Use | None, Tensor]:
    axis = len(step.inputs[0].shape) - 1 if step.op == "linear" else 1
    if lane.axis != axis or step.attributes.get("groups", 1) != 1:
        return None, torch.zeros(len(lane.owner), dtype=torch.bool)
    weight = program.weights[step.weights["weight"]]
    absorbed = lane.constant & ((lane.value == 0) | (not is_padded(step)))
    return Use(step, lane, None), absorbed | _zero(weight, 0 if step.op == "conv_transpose" else 1)


def _zero(weight: Tensor, axis: int) -> Tensor:
    """Which indices of an axis hold nothing but zeros."""
    return ~torch.any(weight, dim=[a for a in range(weight.dim()) if a != axis]).cpu()


def _is_depthwise(program: Program, step: Step) -> bool:
    """One input channel a group: channels stay apart."""
    groups = step.attributes.get("groups", 1)
    return step.op == "conv" and groups > 1 and program.weights[step.weights["weight"]].shape[1] == 1


def _passed_on(program: Program, step: Step, lane: Lane) -> Lane | None:
    """The Lane behind a step that keeps channels apart."""
    at, owner, constant, value, axis = step.attributes, lane.owner, lane.constant, lane.value, lane.axis
    out = step.outputs[0]
    match step.op:
        case "activation":
            pass
        case "scale":
            gain, shift = (program.weights[step.weights[role]].double().cpu() for role in ("scale", "shift"))
            if gain.numel() > 1 and at["axis"] != axis:
                constant = constant & False
            else:
                value = value * gain + shift
        case "conv":                                             # depthwise
            if axis != 1:
                return None
            weight = program.weights[step.weights["weight"]].double().cpu()
            each = weight.shape[0] // len(owner)
            owner, constant, value = (t.repeat_interleave(each) for t in (owner, constant, value))
            constant = constant & ((value == 0) | (not is_padded(step)))
            value = value * weight.flatten(1).sum(1)
            if step.epilogue.bias is not None:
                value = value + program.weights[step.epilogue.bias].double().cpu()
        case "pool":
            if axis != 1:
                return None
            whole = at["kind"] == "max" or (at["divisor"] is None and not (is_padded(step) or at["ceil"]))
            constant = constant & whole
        case "adaptive_pool":
            if axis != 1:
                return None
        case "reduce":
            if axis in at["axes"]:
                return None
            constant = constant & (at["kind"] != "sum")
            axis -= 0 if at["keepdim"] else sum(a < axis for a in at["axes"])
        case "move":
            return _moved(step, lane)
        case _:
            return None
    return _lane(step, out, axis, owner, constant, value)


def _moved(step: Step, lane: Lane) -> Lane | None:
    """Through a flatten of everything from the channels on, or a permutation."""
    before, after, at = step.inputs[0].shape, step.output.shape, step.attributes
    if at["kind"] == "permute":
        return replace(lane, slot=step.output, axis=at["axes"].index(lane.axis))
    axis = lane.axis
    tail = before[axis + 1:]
    if at["kind"] != "reshape" or any(d.scale for d in (*tail, before[axis])) or after[:axis] != before[:axis]:
        return None
    each = math.prod(d.offset for d in tail)
    if after[axis:] != (Dim(0, before[axis].offset * each),):
        return None
    owner, constant, value = (t.repeat_interleave(each) for t in (lane.owner, lane.constant, lane.value))
    return Lane(step.output, axis, owner, constant, value)


def _cut(program: Program, step: Step, start: Lane, keep: Tensor, uses: list[Use]) -> Program:
    """The Program without the channels of one GEMM that are not kept."""
    weights = Weights(program.weights)
    changed = {step.name: _rows_cut(step, keep, weights)}
    lanes = [start]
    for use in uses:
        rest = keep[use.lane.owner]
        if use.after is None:
            changed[use.step.name] = _columns_cut(use.step, use.lane, rest, weights)
        else:
            lanes.append(use.after)
            changed[use.step.name] = _parameters_cut(use.step, use.after, rest, keep[use.after.owner], weights)
    slots, kept = {}, dict(program.kept)
    for lane in lanes:
        rest = keep[lane.owner]
        shape = list(lane.slot.shape)
        shape[lane.axis] = Dim(0, int(rest.sum()))
        slots[lane.slot.name] = Slot(lane.slot.name, tuple(shape), lane.slot.dtype)
        axis, before = kept.get(lane.slot.name, (lane.axis, tuple(range(len(rest)))))
        kept[lane.slot.name] = (axis, tuple(i for i, stays in zip(before, rest.tolist(), strict=True) if stays))
    return program.with_steps((swap_slots(changed.get(each.name, each), slots) for each in program.steps), weights,
                              kept=kept)


def _rows_cut(step: Step, keep: Tensor, weights: Weights) -> Step:
    weight = weights[step.weights["weight"]]
    smaller = _pick(weight, 1 if step.op == "conv_transpose" else 0, keep)
    bias = step.epilogue.bias
    if bias is not None:
        bias = weights.add(f"{step.name}.bias", _pick(weights[bias], 0, keep))
    return _reweighted(step, weight, smaller, weights, replace(step.epilogue, bias=bias))


def _columns_cut(step: Step, lane: Lane, rest: Tensor, weights: Weights) -> Step:
    """A consumer without the dropped inputs; what was constant among them goes into its bias."""
    weight, bias = weights[step.weights["weight"]], step.epilogue.bias
    gone = torch.where(~rest & lane.constant, lane.value, 0.0).to(weight.device)
    if bool(gone.any()):
        wide = weight.double()
        moved = (wide * per_input(step, gone, wide)).flatten(1).sum(1)
        moved = moved if bias is None else moved + weights[bias].double()
        bias = weights.add(f"{step.name}.bias", moved.to(weight.dtype))
    smaller = _pick(weight, 0 if step.op == "conv_transpose" else 1, rest)
    return _reweighted(step, weight, smaller, weights, replace(step.epilogue, bias=bias))


def _parameters_cut(step: Step, after: Lane, rest: Tensor, out: Tensor, weights: Weights) -> Step:
    """A step that passes channels on, with the parameters of those that remain."""
    if step.op == "conv":
        smaller = _rows_cut(step, out, weights)
        return replace(smaller, attributes={**step.attributes, "groups": int(rest.sum())})
    if step.op == "scale" and step.attributes["axis"] == after.axis:
        vectors = {role: weights[name] for role, name in step.weights.items()}
        return replace(step, weights={role: weights.add(f"{step.name}.{role}", _pick(v, 0, out)) if v.numel() > 1
                                      else step.weights[role] for role, v in vectors.items()})
    return step


def _reweighted(step: Step, old: Tensor, new: Tensor, weights: Weights, epilogue: Epilogue = NO_EPILOGUE) -> Step:
    macs = replace(step.macs, scale=step.macs.scale * new.numel() // old.numel(),
                   offset=step.macs.offset * new.numel() // old.numel())
    name = weights.add(f"{step.name}.weight", new)
    return replace(step, weights={**step.weights, "weight": name}, epilogue=epilogue, macs=macs)


def _pick(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    return tensor.index_select(axis, keep.nonzero()[:, 0].to(tensor.device))
