"""Everything that is not a GEMM: pooling, elementwise steps, normalisation, movement, ATen operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunekern.backends.reference.engine import EVERYTHING, Compiler, Kernel, Layout
from prunekern.core.activations import apply_into
from prunekern.core.arguments import decode, find_operator
from prunekern.core.counted import GROUP_NORM, LAYER_NORM
from prunekern.core.graph import Shape
from prunekern.core.program import Slot, Step
from prunekern.errors import LoweringError

aten = torch.ops.aten
Function = Callable[..., Tensor]


def _fresh(layout: Layout, step: Step, function: Function, algorithm: str = "torch") -> Kernel:
    """The step's value is what a torch function gives: a tensor of its own."""
    layout.algorithms[step.name] = algorithm
    layout.expect(step.output, step.inputs[0])
    reads, bind, finish = [layout.get(slot) for slot in step.inputs], layout.put(step.output), layout.finish(step)

    def run() -> None:
        y = function(*[read() for read in reads])
        if finish is not None:
            finish(y, EVERYTHING)
        bind(y)
    return run


def _into(layout: Layout, step: Step, function: Callable[..., Any], algorithm: str = "torch",
          like: Slot | None = None) -> Kernel:
    """The step's value is written into its place: ``function(*inputs, out=place)``."""
    layout.algorithms[step.name] = algorithm
    like = step.inputs[0] if like is None else like
    last = len(like.shape) == len(step.output.shape) and layout.is_channels_last(like)
    y = layout.out(step.output, last)
    reads, finish = [layout.get(slot) for slot in step.inputs], layout.finish(step)
    fixed = [layout.fixed(slot) for slot in step.inputs]
    if finish is None and None not in fixed:
        return partial(function, *fixed, out=y)

    def run() -> None:
        function(*[read() for read in reads], out=y)
        if finish is not None:
            finish(y, EVERYTHING)
    return run


def scale(layout: Layout, step: Step) -> Kernel:
    axis, rank = step.attributes["axis"], len(step.output.shape)
    gain, shift = (layout.weight(step.weights[role]) for role in ("scale", "shift"))
    if gain.numel() > 1 or not rank:
        shape = (-1, *[1] * (rank - 1 - axis)) if rank else ()
        gain, shift = gain.view(shape), shift.view(shape)
    return _into(layout, step, lambda x, out: torch.addcmul(shift, x, gain, out=out), "scale")


def activation(layout: Layout, step: Step) -> Kernel:
    """Alone: from its input's place to its own."""
    function = step.epilogue.activation
    if function is None or step.epilogue.residual is not None or step.epilogue.bias is not None:
        return _into(layout, step, lambda x, out: out.copy_(x), "elementwise")
    layout.algorithms[step.name] = "elementwise"
    y, read = layout.out(step.output, layout.is_channels_last(step.inputs[0])), layout.get(step.inputs[0])
    return lambda: apply_into(function.kind, function.constants, read(), y)


BINARY: dict[str, Function] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
                               "maximum": torch.maximum, "minimum": torch.minimum}


def binary(layout: Layout, step: Step) -> Kernel:
    like = next((slot for slot in step.inputs if slot.shape == step.output.shape), step.inputs[0])
    return _into(layout, step, BINARY[step.attributes["kind"]], "elementwise", like)


def pool(layout: Layout, step: Step) -> Kernel:
    if takes_views(step, layout.batch):
        return _pool_views(layout, step)
    at, rank = step.attributes, len(step.attributes["kernel"])
    pads = [low for low, _ in at["padding"]]
    if at["kind"] == "max":
        return _fresh(layout, step, lambda x: getattr(aten, f"max_pool{rank}d")(
            x, at["kernel"], at["stride"], pads, at["dilation"], at["ceil"]))
    extra = {} if rank == 1 else {"divisor_override": at["divisor"]}
    return _fresh(layout, step, lambda x: getattr(aten, f"avg_pool{rank}d")(
        x, at["kernel"], at["stride"], pads, at["ceil"], at["count_include_pad"], **extra))


def takes_views(step: Step, batch: int) -> bool:
    """Small unpadded max pooling over much data: elementwise maxima of strided views beat torch's kernel."""
    at = step.attributes
    return (step.op == "pool" and at["kind"] == "max" and not at["ceil"] and len(at["kernel"]) == 2
            and max(at["kernel"]) <= 2 and not any(p for pair in at["padding"] for p in pair)
            and _count(step.output.at(batch)) >= 1 << 14)


def _count(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _pool_views(layout: Layout, step: Step) -> Kernel:
    at, sizes = step.attributes, layout.shape(step.output)[2:]

    def windows(x: Tensor) -> list[Tensor]:
        views = []
        for tap in product(*map(range, at["kernel"])):
            places = (slice(t * d, t * d + (n - 1) * s + 1, s)
                      for t, d, n, s in zip(tap, at["dilation"], sizes, at["stride"], strict=True))
            views.append(x[(slice(None), slice(None), *places)])
        return views

    def maxima(x: Tensor, out: Tensor) -> None:
        first, *rest = windows(x)
        if not rest:
            out.copy_(first)
        for number, view in enumerate(rest):
            torch.maximum(out if number else first, view, out=out)
    return _into(layout, step, maxima, "strided maxima")


def adaptive_pool(layout: Layout, step: Step) -> Kernel:
    size = step.attributes["size"]
    rank = len(size)
    if step.attributes["kind"] == "avg":
        return _fresh(layout, step, lambda x: getattr(aten, f"adaptive_avg_pool{rank}d")(x, size))
    return _fresh(layout, step, lambda x: getattr(aten, f"adaptive_max_pool{rank}d")(x, size)[0])


REDUCE: dict[str, Function] = {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin}


def reduce(layout: Layout, step: Step) -> Kernel:
    at = step.attributes
    return _into(layout, step, partial(REDUCE[at["kind"]], dim=at["axes"], keepdim=at["keepdim"]))


def pad(layout: Layout, step: Step) -> Kernel:
    at = step.attributes
    amounts = list(at["amounts"])
    while amounts and list(amounts[0]) == [0, 0] and (at["mode"] == "constant" or len(amounts) > 3):
        amounts.pop(0)
    if at["mode"] != "constant":
        amounts = list(at["amounts"])[2:]
    flat = [n for pair in reversed(amounts) for n in pair]
    if at["mode"] == "constant":
        return _fresh(layout, step, lambda x: functional.pad(x, flat, "constant", at["value"]))
    return _fresh(layout, step, lambda x: functional.pad(x, flat, at["mode"]))


RESIZE = {"nearest": ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
          "nearest_exact": ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
          "linear": ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
          "cubic": ("", "upsample_bicubic2d", "")}


def resize(layout: Layout, step: Step) -> Kernel:
    at, rank = step.attributes, len(step.attributes["size"])
    operator = getattr(aten, RESIZE[at["mode"]][rank - 1]).default
    scales = at["scales"] or [None] * rank
    corners = [] if at["mode"].startswith("nearest") else [at["align_corners"]]
    return _fresh(layout, step, lambda x: operator(x, at["size"], *corners, *scales))


def cat(layout: Layout, step: Step) -> Kernel:
    axis = step.attributes["axis"]
    return _into(layout, step, lambda *tensors, out: torch.cat(tensors, axis, out=out), "copy")


def softmax(layout: Layout, step: Step) -> Kernel:
    function = torch.log_softmax if step.attributes["log"] else torch.softmax
    return _fresh(layout, step, partial(function, dim=step.attributes["axis"]))


def _vectors(layout: Layout, step: Step) -> list[Tensor | None]:
    return [layout.weight(step.weights[role]) if role in step.weights else None for role in ("weight", "bias")]


def layer_norm(layout: Layout, step: Step) -> Kernel:
    at, (weight, bias) = step.attributes, _vectors(layout, step)
    shape = list(layout.shape(step.output)[-at["axes"]:])
    if step.op == "rms_norm":
        return _fresh(layout, step, lambda x: functional.rms_norm(x, shape, weight, at["eps"]))
    if "of" in at:
        return _fresh(layout, step, lambda x: LAYER_NORM(x, shape, weight, bias, at["eps"], at["of"]))
    return _fresh(layout, step, lambda x: functional.layer_norm(x, shape, weight, bias, at["eps"]))


def group_norm(layout: Layout, step: Step) -> Kernel:
    at, (weight, bias) = step.attributes, _vectors(layout, step)
    groups = at["groups"]
    if "of" in at:
        return _fresh(layout, step, lambda x: GROUP_NORM(x, groups, weight, bias, at["eps"], at["of"]))

    def run(x: Tensor) -> Tensor:     # torch's own refuses one value per group, which instance_norm allows
        rows = x.reshape(x.shape[0], groups, -1)
        variance, mean = torch.var_mean(rows, -1, correction=0, keepdim=True)
        y = rows.sub(mean).mul_(variance.add_(at["eps"]).rsqrt_()).view(x.shape)
        shape = (1, -1, *[1] * (x.dim() - 2))
        if weight is not None:
            y.mul_(weight.view(shape))
        return y if bias is None else y.add_(bias.view(shape))
    return _fresh(layout, step, run)


def attention(layout: Layout, step: Step) -> Kernel:
    """softmax(q k^T / sqrt(E) + mask) v, Vaswani et al. 2017, equation 1; a row with all masked gives zeros."""
    (*_, rows, width), (*_, columns, _) = (layout.shape(slot) for slot in step.inputs[:2])
    factor, causal = step.attributes["scale"], step.attributes["causal"]
    factor = width ** -0.5 if factor is None else factor
    seen = torch.ones(rows, columns, dtype=torch.bool, device=layout.device).tril() if causal else None

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        key, value = (t if t.shape[-3] == query.shape[-3] or query.dim() < 4 else
                      t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = torch.matmul(query * factor, key.transpose(-2, -1))
        for each in (mask, seen):
            if each is not None:
                scores = scores.masked_fill(~each, -torch.inf) if each.dtype == torch.bool else scores.add_(each)
        return torch.matmul(aten._safe_softmax(scores, -1), value)
    return _fresh(layout, step, run, "GEMM, softmax, GEMM")


def embedding(layout: Layout, step: Step) -> Kernel:
    weight = layout.weight(step.weights["weight"])
    return _fresh(layout, step, lambda indices: weight[indices], "gather")


def prelu(layout: Layout, step: Step) -> Kernel:
    slope = layout.weight(step.weights["slope"])
    return _fresh(layout, step, lambda x: functional.prelu(x, slope), "elementwise")


def constant(layout: Layout, step: Step) -> Kernel:
    layout.algorithms[step.name] = "weight"
    layout.fix(step.output, layout.weight(step.weights["value"]))
    return _nothing


def _nothing() -> None:
    """A step whose value is there already."""


def move(layout: Layout, step: Step) -> Kernel:
    """A view of the input where strides allow it; made once where the input has a fixed place."""
    source, target = step.inputs[0], step.output
    function = _movement(layout, step)
    fixed = layout.fixed(source)
    if fixed is not None:
        view = function(fixed)
        if view.untyped_storage().data_ptr() == fixed.untyped_storage().data_ptr() or not view.numel():
            layout.algorithms[step.name] = "view"
            layout.fix(target, view)
            return _nothing
    layout.algorithms[step.name] = "copy" if fixed is not None else "view or copy"
    layout.hints[target.name] = function(layout.hints[source.name])
    read, bind = layout.get(source), layout.put(target)
    return lambda: bind(function(read()))


def _movement(layout: Layout, step: Step) -> Function:
    at, shape = step.attributes, layout.shape(step.output)
    match at["kind"]:
        case "reshape" if _flattens(layout, step):
            layout.flat[step.output.name] = layout.shape(step.inputs[0])
            return lambda x: x.permute(0, *range(2, x.dim()), 1).reshape(shape)
        case "reshape":
            return lambda x: x.reshape(shape)
        case "permute":
            return lambda x: x.permute(at["axes"])
        case "expand":
            return lambda x: x.expand(shape)
        case "slice":
            axis, start, step_size = at["axis"], at["start"], at["step"]
            stop = start + (shape[axis] - 1) * step_size + 1
            places = (*[slice(None)] * axis, slice(start, max(stop, start), step_size))
            return lambda x: x[places]
    raise LoweringError(f"step {step.name!r}: no movement {at['kind']!r}")


def _flattens(layout: Layout, step: Step) -> bool:
    """``[N, C, *sizes]`` to ``[N, C * sizes]`` in channels-last memory, read by linear steps only: they take the
    features in the memory's order, with the columns of their weights permuted to match."""
    source, target = step.inputs[0], step.output
    return (len(target.shape) == 2 and layout.shape(source)[:1] == layout.shape(target)[:1] and len(source.shape) > 2
            and layout.is_channels_last(source)
            and all(user.op == "linear" and user.epilogue.residual != target for user in layout.consumers[target.name])
            and target not in layout.program.output_slots)


def call(layout: Layout, step: Step) -> Kernel:
    """An operator by its name."""
    at = step.attributes
    operator, layout.algorithms[step.name] = find_operator(at["target"]), at["target"]
    weights = {role: layout.weight(name) for role, name in step.weights.items()}
    reads, binds = [layout.get(slot) for slot in step.inputs], [layout.put(slot) for slot in step.outputs]
    for slot in step.outputs:
        layout.hints[slot.name] = torch.empty(layout.shape(slot), dtype=slot.dtype, device="meta")

    def run() -> None:
        given = (([read() for read in reads]), weights, layout.batch, layout.device)
        result = operator(*decode(at["args"], *given),
                          **{key: decode(arg, *given) for key, arg in at["kwargs"].items()})
        results = [result] if isinstance(result, Tensor) else result
        for slot, bind, tensor in zip(step.outputs, binds, results, strict=True):
            if at.get("sized") and tensor.shape != layout.hints[slot.name].shape:
                raise LoweringError(
                    f"step {step.name!r} ({at['target']}) gives {tuple(tensor.shape)}, and this network was laid "
                    f"out for {tuple(layout.hints[slot.name].shape)}: a size that the data makes is that of the "
                    "example inputs. Lower the module again with inputs like these, or run the module itself.")
            bind(tensor)
    return run


SIMPLE_COMPILERS: dict[str, Compiler] = {
    "scale": scale, "activation": activation, "binary": binary, "pool": pool, "adaptive_pool": adaptive_pool,
    "reduce": reduce, "pad": pad, "resize": resize, "cat": cat, "softmax": softmax, "layer_norm": layer_norm,
    "rms_norm": layer_norm, "group_norm": group_norm, "attention": attention,
    "embedding": embedding, "prelu": prelu, "constant": constant, "move": move, "aten": call}

PLACED = ("conv", "conv_transpose", "linear", "matmul", "scale", "activation", "binary", "reduce", "cat")
VIEWS = ("move", "aten")


def placed(step: Step, batch: int) -> bool:
    """Whether a step's output has a place in the arena; it is a view or a tensor of its own otherwise."""
    return step.op in PLACED or takes_views(step, batch)
