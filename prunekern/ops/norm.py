"""Normalisations: batch, instance, group, layer and RMS norm."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from prunekern.core.builder import Builder
from prunekern.core.counted import (
    GROUP_NORM,
    LAYER_NORM,
    RMS_NORM,
    CountedGroupNorm,
    CountedLayerNorm,
    CountedRMSNorm,
    of,
)
from prunekern.core.graph import ShapeOf
from prunekern.core.labels import Tape, varying
from prunekern.core.rule import OpRule, Rewritten, Sample, Sizes, argument, aten, numel

ACROSS = "it normalises across channels (they leave with the policy norms='counted')"


def tie_vectors(node: fx.Node, tape: Tape, channels: Tensor | None, vectors: tuple[Any, ...]) -> None:
    for vector in vectors:
        if isinstance(vector, fx.Node):
            tape.tie(node, channels, tape.axis(node, vector, 0))


class BatchNorm(OpRule):
    """batch_norm(x [N, C, ...], weight, bias, running_mean, running_var): per channel, exact to prune."""

    matches = aten("batch_norm")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.BatchNorm2d(6), ((2, 6, 5, 5),)),
        Sample(lambda: nn.BatchNorm2d(6, affine=False), ((2, 6, 5, 5),)),
        Sample(lambda: nn.BatchNorm1d(6), ((3, 6),)),
        Sample(lambda: nn.BatchNorm1d(13), ((3, 13, 4),)),
        Sample(lambda: nn.BatchNorm3d(6), ((2, 6, 2, 3, 3),)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x = node.args[0]
        if self.own_statistics(node):
            for plane in tape.planes(x):
                if varying(plane) != {1}:
                    tape.freeze(node, plane, "its positions are normalised")
        channels, _ = tape.along(node, tape.planes(x), 1)
        tie_vectors(node, tape, channels, tuple(node.args[1:5]))
        tape.give(node, tape.planes(x))

    def own_statistics(self, node: fx.Node) -> bool:
        """Whether a channel is normalised by the mean and variance of its own values in this call."""
        return node.args[3] is None or bool(node.args[5])

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One scale and one shift per element, the statistics being known."""
        return 2 * numel(shape(node))

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """With statistics of its input like any other norm. Source: fvcore 0.1.5, jit_handles.batchnorm_flop_jit."""
        return numel(shape(node)) * ((2 if node.args[1] is not None else 1) + 3 * bool(argument(node, 5, "training")))

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        return {"num_features": shape(node)[1]}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given = build.arguments(node)
        return not given["training"] and lower_as_scale(node, build, given)


def lower_as_scale(node: fx.Node, build: Builder, given: dict[str, Any]) -> bool:
    """Normalisation by stored statistics is a scale and a shift per channel, computed here in fp64."""
    vectors = [given.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if vectors[2] is None or vectors[3] is None or not build.is_float(node) \
            or not all(v is None or build.is_constant(v) for v in vectors):
        return False
    gain, shift, mean, variance = (None if v is None else build.constant(v).double() for v in vectors)
    scale = (variance + given["eps"]).rsqrt()
    scale = scale if gain is None else scale * gain
    shift = -mean * scale if shift is None else shift - mean * scale  # type: ignore[operator]
    dtype = build.dtype(node)
    build.step("scale", node, (given["input"],), {"axis": 1}, {
        "scale": build.store(f"{node.name}.scale", scale.to(dtype)),
        "shift": build.store(f"{node.name}.shift", shift.to(dtype))})
    return True


def lower_as_norm(node: fx.Node, build: Builder, op: str, attributes: dict[str, Any]) -> bool:
    """A normalisation by statistics of its input, with constant gain and shift where it has them."""
    given = build.arguments(node)
    vectors = {name: given[name] for name in ("weight", "bias") if given.get(name) is not None}
    if not build.is_float(node) or not all(build.is_constant(v) for v in vectors.values()):
        return False
    eps = given.get("eps", None if op == "rms_norm" else 1e-5)      # as the operators' schemas have it
    attributes["eps"] = torch.finfo(build.dtype(node)).eps if eps is None else eps
    build.step(op, node, (given["input"],), attributes, {role: build.weight(v) for role, v in vectors.items()})
    return True


class InstanceNorm(BatchNorm):
    """instance_norm over the positions of each channel: exact for channels, positions must stay."""

    matches = aten("instance_norm")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.InstanceNorm2d(6), ((2, 6, 5, 5),)),
        Sample(lambda: nn.InstanceNorm2d(6, affine=True), ((2, 6, 5, 5),)),
        Sample(lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), ((2, 6, 5, 5),)),
        Sample(lambda: nn.InstanceNorm1d(6), ((2, 6, 9),)),
    )

    def own_statistics(self, node: fx.Node) -> bool:
        return True

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Two for the statistics, three to apply them."""
        return 5 * numel(shape(node))

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """Source: fvcore 0.1.5, jit_handles.norm_flop_counter."""
        return numel(shape(node)) * (5 if node.args[1] is not None else 4)

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given = build.arguments(node)
        if not given["use_input_stats"]:
            return lower_as_scale(node, build, given)
        channels = build.shape(node)[1]
        if channels.scale:
            return False
        return lower_as_norm(node, build, "group_norm", {"groups": channels.offset})


class GroupNorm(OpRule):
    """group_norm: a whole normalisation group leaves; of a single one channels do, and are counted on."""

    matches = aten("group_norm")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.GroupNorm(3, 6), ((2, 6, 5, 5),)),
        Sample(lambda: nn.GroupNorm(6, 6, affine=False), ((2, 6, 5, 5),)),
        Sample(lambda: nn.GroupNorm(1, 6), ((2, 6, 5, 5),)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x, groups = node.args[0], argument(node, 1)
        channels, rest = tape.along(node, tape.planes(x), 1)
        tape.freeze_planes(node, rest, "its positions are normalised")
        if channels is not None:
            table = channels.view(groups, -1)
            if groups > 1:
                tape.unify(table, table[:, :1])
            else:
                tape.across(node, tape.planes(x), (1,), ACROSS, inexact=True, counts=True)
        tie_vectors(node, tape, channels, (argument(node, 2, "weight"), argument(node, 3, "bias")))
        tape.give(node, tape.planes(x))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Two for the statistics, three to apply them."""
        return 5 * numel(shape(node))

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """Source: fvcore 0.1.5, jit_handles.norm_flop_counter."""
        return numel(shape(node)) * (5 if argument(node, 2, "weight") is not None else 4)

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        channels, before = shape(node)[1], int(node.meta["val"].shape[1])
        return {"num_channels": channels, "num_groups": max(1, node.args[1] * channels // before)}  # type: ignore[operator]

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        if sizes.counts(node):
            given = (x, 1, argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5))
            return (GROUP_NORM, (*given, sizes.old(x)[1]), {}) if sizes.changed(x, 1) else None
        groups = self.attributes(node, sizes.new)["num_groups"]
        return node.target, (x, groups, *node.args[2:]), dict(node.kwargs)

    def lower(self, node: fx.Node, build: Builder) -> bool:
        return lower_as_norm(node, build, "group_norm", {"groups": node.args[1]})


class CountedGroupNormRule(GroupNorm):
    """prunekern::counted_group_norm: all channels in one group, of which some are gone."""

    matches = (GROUP_NORM,)
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: counted(CountedGroupNorm(1, 6), 9), ((2, 6, 5, 5),), name="CountedGroupNorm"),)

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        return None

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """fvcore does not know it."""
        return 0

    def lower(self, node: fx.Node, build: Builder) -> bool:
        return lower_as_norm(node, build, "group_norm", {"groups": 1, "of": of(node.target, node.args)})


class LayerNorm(OpRule):
    """layer_norm and rms_norm over the last axes: channels in those axes are counted on, others pass."""

    matches = aten("layer_norm", "rms_norm")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.LayerNorm(5), ((2, 6, 5),), name="LayerNorm over positions"),
        Sample(lambda: nn.LayerNorm((6, 5)), ((2, 6, 5),), name="LayerNorm over channels"),
        Sample(lambda: nn.RMSNorm(5), ((2, 6, 5),), name="RMSNorm over positions"),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x, normalised = node.args[0], node.args[1]
        shape = tape.shape(x)  # type: ignore[arg-type]
        last = range(len(shape) - len(normalised), len(shape))  # type: ignore[arg-type]
        passing = tape.across(node, tape.planes(x), last, ACROSS, inexact=True, counts=True)
        vectors = [v for v in (argument(node, 2, "weight"), argument(node, 3, "bias")) if isinstance(v, fx.Node)]
        tape.give(node, tape.combine(node, [(passing, shape), *((tape.planes(v), tape.shape(v)) for v in vectors)],
                                     shape))

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        return {"normalized_shape": self._normalised(node, shape(node.args[0]))}  # type: ignore[arg-type]

    def _normalised(self, node: fx.Node, shape: Any) -> tuple[int, ...]:
        return tuple(shape[len(shape) - len(node.args[1]):])  # type: ignore[arg-type]

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        new, old = (self._normalised(node, shape(x)) for shape in (sizes.new, sizes.old))
        if new == old:
            return None
        if sizes.counts(node) and node.target not in (LAYER_NORM, RMS_NORM):
            return self._counted(node, list(new), math.prod(old))
        return node.target, (x, list(new), *node.args[2:]), dict(node.kwargs)

    def _counted(self, node: fx.Node, shape: list[int], count: int) -> Rewritten:
        x, weight = node.args[0], argument(node, 2, "weight")
        if "rms" in str(node.target):
            return RMS_NORM, (x, shape, weight, argument(node, 3, "eps"), count), {}
        return LAYER_NORM, (x, shape, weight, argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5), count), {}

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Two for the statistics, three to apply them."""
        return 5 * numel(shape(node))

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """fvcore does not know RMS norm. Source: fvcore 0.1.5, jit_handles.norm_flop_counter."""
        if "rms" in str(node.target):
            return 0
        return numel(shape(node)) * (5 if argument(node, 2, "weight") is not None else 4)

    def lower(self, node: fx.Node, build: Builder) -> bool:
        return lower_as_norm(node, build, build.name(node), {"axes": len(node.args[1])})  # type: ignore[arg-type]


class CountedLayerNormRule(LayerNorm):
    """prunekern::counted_layer_norm and counted_rms_norm: norms over the last axes, of which some channels are gone."""

    matches = (LAYER_NORM, RMS_NORM)
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: counted(CountedLayerNorm(5), 8), ((2, 6, 5),), name="CountedLayerNorm over positions"),
        Sample(lambda: counted(CountedLayerNorm((6, 5)), 45), ((2, 6, 5),), name="CountedLayerNorm over channels"),
        Sample(lambda: counted(CountedRMSNorm((6, 5)), 45), ((2, 6, 5),), name="CountedRMSNorm over channels"),
    )

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """fvcore does not know them."""
        return 0

    def lower(self, node: fx.Node, build: Builder) -> bool:
        axes, given = len(node.args[1]), build.arguments(node)  # type: ignore[arg-type]
        if node.target is LAYER_NORM:
            return lower_as_norm(node, build, "layer_norm", {"axes": axes, "of": of(node.target, node.args)})
        weight = given["weight"]
        if not build.is_float(node) or not (weight is None or build.is_constant(weight)):
            return False
        shape = [dim.offset for dim in build.shape(node)[-axes:]]
        more = of(node.target, node.args) / math.prod(shape)
        # x / sqrt(mean / more + eps) = sqrt(more) x / sqrt(mean + more eps): an rms norm of what remains
        gain = torch.ones(shape, dtype=torch.double) if weight is None else build.constant(weight).double()
        dtype = build.dtype(node)
        eps = torch.finfo(dtype).eps if given["eps"] is None else given["eps"]
        build.step("rms_norm", node, (given["input"],), {"axes": axes, "eps": eps * more}, {
            "weight": build.store(f"{node.name}.weight", (gain * more ** 0.5).to(dtype))})
        return True


def counted(module: nn.Module, count: int) -> nn.Module:
    """A counted norm that counts to a number."""
    module.of = count  # type: ignore[assignment]
    return module


RULES: tuple[OpRule, ...] = (BatchNorm(), InstanceNorm(), GroupNorm(), CountedGroupNormRule(), LayerNorm(),
                             CountedLayerNormRule())
