"""Operators over positions: pooling, resizing, padding; and reductions over any axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from prunekern.core.arguments import per_axis
from prunekern.core.builder import Builder
from prunekern.core.counted import MEAN, of
from prunekern.core.graph import Shape, ShapeOf, target_name
from prunekern.core.labels import Plane, Tape, spread, varying
from prunekern.core.rule import OpRule, Rewritten, Sample, Sizes, argument, aten, numel
from prunekern.ops.elementwise import MAP, sample


def pass_channels(node: fx.Node, tape: Tape, mixed: int, reason: str) -> list[Tensor]:
    """The input's planes on the output's shape; those that vary along one of the last ``mixed`` axes stay."""
    shape, planes = tape.shape(node), []
    for plane in tape.planes(node.args[0]):
        live = varying(plane)
        if any(axis >= plane.dim() - mixed for axis in live):
            channel = min(live)
            if channel >= plane.dim() - mixed:
                tape.freeze(node, plane, reason)
                continue
            vector, _ = tape.along(node, (plane,), channel)       # all positions of a channel leave together
            planes.append(spread(vector, channel, shape))  # type: ignore[arg-type]
        else:
            for axis in range(plane.dim() - mixed, plane.dim()):
                plane = plane.narrow(axis, 0, 1)
            planes.append(plane.expand(shape))
    return planes


class Pool(OpRule):
    """Max, average and adaptive pooling in 1, 2 and 3 dimensions; per channel."""

    matches = aten("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
                   "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "lp_pool2d")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.MaxPool2d(2), (MAP,)), Sample(lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (MAP,)),
        Sample(lambda: nn.MaxPool2d(2, 1, dilation=2), (MAP,)), Sample(lambda: nn.AvgPool2d(2), (MAP,)),
        Sample(lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (MAP,)),
        Sample(lambda: nn.AdaptiveAvgPool2d(1), (MAP,)), Sample(lambda: nn.AdaptiveAvgPool2d((3, 2)), (MAP,)),
        Sample(lambda: nn.MaxPool1d(3, 2), ((2, 6, 9),)), Sample(lambda: nn.AvgPool1d(2), ((2, 6, 9),)),
        Sample(lambda: nn.AdaptiveAvgPool1d(4), ((2, 6, 9),)), Sample(lambda: nn.MaxPool3d(2), ((2, 6, 4, 4, 4),)),
        Sample(lambda: nn.AvgPool3d(2), ((2, 6, 4, 4, 4),)),
    )

    def spatial(self, node: fx.Node) -> int:
        return next(n for n in (1, 2, 3) if f"{n}d" in str(node.target))

    def label(self, node: fx.Node, tape: Tape) -> None:
        tape.give(node, pass_channels(node, tape, self.spatial(node), "its positions are pooled"))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Outputs times window; adaptive pooling looks at each input about once."""
        if "adaptive" in str(node.target):
            return numel(shape(node.args[0]))  # type: ignore[arg-type]
        window: Any = argument(node, 1, "kernel_size")
        window = window if isinstance(window, (list, tuple)) else [window]
        return numel(shape(node)) * numel(tuple(window) * (self.spatial(node) if len(window) == 1 else 1))

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """One per input of adaptive average pooling, nothing for others. Source: fvcore 0.1.5, flop_count."""
        counted = "adaptive_avg_pool2d" in str(node.target)
        return numel(shape(node.args[0])) if counted else 0  # type: ignore[arg-type]

    def lower(self, node: fx.Node, build: Builder) -> bool:
        name, given = build.name(node), build.arguments(node)
        x: fx.Node = given["self"] if "self" in given else given["input"]
        rank = self.spatial(node)
        item = 0 if isinstance(build.graph.dims[node.name], list) else None
        if build.rank(x) != rank + 2 or not build.is_float(x) or "lp_pool" in name \
                or (item == 0 and not build.only_first(node)):
            return False
        sizes = build.shape(x)[2:]
        kind = "max" if "max" in name else "avg"
        if any(size.scale for size in sizes):
            return False
        if "adaptive" in name:
            return self._adaptive(node, build, x, kind, [size.offset for size in sizes], item)
        kernel = per_axis(given["kernel_size"], rank)
        attributes = {
            "kind": kind, "kernel": kernel, "stride": per_axis(given.get("stride") or kernel, rank),
            "padding": [[p, p] for p in per_axis(given.get("padding", 0), rank)],
            "dilation": per_axis(given.get("dilation", 1), rank), "ceil": bool(given.get("ceil_mode", False)),
            "count_include_pad": bool(given.get("count_include_pad", True)),
            "divisor": given.get("divisor_override")}
        build.step("pool", node, (x,), attributes, item=item)
        return True

    def _adaptive(self, node: fx.Node, build: Builder, x: fx.Node, kind: str, sizes: list[int],
                  item: int | None) -> bool:
        """To one position: a reduction; to a divisor of the size: ordinary pooling."""
        wanted = per_axis(build.fixed(node.args[1]), len(sizes))
        rank = len(sizes)
        if all(size == 1 for size in wanted):
            build.step("reduce", node, (x,), {"kind": "mean" if kind == "avg" else "amax",
                                              "axes": list(range(2, rank + 2)), "keepdim": True}, item=item)
        elif all(size % want == 0 for size, want in zip(sizes, wanted, strict=True)):
            kernel = [size // want for size, want in zip(sizes, wanted, strict=True)]
            build.step("pool", node, (x,), {
                "kind": kind, "kernel": kernel, "stride": kernel, "padding": [[0, 0]] * rank, "dilation": [1] * rank,
                "ceil": False, "count_include_pad": True, "divisor": None}, item=item)
        else:
            build.step("adaptive_pool", node, (x,), {"kind": kind, "size": wanted}, item=item)
        return True


class PoolWithIndices(Pool):
    """Max pooling that also returns indices, and adaptive max pooling."""

    matches = aten("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices",
                   "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.AdaptiveMaxPool2d(2), (MAP,)), Sample(lambda: nn.AdaptiveMaxPool1d(2), ((2, 6, 9),)))

    def label(self, node: fx.Node, tape: Tape) -> None:
        shapes: Any = tape.graph.shape(node)
        shape = tuple(shapes[0])
        planes = []
        for plane in tape.planes(node.args[0]):
            if varying(plane) == {1}:
                planes.append(spread(plane.select(0, 0).reshape(plane.shape[1], -1)[:, 0], 1, shape))
            else:
                tape.freeze(node, plane, "its positions are pooled")
        tape.give_list(node, [planes, planes])

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return numel(shape(node.args[0]))  # type: ignore[arg-type]


class Resize(OpRule):
    """Upsampling: nearest, (bi/tri)linear, bicubic; per channel."""

    matches = aten("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d",
                   "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
                   "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.Upsample(scale_factor=2), (MAP,)),
        Sample(lambda: nn.Upsample(size=(7, 9), mode="bilinear", align_corners=False), (MAP,)),
        Sample(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (MAP,)),
        Sample(lambda: nn.Upsample(scale_factor=2, mode="linear"), ((2, 6, 5),)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        mixed = len(tape.shape(node)) - 2
        tape.give(node, pass_channels(node, tape, mixed, "its positions are resampled"))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Outputs times neighbours blended: 2 per axis when linear, 4 per axis when cubic."""
        name, axes = str(node.target), len(shape(node)) - 2
        return numel(shape(node)) * (1 if "nearest" in name else 4 ** axes if "cubic" in name else 2 ** axes)

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """1 per output of 2d nearest, 4 of bilinear, nothing for others. Source: fvcore 0.1.5, flop_count."""
        name = str(node.target)
        scale = 1 if "upsample_nearest2d" in name else 4 if "upsample_bilinear2d" in name else 0
        return scale * numel(shape(node))

    modes: ClassVar[dict[str, str]] = {
        "upsample_nearest": "nearest", "_upsample_nearest_exact": "nearest_exact", "upsample_linear": "linear",
        "upsample_bilinear": "linear", "upsample_trilinear": "linear", "upsample_bicubic": "cubic"}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given, name = build.arguments(node), build.name(node)
        mode, rank = self.modes.get(name[:-2]), build.rank(node) - 2
        sizes = build.shape(node)[2:]
        if mode is None or not build.is_float(node) or any(size.scale for size in sizes):
            return False
        axes = ("scales",) if rank == 1 else ("scales_d", "scales_h", "scales_w")[3 - rank:]
        scales = given["scale_factors"] if "scale_factors" in given else [given.get(axis) for axis in axes]
        build.step("resize", node, (given.get("input", given.get("self")),), {
            "mode": mode, "size": [size.offset for size in sizes],
            "scales": None if scales is None or None in scales else list(scales),
            "align_corners": bool(given.get("align_corners", False))})
        return True


class Pad(OpRule):
    """Constant, reflection, replication and circular padding. Channels padded on are new ones, free to go."""

    matches = aten("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
                   "replication_pad2d", "replication_pad3d", "reflection_pad3d")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.ZeroPad2d(2), (MAP,)), Sample(lambda: nn.ConstantPad2d((1, 0, 2, 1), 0.5), (MAP,)),
        Sample(lambda: nn.ReflectionPad2d(2), (MAP,)), Sample(lambda: nn.ReplicationPad2d(1), (MAP,)),
        Sample(lambda: nn.CircularPad2d(1), (MAP,)),
        sample(lambda x: functional.pad(x, (0, 0, 0, 0, 3, 2)), "zero channels around", MAP),
    )

    @staticmethod
    def amounts(node: fx.Node, rank: int) -> list[tuple[int, int]]:
        """(before, after) for every axis."""
        pads: Sequence[int] = node.args[1]  # type: ignore[assignment]
        pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
        return [(0, 0)] * (rank - len(pairs)) + pairs[::-1]

    def label(self, node: fx.Node, tape: Tape) -> None:
        shape = tape.shape(node)
        amounts = self.amounts(node, len(shape))
        mode = argument(node, 2, "mode", "constant") if "aten.pad." in str(node.target) else str(node.target)
        planes = []
        for plane in tape.planes(node.args[0]):
            live = varying(plane)
            padded = [a for a in live if amounts[a] != (0, 0)]
            if padded and (len(live) > 1 or "constant" not in str(mode) or min(amounts[padded[0]]) < 0):
                tape.freeze(node, plane, "channels are padded with copies of channels")
            elif padded:
                axis, (before, after) = padded[0], amounts[padded[0]]
                vector = plane.transpose(0, axis).reshape(plane.shape[axis], -1)[:, 0]
                planes.append(spread(torch.cat((tape.fresh(before), vector, tape.fresh(after))), axis, shape))
            else:
                for axis in range(plane.dim()):
                    if axis not in live:
                        plane = plane.narrow(axis, 0, 1)
                planes.append(plane.expand(shape))
        tape.give(node, planes)

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        rank = len(sizes.old(node))
        amounts = self.amounts(node, rank)
        new: list[int] = []
        for axis in range(rank - 1, rank - 1 - len(node.args[1]) // 2, -1):  # type: ignore[arg-type]
            before, after = amounts[axis]
            alive = sizes.alive(node, axis)
            new += [before, after] if bool(alive.all()) else [
                int(alive[:before].sum()), int(alive[len(alive) - after:].sum()) if after else 0]
        return node.target, (node.args[0], new, *node.args[2:]), dict(node.kwargs)

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given, name = build.arguments(node), build.name(node)
        if not build.is_fixed(given["pad" if "pad" in given else "padding"]) or not build.is_float(node):
            return False
        mode = given.get("mode", "constant") if name == "pad" else name
        mode = next((m for k, m in (("refl", "reflect"), ("repl", "replicate"), ("circ", "circular")) if k in mode),
                    "constant")
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        pads = build.fixed(node.args[1])
        pairs = [[pads[i], pads[i + 1]] for i in range(0, len(pads), 2)]
        build.step("pad", node, (x,), {"amounts": [[0, 0]] * (build.rank(x) - len(pairs)) + pairs[::-1], "mode": mode,
                                       "value": float(given.get("value") or 0.0)})
        return True


def without(plane: Plane, axes: Iterable[int], shape: Shape) -> Plane:
    """A plane of a tensor whose given axes got another size, or went."""
    kept = len(shape) == plane.dim()
    for axis in sorted(axes, reverse=True):
        plane = plane.narrow(axis, 0, 1) if kept else plane.select(axis, 0)
    return plane.expand(shape)


def give_reduced(node: fx.Node, tape: Tape, planes: Sequence[Plane], axes: Iterable[int]) -> None:
    """The planes of a node, or of each of its results, whose given axes got another size, or went."""
    found: Any = tape.shape(node)
    if isinstance(tape.graph.dims[node.name], list):
        tape.give_list(node, [[without(plane, axes, tuple(shape)) for plane in planes] for shape in found])
    else:
        tape.give(node, [without(plane, axes, found) for plane in planes])


class Reduction(OpRule):
    """Reductions over axes. Sums, p-norms and means over channels are exact to prune (what is gone counts as zero);
    others are not."""

    matches = aten("mean", "sum", "amax", "amin", "max.dim", "min.dim", "max.default", "min.default", "var.correction",
                   "std.correction", "var.dim", "std.dim", "logsumexp", "linalg_vector_norm", "norm.ScalarOpt_dim",
                   "argmax", "argmin", "prod", "any", "all", "cumsum", "topk", "sort", "var_mean.correction")
    meaningful = ("mean", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp")   # on fewer, too
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x.mean((2, 3)), "global average", MAP),
        sample(lambda x: x.mean((2, 3), keepdim=True), "global average, kept axes", MAP),
        sample(lambda x: x.amax((2, 3)), "global max", MAP),
        sample(lambda x: x.sum(1), "sum over channels", MAP),
        sample(lambda x: torch.sort(x, dim=3, stable=True)[0], "stable sort over positions", MAP),
        sample(lambda x: x.mean(1, keepdim=True), "mean over channels", MAP),
        sample(lambda x: x.norm(dim=1, keepdim=True), "norm over channels", MAP),
        sample(lambda x: x.max(1)[0], "max over channels", MAP, prunable=False),
        sample(lambda x: x.std((2, 3)), "deviation over positions", MAP),
        sample(lambda x: x.cumsum(2), "cumsum over positions", MAP),
    )

    def axes(self, node: fx.Node, rank: int) -> set[int]:
        index = 2 if "vector_norm" in str(node.target) or "norm.Scalar" in str(node.target) else 1
        if "topk" in str(node.target):
            index = 2
        default: Any = -1 if any(name in str(node.target) for name in ("topk", "sort")) else None
        axes = argument(node, index, "dim", default)
        if axes is None or axes == []:
            return set(range(rank))
        return {a % rank for a in (axes if isinstance(axes, (list, tuple)) else [axes])}

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        rank = len(tape.shape(x))
        axes = self.axes(node, rank)
        planes = tape.planes(x)
        name = target_name(node).split(".")[1]
        if (name == "sum" or self.positive_norm(node)) and any(axes & varying(p) for p in planes):
            tape.masked.setdefault(node, []).append(x)
            planes = tuple(p for p in planes if not varying(p) <= axes)
        passing = tape.across(node, planes, axes, "it reduces across these channels",
                              inexact=name in self.meaningful, counts=name in ("mean", "counted_mean"))
        give_reduced(node, tape, [plane for plane in passing if not varying(plane) & axes], axes)

    def positive_norm(self, node: fx.Node) -> bool:
        """Whether it is a p-norm to which zeros add nothing."""
        order = argument(node, 1, "ord", argument(node, 1, "p"))
        return "norm" in str(node.target) and (order is None or (isinstance(order, (int, float)) and order > 0))

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        if not sizes.counts(node) or node.target is MEAN:
            return None
        old = sizes.old(x)
        axes = sorted(self.axes(node, len(old)))
        if not any(sizes.changed(x, axis) for axis in axes):
            return None
        dtype = {name: value for name, value in node.kwargs.items() if name == "dtype"}
        return MEAN, (x, axes, bool(argument(node, 2, "keepdim", False)), math.prod(old[axis] for axis in axes)), dtype

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return numel(shape(node.args[0]))  # type: ignore[arg-type]

    def lower(self, node: fx.Node, build: Builder) -> bool:
        name, given = build.name(node), build.arguments(node)
        item = 0 if isinstance(build.graph.dims[node.name], list) else None
        kind = {"max": "amax", "min": "amin"}.get(name, name)
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        dtype = build.dtype(x)
        if kind not in ("mean", "sum", "amax", "amin") or not dtype.is_floating_point \
                or given.get("dtype") not in (None, dtype) or (item == 0 and not build.only_first(node)):
            return False
        axes = sorted(self.axes(node, build.rank(x)))
        build.step("reduce", node, (x,), {"kind": kind, "axes": axes, "keepdim": bool(given.get("keepdim", False))},
                   item=item)
        return True


class CountedMean(Reduction):
    """prunekern::counted_mean: a mean over channels some of which are gone."""

    matches = (MEAN,)
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: MEAN(x, [1], True, 9), "counted mean over channels", MAP),)

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x, given = node.args[0], build.arguments(node)
        dtype = build.dtype(x)  # type: ignore[arg-type]
        if not dtype.is_floating_point or given.get("dtype") not in (None, dtype):
            return False
        axes, shape = sorted(self.axes(node, build.rank(x))), build.shape(x)  # type: ignore[arg-type]
        if not build.rank(node) or any(shape[axis].scale or shape[axis].measured for axis in axes):
            return False
        mean = build.between("reduce", node, (x,), build.shape(node), {
            "kind": "mean", "axes": axes, "keepdim": given["keepdim"]})
        share = torch.tensor([math.prod(shape[axis].offset for axis in axes) / of(node.target, node.args)], dtype=dtype)
        build.step("scale", node, (mean,), {"axis": build.rank(node) - 1}, {
            "scale": build.store(f"{node.name}.scale", share),
            "shift": build.store(f"{node.name}.shift", torch.zeros_like(share))})
        return True


RULES: tuple[OpRule, ...] = (Pool(), PoolWithIndices(), Resize(), Pad(), Reduction(), CountedMean())
