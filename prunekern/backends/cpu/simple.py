"""Everything that is not a GEMM, as ops of the engine: elementwise steps, pooling, resizing, reductions, norms,
softmax, and products of two activations. The kernels are csrc/cpu/kernels/{elementwise,pool,...}.cpp; they take any
strides, and are at their best where channels (LAST) or pixels (PLAIN, PLANAR) lie next to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from prunekern.backends.cpu import planar
from prunekern.backends.cpu.builder import Builder, Ref, axes, image, spatial
from prunekern.backends.cpu.layout import Compiler, Need
from prunekern.backends.cpu.native import Field, activation_fields
from prunekern.backends.cpu.place import AXES, Form, Place
from prunekern.core.program import Slot, Step

Fields = dict[str, Field | Ref]

BINARY = {kind: number for number, kind in enumerate(("add", "sub", "mul", "div", "maximum", "minimum"))}
REDUCE = {kind: number for number, kind in enumerate(("mean", "sum", "amax", "amin"))}


def _anything(builder: Builder, step: Step) -> str | None:
    return None


def _as_they_are(builder: Builder, step: Step) -> Iterable[Need]:
    return ()


def like_inputs(builder: Builder, step: Step) -> Form:
    """The form of the inputs that have the output's shape."""
    shape = builder.shape(step.output)
    forms = [builder.form(slot) for slot in step.inputs if builder.shape(slot) == shape]
    return next((form for form in forms if form is not Form.PLAIN), Form.PLAIN)


def like_first(builder: Builder, step: Step) -> Form:
    return builder.form(step.inputs[0])


def plain(builder: Builder, step: Step) -> Form:
    return Form.PLAIN


@dataclass(frozen=True)
class Simple:
    """A ``builder.Compiler`` of functions. ops: emits, and gives the algorithm's name."""

    ops: Callable[[Builder, Step], str]
    form: Callable[[Builder, Step], Form] = like_first
    refuses: Callable[[Builder, Step], str | None] = _anything
    reads: Callable[[Builder, Step], Iterable[Need]] = _as_they_are

    def takes(self, builder: Builder, step: Step) -> str | None:
        return self.refuses(builder, step)

    def needs(self, builder: Builder, step: Step) -> Iterable[Need]:
        return self.reads(builder, step)

    def gives(self, builder: Builder, step: Step) -> Form:
        return self.form(builder, step)

    def emit(self, builder: Builder, step: Step) -> None:
        builder.algorithms[step.name] = self.ops(builder, step)


def _axis(step: Step, rank: int, axis: int) -> int:
    """An axis of a value as an axis of ``builder.axes``."""
    rank = max(1, rank)                 # a scalar is one element along some axis
    return AXES - rank + axis % rank


def _vector(builder: Builder, name: str) -> int:
    """The address of a weight as it is."""
    return builder.packed(("vector", name), lambda: builder.weight(name).detach().float().contiguous())


def _optional(builder: Builder, step: Step, *roles: str) -> Fields:
    return {role: _vector(builder, step.weights[role]) for role in roles if role in step.weights}


# ---- elementwise -----------------------------------------------------------------------------------------------


def _same_shape(builder: Builder, step: Step) -> Iterable[Need]:
    """Operands that are not broadcast are read in the form of the output."""
    form = like_inputs(builder, step)
    if form is not Form.PLAIN:
        yield from (Need(slot, form) for slot in step.inputs if builder.shape(slot) == builder.shape(step.output))


def _operand(builder: Builder, step: Step, slot: Slot) -> Ref:
    form, shape = like_inputs(builder, step), builder.shape(step.output)
    place = builder.want(slot, form) if form is not Form.PLAIN and builder.shape(slot) == shape else builder.read(slot)
    return axes(Place(place.buffer, place.view.expand(shape)))


def binary(builder: Builder, step: Step) -> str:
    a, b = (_operand(builder, step, slot) for slot in step.inputs)
    builder.emit("binary", y=axes(builder.write(step.output)), a=a, b=b, kind=BINARY[step.attributes["kind"]],
                 **activation_fields(step.epilogue.activation))
    return "elementwise"


def activation(builder: Builder, step: Step) -> str:
    builder.emit("activation", y=axes(builder.write(step.output)), x=_operand(builder, step, step.inputs[0]),
                 **activation_fields(step.epilogue.activation))
    return "elementwise"


def scale(builder: Builder, step: Step) -> str:
    gain, shift = torch.broadcast_tensors(*(builder.weight(step.weights[role]) for role in ("scale", "shift")))
    names = tuple(step.weights[role] for role in ("scale", "shift"))
    builder.emit("scale", y=axes(builder.write(step.output)), x=axes(builder.read(step.inputs[0])),
                 axis=_axis(step, len(step.output.shape), step.attributes["axis"]), count=gain.numel(),
                 scale=builder.packed(("scale", *names), lambda: gain.detach().float().contiguous()),
                 shift=builder.packed(("shift", *names), lambda: shift.detach().float().contiguous()),
                 **activation_fields(step.epilogue.activation))
    return "scale"


def prelu(builder: Builder, step: Step) -> str:
    slope = step.weights["slope"]
    builder.emit("prelu", y=axes(builder.write(step.output)), x=axes(builder.read(step.inputs[0])),
                 axis=_axis(step, len(step.output.shape), step.attributes["axis"]),
                 count=builder.weight(slope).numel(), slope=_vector(builder, slope))
    return "elementwise"


# ---- windows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Windows along one axis, clipped to the input: the first index of each, how many it has, and what an average
    is divided by (times those of the other axes)."""

    start: list[int]
    count: list[int]
    divide: list[int]
    stride: int


def pool_window(size: int, out: int, kernel: int, stride: int, padding: Sequence[int], dilation: int,
                include: bool) -> Window:
    """Of ordinary pooling. include: padding counts in an average, as far as the input's own padding reaches."""
    taps = [[tap for tap in range(o * stride - padding[0], o * stride - padding[0] + kernel * dilation, dilation)
             if 0 <= tap < size] for o in range(out)]
    whole = [min(o * stride - padding[0] + kernel, size + padding[1]) - (o * stride - padding[0]) for o in range(out)]
    return Window([row[0] if row else 0 for row in taps], [len(row) for row in taps],
                  whole if include else [len(row) for row in taps], stride)


def adaptive_window(size: int, out: int) -> Window:
    """Output o has the inputs from floor(o size / out) to ceil((o + 1) size / out)."""
    start = [o * size // out for o in range(out)]
    count = [-(-(o + 1) * size // out) - first for o, first in enumerate(start)]
    return Window(start, count, count, size // out if size % out == 0 else 0)


def _emit_pool(builder: Builder, step: Step, windows: Sequence[Window], dilation: Sequence[int],
               divisor: float) -> str:
    missing = [Window([0], [1], [1], 1)] * (3 - len(windows))
    fields: Fields = {}
    for axis, window in zip("dhw", (*missing, *windows), strict=True):
        fields.update({f"start_{axis}": window.start, f"count_{axis}": window.count, f"divide_{axis}": window.divide})
    builder.emit("pool", x=image(builder.read(step.inputs[0])), y=image(builder.write(step.output)),
                 kind=int(step.attributes["kind"] == "avg"), dilation=spatial(dilation, 1), divisor=divisor,
                 stride=spatial([window.stride for window in windows], 1), **fields)
    return "windows"


def pool(builder: Builder, step: Step) -> str:
    if planar.emit_pool(builder, step):
        return "2x2"
    at = step.attributes
    average = at["kind"] == "avg"
    dilation = [1] * len(at["kernel"]) if average else at["dilation"]
    include = bool(at["count_include_pad"])
    windows = [pool_window(size, out, kernel, stride, padding, spread, include)
               for size, out, kernel, stride, padding, spread in zip(
                   builder.shape(step.inputs[0])[2:], builder.shape(step.output)[2:], at["kernel"], at["stride"],
                   at["padding"], dilation, strict=True)]
    return _emit_pool(builder, step, windows, dilation, float(at["divisor"] or 0) if average else 0.0)


def adaptive_pool(builder: Builder, step: Step) -> str:
    sizes = zip(builder.shape(step.inputs[0])[2:], builder.shape(step.output)[2:], strict=True)
    windows = [adaptive_window(size, out) for size, out in sizes]
    return _emit_pool(builder, step, windows, [1] * len(windows), 0.0)


def _images(builder: Builder, step: Step) -> str | None:
    if len(step.inputs[0].shape) < 3 or len(step.attributes.get("kernel", ())) not in (0, len(step.output.shape) - 2):
        return "it takes images with a batch axis"
    return None if math.prod(builder.shape(step.inputs[0])[1:]) else "an image is empty"


# ---- gathering by tables ---------------------------------------------------------------------------------------

NEAREST: dict[str, Callable[..., Tensor]] = {"nearest": torch.ops.aten.upsample_nearest1d,
                                             "nearest_exact": torch.ops.aten._upsample_nearest_exact1d}


def resize_table(mode: str, size: int, out: int, scale: float | None, corners: bool) -> tuple[Tensor, Tensor | None]:
    """Which inputs each output is made of, [out, 1 or 2], and their weights: asked of torch, one axis at a time, with
    inputs that are their own index (nearest) or a unit vector (linear)."""
    if mode != "linear":
        ramp = torch.arange(size, dtype=torch.float32).view(1, 1, size)
        return NEAREST[mode](ramp, [out], scale).view(out, 1).long(), None
    units = torch.eye(size).view(1, size, size)
    weights = torch.ops.aten.upsample_linear1d(units, [out], corners, scale)[0].t()          # [out, size]
    first = (weights != 0).int().argmax(1)
    second = (first + 1).clamp_max(size - 1)
    taken = weights.gather(1, torch.stack((first, second), 1))
    taken[:, 1] *= second != first
    return torch.stack((first, second), 1), taken.contiguous()


def pad_table(mode: str, size: int, before: int, after: int) -> Tensor:
    """Which input each output of a padded axis is, [out, 1]."""
    ramp = torch.arange(size, dtype=torch.float32).view(1, 1, size)
    if (before, after) == (0, 0):
        return ramp.view(size, 1).long()
    return functional.pad(ramp, (before, after), mode).view(-1, 1).long()


def _emit_tables(builder: Builder, step: Step, tables: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    fields: Fields = {}
    missing = [(torch.zeros(1, 1, dtype=torch.long), None)] * (3 - len(tables))
    for axis, (index, part) in zip("dhw", (*missing, *tables), strict=True):
        fields[f"index_{axis}"] = index.flatten().tolist()
        if part is not None:
            fields[f"part_{axis}"] = builder.address(part)
    builder.emit("resize", x=image(builder.want(step.inputs[0], Form.LAST)), y=image(builder.write(step.output)),
                 **fields)


def resize(builder: Builder, step: Step) -> str:
    at, sizes = step.attributes, builder.shape(step.inputs[0])[2:]
    scales = at["scales"] or [None] * len(sizes)
    _emit_tables(builder, step, [resize_table(at["mode"], *numbers, bool(at["align_corners"]))
                                 for numbers in zip(sizes, builder.shape(step.output)[2:], scales, strict=True)])
    return "tables"


def _resizes(builder: Builder, step: Step) -> str | None:
    if step.attributes["mode"] not in (*NEAREST, "linear"):
        return f"mode {step.attributes['mode']}"
    return _images(builder, step)


def pad(builder: Builder, step: Step) -> str:
    at, amounts = step.attributes, [tuple(pair) for pair in step.attributes["amounts"]]
    if at["mode"] != "constant":
        sizes = builder.shape(step.inputs[0])[2:]
        _emit_tables(builder, step, [(pad_table(at["mode"], size, *pair), None)
                                     for size, pair in zip(sizes, amounts[2:], strict=True)])
        return "tables"
    x, y = builder.read(step.inputs[0]), builder.write(step.output)
    inside = y.view
    for axis, (size, (before, _)) in enumerate(zip(x.view.shape, amounts, strict=True)):
        inside = inside.narrow(axis, before, size)
    builder.emit("fill", y=axes(y), value=float(at["value"] or 0))
    builder.emit("copy", x=axes(x), y=axes(Place(y.buffer, inside)))
    return "copy"


def _pads(builder: Builder, step: Step) -> str | None:
    amounts = step.attributes["amounts"]
    if min((n for pair in amounts for n in pair), default=0) < 0:
        return "an axis is cropped"
    if step.attributes["mode"] == "constant":
        return None
    return "images or channels are padded" if any(n for pair in amounts[:2] for n in pair) else _images(builder, step)


def _padded_form(builder: Builder, step: Step) -> Form:
    return builder.form(step.inputs[0]) if step.attributes["mode"] == "constant" else Form.LAST


def _padded_reads(builder: Builder, step: Step) -> Iterable[Need]:
    return () if step.attributes["mode"] == "constant" else _last(builder, step)


def _last(builder: Builder, step: Step) -> Iterable[Need]:
    yield Need(step.inputs[0], Form.LAST)


def _always_last(builder: Builder, step: Step) -> Form:
    return Form.LAST


# ---- reductions, softmax, norms --------------------------------------------------------------------------------


def reduce(builder: Builder, step: Step) -> str:
    at, x, y = step.attributes, builder.read(step.inputs[0]), builder.write(step.output)
    rank = x.view.dim()
    gone = sorted(axis % rank for axis in at["axes"])
    view = y.view
    if not at["keepdim"]:
        for axis in gone:
            view = view.unsqueeze(axis)
    builder.emit("reduce", x=axes(x), y=axes(Place(y.buffer, view)), kind=REDUCE[at["kind"]],
                 axes=[_axis(step, rank, axis) for axis in gone])
    return "reduction"


def _reduces(builder: Builder, step: Step) -> str | None:
    if not step.attributes["axes"]:
        return "no axes"
    return None if math.prod(builder.shape(step.inputs[0])) else "there is nothing to reduce"


def softmax(builder: Builder, step: Step) -> str:
    rank = len(step.output.shape)
    builder.emit("softmax", x=axes(builder.read(step.inputs[0])), y=axes(builder.write(step.output)),
                 axes=[_axis(step, rank, step.attributes["axis"])], log=int(step.attributes["log"]))
    return "rows"


def row_norm(builder: Builder, step: Step) -> str:
    """layer_norm and rms_norm, over the last axes."""
    at, rank = step.attributes, len(step.output.shape)
    eps = torch.finfo(torch.float32).eps if at["eps"] is None else at["eps"]
    builder.emit(step.op, x=axes(builder.read(step.inputs[0])), y=axes(builder.write(step.output)), eps=float(eps),
                 axes=[_axis(step, rank, axis) for axis in range(rank - at["axes"], rank)], of=at.get("of", 0),
                 **_optional(builder, step, "weight", "bias"))
    return "rows"


def group_norm(builder: Builder, step: Step) -> str:
    at = step.attributes
    builder.emit("group_norm", x=image(builder.read(step.inputs[0])), y=image(builder.write(step.output)),
                 groups=at["groups"], of=at.get("of", 0), eps=float(at["eps"]),
                 **_optional(builder, step, "weight", "bias"))
    return "groups"


def _has_channels(builder: Builder, step: Step) -> str | None:
    return None if len(step.output.shape) >= 2 else "it takes a batch axis and channels"


def _has_axes(builder: Builder, step: Step) -> str | None:
    return None if step.output.shape else "it has no axes"


# ---- products of activations -----------------------------------------------------------------------------------


def matmul(builder: Builder, step: Step) -> str:
    y = builder.write(step.output)
    batch = y.view.shape[:-2]
    a, b = (builder.read(slot) for slot in step.inputs)
    builder.emit("matmul", y=axes(y), a=_broadcast(a, (*batch, *a.view.shape[-2:])),
                 b=_broadcast(b, (*batch, *b.view.shape[-2:])), **activation_fields(step.epilogue.activation))
    return "GEMM, packed at run time"


def _broadcast(place: Place, shape: Sequence[int]) -> Ref:
    return axes(Place(place.buffer, place.view.expand(tuple(shape))))


def _matrices(builder: Builder, step: Step) -> str | None:
    return "it takes matrices" if any(len(slot.shape) < 2 for slot in step.inputs) else None


def attention(builder: Builder, step: Step) -> str:
    at, y = step.attributes, builder.write(step.output)
    q, k, v = (builder.read(slot) for slot in step.inputs[:3])
    if q.view.stride(-1) != 1:
        q = builder.dense(step.inputs[0])
    fields: Fields = {}
    if len(step.inputs) > 3:
        mask = builder.read(step.inputs[3])
        fields["mask"] = _broadcast(mask, (*y.view.shape[:-2], q.view.shape[-2], k.view.shape[-2]))
    factor = q.view.shape[-1] ** -0.5 if at["scale"] is None else at["scale"]
    builder.emit("attention", q=axes(q), k=axes(k), v=axes(v), y=axes(y), causal=int(at["causal"]),
                 scale=float(factor), **fields)
    return "GEMM, softmax, GEMM"


def _heads(builder: Builder, step: Step) -> str | None:
    q, k, v = (builder.shape(slot) for slot in step.inputs[:3])
    if not len(q) == len(k) == len(v) or len(q) < 3:
        return "queries, keys and values have different axes"
    shared = all(b and a % b == 0 and b == c for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True))
    return None if shared and k[-2] and k[-1] else "heads are shared in a way it does not know"


SIMPLE: Mapping[str, Compiler] = {
    "binary": Simple(binary, like_inputs, reads=_same_shape),
    "activation": Simple(activation, like_inputs, reads=_same_shape),
    "scale": Simple(scale), "prelu": Simple(prelu, refuses=_has_channels),
    "pool": Simple(pool, refuses=_images), "adaptive_pool": Simple(adaptive_pool, refuses=_images),
    "resize": Simple(resize, _always_last, _resizes, _last), "pad": Simple(pad, _padded_form, _pads, _padded_reads),
    "reduce": Simple(reduce, plain, _reduces), "softmax": Simple(softmax, refuses=_has_axes),
    "layer_norm": Simple(row_norm, plain), "rms_norm": Simple(row_norm, plain),
    "group_norm": Simple(group_norm, refuses=_has_channels),
    "matmul": Simple(matmul, plain, _matrices), "attention": Simple(attention, plain, _heads),
}
