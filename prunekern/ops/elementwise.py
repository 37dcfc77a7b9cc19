"""Elementwise operators: activations, arithmetic with broadcasting, gates, dropout, softmax."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from prunekern.core.activations import ATEN
from prunekern.core.builder import Builder
from prunekern.core.graph import ShapeOf
from prunekern.core.labels import Tape, varying
from prunekern.core.program import Activation as Function
from prunekern.core.program import Epilogue
from prunekern.core.rule import OpRule, Sample, argument, aten, numel


class Pair(nn.Module):
    """A sample's module out of a function."""

    def __init__(self, fn: Any, label: str) -> None:
        super().__init__()
        self.fn, self.label = fn, label

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return self.label


def sample(fn: Any, label: str, *shapes: tuple[int, ...], prunable: bool = True) -> Sample:
    return Sample(lambda: Pair(fn, label), shapes, label, prunable)


MAP = (2, 6, 5, 5)


class Activation(OpRule):
    """Functions of one element: what is removed takes nothing else with it."""

    matches = aten(
        "relu", "relu_", "relu6", "relu6_", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "celu_", "selu",
        "selu_", "gelu", "gelu_", "silu", "silu_", "mish", "mish_", "hardswish", "hardswish_", "hardsigmoid",
        "hardsigmoid_", "hardtanh", "hardtanh_", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "softsign",
        "log_sigmoid", "threshold", "threshold_", "hardshrink", "softshrink", "rrelu", "rrelu_", "exp", "exp_",
        "log", "log1p", "sqrt", "sqrt_", "rsqrt", "square", "abs", "abs_", "neg", "neg_", "sin", "cos", "erf",
        "sign", "round", "floor", "ceil", "reciprocal", "clamp.default", "clamp_.default", "clamp_min.default",
        "clamp_min_.default", "clamp_max.default", "clamp_max_.default", "pow.Tensor_Scalar", "pow_.Scalar",
        "dropout", "dropout_", "feature_dropout", "feature_dropout_", "alpha_dropout", "feature_alpha_dropout",
        "clone", "contiguous", "detach", "detach_", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy",
        "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "isnan", "logical_not", "bitwise_not",
        "nan_to_num", "fill_", "zero_")
    free = ("dropout", "clone", "contiguous", "detach", "alias", "to.", "_to_copy", "type_as", "lift_fresh")
    samples: ClassVar[tuple[Sample, ...]] = tuple(
        Sample(build, (MAP,)) for build in (
            nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
            nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid,
            nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Dropout, nn.Dropout2d, nn.Identity,
            lambda: nn.ReLU(inplace=True), lambda: nn.SiLU(inplace=True), lambda: nn.Hardswish(inplace=True),
            lambda: nn.GELU(approximate="tanh"), lambda: nn.Threshold(0.1, 0.5),
            lambda: Pair(lambda x: (x * x).clamp(min=0.1).sqrt().neg().abs() ** 3, "sqrt/pow chain"))
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        tape.give(node, tape.planes(node.args[0]))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return 0 if any(name in str(node.target) for name in self.free) else numel(shape(node))

    def lower(self, node: fx.Node, build: Builder) -> bool:
        name, given = build.name(node), build.arguments(node)
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        if name in ("clone", "contiguous", "detach", "alias", "lift_fresh_copy") \
                or (name in ("to", "_to_copy", "type_as") and build.dtype(node) == build.dtype(x)) \
                or ("dropout" in name and not given["train"]):
            build.same(node, x)
            return True
        numbers = all(not isinstance(v, fx.Node) for key, v in given.items() if key not in ("self", "input"))
        if name not in ATEN or not numbers or not build.is_float(x) or build.dtype(node) != build.dtype(x) \
                or given.get("training") or "decimals" in given:
            return False
        build.step("activation", node, (x,), epilogue=Epilogue(activation=Function(*ATEN[name](given))))
        return True


class PReLU(OpRule):
    """prelu(x [N, C, ...], weight [C] or [1])."""

    matches = aten("prelu")
    samples: ClassVar[tuple[Sample, ...]] = (Sample(lambda: nn.PReLU(6), (MAP,)), Sample(nn.PReLU, (MAP,)))

    def label(self, node: fx.Node, tape: Tape) -> None:
        x, weight = node.args
        slopes = tape.axis(node, weight, 0)
        if slopes is not None:
            tape.tie(node, tape.along(node, tape.planes(x), 1)[0], slopes)
        tape.give(node, tape.planes(x))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return numel(shape(node))

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        return {"num_parameters": shape(node.args[1])[0]}  # type: ignore[arg-type]

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x, weight = node.args
        if not build.is_constant(weight) or not build.is_float(node):
            return False
        slopes = build.constant(weight)  # type: ignore[arg-type]
        if slopes.numel() == 1:
            build.step("activation", node, (x,),
                       epilogue=Epilogue(activation=Function("leaky_relu", (float(slopes),))))
        else:
            build.step("prelu", node, (x,), {"axis": 1}, {"slope": build.weight(weight)})  # type: ignore[arg-type]
        return True


class Arithmetic(OpRule):
    """Operators of several tensors, with broadcasting: their channels run together."""

    matches = aten(
        "add.Tensor", "add.Scalar", "add_.Tensor", "add_.Scalar", "sub.Tensor", "sub.Scalar", "sub_.Tensor",
        "sub_.Scalar", "rsub", "mul.Tensor", "mul.Scalar", "mul_.Tensor", "mul_.Scalar", "div.Tensor", "div.Scalar",
        "div.Tensor_mode", "div_.Tensor", "div_.Scalar", "maximum", "minimum", "pow.Tensor_Tensor", "where.self",
        "where.ScalarOther", "where.ScalarSelf", "masked_fill", "masked_fill_", "lerp", "addcmul", "addcdiv",
        "atan2", "fmod", "remainder", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "bitwise_and",
        "bitwise_or", "bitwise_xor", "__and__", "__or__", "logical_xor", "multiply.Tensor", "subtract.Tensor",
        "divide.Tensor", "true_divide.Tensor", "floor_divide", "not_equal", "greater", "less", "copy_",
        "clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor", "max.other", "min.other")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: x + y, "x + y", MAP, MAP),
        sample(lambda x, y: x - 2 * y, "x - 2y", MAP, MAP),
        sample(lambda x, y: x * y.sigmoid(), "channel gate", MAP, (2, 6, 1, 1)),
        sample(lambda x, y: x * y.sigmoid(), "spatial gate", MAP, (2, 1, 5, 5)),
        sample(lambda x, y: x / (1 + y.abs()), "x / (1 + |y|)", MAP, MAP),
        sample(lambda x, y: torch.maximum(x, y), "maximum", MAP, MAP),
        sample(lambda x, y: torch.where(y > 0, x, y), "where", MAP, MAP),
        sample(lambda x: x.mul_(2).add_(1), "in-place scalars", MAP),
        sample(lambda x: x + x.mean((2, 3), keepdim=True), "add its mean", MAP),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        tape.give(node, tape.elementwise(node, [*node.args, *node.kwargs.values()]))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return numel(shape(node))

    kinds = ("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "max", "min")

    def lower(self, node: fx.Node, build: Builder) -> bool:
        name, given = build.name(node), build.arguments(node)
        if name == "copy" and build.is_tensor(given["src"]) and build.shape(given["src"]) == build.shape(node) \
                and build.dtype(given["src"]) == build.dtype(node):
            build.same(node, given["src"])
            return True
        if name not in self.kinds or given.get("rounding_mode") is not None:
            return False
        left, right = given["self"], given["other"]
        if name == "rsub":
            name, left, right = "sub", right, left
        dtype = build.dtype(node)
        if not dtype.is_floating_point or any(build.is_tensor(a) and build.dtype(a) != dtype for a in (left, right)):
            return False
        if self._lower_constant(node, build, name, left, right, given.get("alpha", 1)):
            return True
        if given.get("alpha", 1) != 1 or not (build.is_tensor(left) and build.is_tensor(right)):
            return False
        kind = {"max": "maximum", "min": "minimum"}.get(name, name)
        build.step("binary", node, (left, right), {"kind": kind})
        return True

    def _lower_constant(self, node: fx.Node, build: Builder, name: str, left: Any, right: Any, alpha: float) -> bool:
        """One operand is a number, or a constant vector along one axis: a scale and a shift."""
        swapped = not build.is_tensor(left) or build.is_constant(left)
        x, other = (right, left) if swapped else (left, right)
        if not build.is_tensor(x) or build.shape(x) != build.shape(node) or name not in ("add", "sub", "mul", "div") \
                or (name == "div" and swapped):
            return False
        if build.is_constant(other):
            value = build.constant(other)
        elif isinstance(other, (bool, int, float)):
            value = torch.tensor(float(other), dtype=torch.double)
        else:
            return False
        long = [axis - value.dim() for axis, size in enumerate(value.shape) if size > 1]
        if len(long) > 1:
            return False
        axis = long[0] + build.rank(x) if long else min(1, build.rank(x) - 1)
        vector = value.reshape(-1).double()
        one, none = torch.ones_like(vector), torch.zeros_like(vector)
        if name == "mul":
            scale, shift = vector, none
        elif name == "div":
            scale, shift = vector.reciprocal(), none
        elif name == "add":
            scale, shift = (alpha * one, vector) if swapped else (one, alpha * vector)
        else:
            scale, shift = (-alpha * one, vector) if swapped else (one, -alpha * vector)
        dtype = build.dtype(node)
        build.step("scale", node, (x,), {"axis": axis}, {
            "scale": build.store(f"{node.name}.scale", scale.to(dtype)),
            "shift": build.store(f"{node.name}.shift", shift.to(dtype))})
        return True


class GLU(OpRule):
    """glu: the two halves of an axis gate each other, so their channels leave in pairs."""

    matches = aten("glu")
    samples: ClassVar[tuple[Sample, ...]] = (sample(lambda x: functional.glu(x, 1), "glu", MAP),)

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        axis: int = argument(node, 1, "dim", -1) % len(tape.shape(x))
        half = tape.shape(node)[axis]
        kept = []
        for plane in tape.planes(x):
            first, second = plane.narrow(axis, 0, half), plane.narrow(axis, half, half)
            if axis in varying(plane):
                tape.unify(first, second)
            kept.append(first)
        tape.give(node, kept)

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return 2 * numel(shape(node))

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x, half = node.args[0], build.shape(node)
        axis: int = argument(node, 1, "dim", -1) % len(half)
        if half[axis].scale or not build.is_float(node):
            return False
        where = {"kind": "slice", "axis": axis, "step": 1}
        first, second = (build.between("move", node, (x,), half, {**where, "start": start})
                         for start in (0, half[axis].offset))
        gate = build.between("activation", node, (second,), half, epilogue=Epilogue(activation=Function("sigmoid")))
        build.step("binary", node, (first, gate), {"kind": "mul"})
        return True


class Softmax(OpRule):
    """softmax and log_softmax: channels on the normalised axis stay, others pass."""

    matches = aten("softmax.int", "log_softmax.int", "_softmax", "_log_softmax")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x.softmax(-1), "softmax over positions", MAP),
        sample(lambda x: x.softmax(1), "softmax over channels", MAP, prunable=False),
        sample(lambda x: x.log_softmax(1), "log_softmax over channels", MAP, prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        axis: int = argument(node, 1) % len(tape.shape(node))
        tape.give(node, tape.across(node, tape.planes(node.args[0]), (axis,), "softmax runs across these channels",
                                    inexact=True))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return 3 * numel(shape(node))

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x, axis = node.args[:2]
        if not build.is_float(x) or build.dtype(node) != build.dtype(x) or not build.rank(x):  # type: ignore[arg-type]
            return False
        build.step("softmax", node, (x,), {"axis": axis % build.rank(x), "log": "log" in build.name(node)})  # type: ignore[operator]
        return True


RULES: tuple[OpRule, ...] = (Activation(), PReLU(), Arithmetic(), GLU(), Softmax())
