"""Contractions with weights: convolutions, transposed convolutions, linear layers, embeddings; matmul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from prunekern.core.arguments import per_axis
from prunekern.core.builder import Builder
from prunekern.core.graph import Shape, ShapeOf
from prunekern.core.labels import FIXED, Planes, Tape, compact, spread, varying
from prunekern.core.program import Epilogue
from prunekern.core.rule import OpRule, Rewritten, Sample, Sizes, argument, aten, numel
from prunekern.ops.elementwise import Pair


def channel_axis(node: fx.Node, tape_shape: ShapeOf) -> int:
    """Axis of the channels of a convolution's input: 1 with a batch, 0 without."""
    weight, x = node.args[1], node.args[0]
    return len(tape_shape(x)) - len(tape_shape(weight)) + 1  # type: ignore[arg-type]


class Convolution(OpRule):
    """conv1d/2d/3d with stride, padding (also strings), dilation and groups. Weight [O, I/g, k...]."""

    matches = aten("conv1d", "conv2d", "conv3d")
    group_index = 6
    rows_axis, table_axis = 0, 1     # the axis cut into groups, and the axis that each group has of its own
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.Conv2d(6, 8, 3), ((2, 6, 7, 7),)),
        Sample(lambda: nn.Conv2d(6, 13, 3, stride=2, padding=1, bias=False), ((2, 6, 9, 8),)),
        Sample(lambda: nn.Conv2d(6, 9, (1, 3), padding="same", dilation=(1, 2)), ((2, 6, 7, 9),)),
        Sample(lambda: nn.Conv2d(6, 7, 3, padding="valid"), ((2, 6, 7, 7),)),
        Sample(lambda: nn.Conv2d(6, 7, 2, padding="same"), ((2, 6, 7, 7),)),
        Sample(lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), ((2, 6, 7, 7),)),
        Sample(lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), ((2, 6, 7, 7),)),
        Sample(lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), ((2, 6, 7, 7),)),
        Sample(lambda: nn.Sequential(nn.GroupNorm(3, 6), nn.Conv2d(6, 12, 3, groups=3), nn.GroupNorm(3, 12)),
               ((2, 6, 7, 7),), name="Conv2d of as many groups as the norms beside it"),
        Sample(lambda: nn.Conv2d(1, 5, 3), ((2, 1, 7, 7),), prunable=False),
        Sample(lambda: nn.Conv2d(6, 1, 3), ((2, 6, 7, 7),)),
        Sample(lambda: nn.Conv2d(13, 37, 1), ((1, 13, 5, 5),)),
        Sample(lambda: nn.Conv2d(6, 5, 3, padding=2, padding_mode="reflect"), ((2, 6, 7, 7),)),
        Sample(lambda: nn.Conv1d(6, 8, 3, padding=2, dilation=2), ((2, 6, 11),)),
        Sample(lambda: nn.Conv1d(6, 6, 4, stride=3, groups=2), ((2, 6, 11),)),
        Sample(lambda: nn.Conv3d(6, 4, (1, 2, 3), padding=(0, 1, 1)), ((2, 6, 4, 5, 5),)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        groups = tape.value(argument(node, self.group_index, "groups", 1))
        axis = channel_axis(node, tape.shape)
        source, rest = tape.consume(node, x, axis)  # type: ignore[arg-type]
        passing = self._positions(node, tape, rest, axis)
        self._freeze_kernel(node, tape, weight)
        if groups == 1:
            tape.tie(node, source, tape.read(node, weight, self._in_axis))
            out = tape.produce(node, weight, self._out_axis)
        else:
            out = self._grouped(node, tape, source, weight, groups)
        if isinstance(bias, fx.Node):
            tape.tie(node, out, tape.axis(node, bias, 0))
        tape.give(node, (*passing, *(() if out is None else (spread(out, axis, tape.shape(node)),))))

    def _positions(self, node: fx.Node, tape: Tape, planes: Planes, axis: int) -> list[Tensor]:
        """The planes along samples (heads may be among them), and those along positions where the kernel has one
        element and nothing else is done."""
        kernel, sizes = tape.shape(node.args[1])[2:], (tape.shape(node.args[0]), tape.shape(node))  # type: ignore[arg-type]
        passing = []
        for plane in planes:
            if all(a < axis or (kernel[a - axis - 1] == 1 and sizes[0][a] == sizes[1][a]) for a in varying(plane)):
                passing.append(compact(plane).expand(sizes[1]))
            else:
                tape.freeze(node, plane, "its positions are mixed by a convolution")
        return passing

    _in_axis, _out_axis = 1, 0

    def _freeze_kernel(self, node: fx.Node, tape: Tape, weight: Any) -> None:
        for plane in tape.planes(weight):
            if min(varying(plane)) > 1:
                tape.freeze(node, plane)

    def _grouped(self, node: fx.Node, tape: Tape, source: Tensor | None, weight: Any, groups: int) -> Tensor | None:
        """Row r of the input feeds row r of the output only; every row must keep as many channels."""
        rows = tape.axis(node, weight, self.rows_axis)         # cut into groups: [g * n]
        tape.produce(node, weight, self._out_axis)
        tape.read(node, weight, self._in_axis)
        name = tape.graph.fqn(weight)
        per_group = tape.shape(weight)[self.table_axis]
        far = source if self._in_axis == 1 else None           # the side that each group has of its own
        if self._in_axis == 0:                                  # transposed: the output side is the table
            tape.tie(node, source, rows)
            far = tape.fresh(groups * per_group)
        own = tape.axis(node, weight, self.table_axis)         # replaced by the table, where there is one
        if far is None and name is not None and per_group > 1:   # fixed inputs hold the table for other calls, too
            fixed = torch.full((groups, per_group), FIXED)
            tape.freeze(node, tape.tables.setdefault((name, self.table_axis), fixed))
        if name is None and per_group > 1 and self._in_axis == 1 and rows is not None:
            # Computed weights are cut where they come from: every group reads the same of its channels.
            tape.tie(node, None if far is None else far.view(groups, -1), own)
            tape.balanced.append(rows.view(groups, -1))
            return rows
        if rows is None or far is None or (name is None and per_group > 1):
            for labels in (far, own, rows if rows is None or rows.numel() == groups else None):
                if labels is not None:
                    tape.freeze(node, labels)
            if rows is not None and rows.numel() > groups:
                tape.balanced.append(rows.view(groups, -1))    # fixed inputs: outputs go equally from each group
            return rows if self._in_axis == 1 else far
        rows_table, far_table = rows.view(groups, -1), far.view(groups, -1)
        if per_group == 1 or rows_table.shape[1] == 1:
            tape.unify(rows_table, far_table[:, :1])           # a group is one channel: it leaves as a whole
            tape.unify(far_table, far_table[:, :1])
        else:
            tape.facing.append((rows_table, far_table))
        if per_group > 1 and name is not None:      # called again: the same weights read (or issue) both
            tape.unify(tape.tables.setdefault((name, self.table_axis), far_table), far_table)
        return rows if self._in_axis == 1 else far

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """N * prod(out) * O * I/g * prod(k): every output position meets each kernel once.

        Padded zeros count like any other input. Source: Sze, Chen, Yang, Emer, "Efficient Processing of Deep
        Neural Networks" (2017), equation 1; Molchanov et al., "Pruning CNNs" (2017), appendix A.1.
        """
        out, weight = shape(node), shape(node.args[1])  # type: ignore[arg-type]
        spatial = len(weight) - 2
        batch = out[0] if len(out) == spatial + 2 else 1
        return batch * numel(out[-spatial:]) * numel(weight)

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One addition per output where there is a bias."""
        return numel(shape(node)) if argument(node, 2, "bias") is not None else 0

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """The MACs; none where padding is a string, as fvcore does not know ``aten::_convolution_mode``."""
        return 0 if str(node.target).endswith(".padding") else self.macs(node, shape)

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        axis = channel_axis(node, shape)
        weight, channels = shape(node.args[1]), shape(node.args[0])[axis]  # type: ignore[arg-type]
        if isinstance(argument(node, self.group_index, "groups", 1), fx.Node):
            return {}                                              # the samples of a batch are the groups
        return {"in_channels": channels, "out_channels": shape(node)[axis],
                "groups": channels // weight[1] if self._in_axis == 1 else shape(node)[axis] // weight[1]}

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        groups = argument(node, self.group_index, "groups", 1)
        if groups == 1 or isinstance(groups, fx.Node):
            return None
        new = self.attributes(node, sizes.new)["groups"]
        if new == groups:
            return None
        if self.group_index < len(node.args):
            args = list(node.args)
            args[self.group_index] = new
            return node.target, tuple(args), dict(node.kwargs)
        return node.target, tuple(node.args), {**node.kwargs, "groups": new}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given = build.arguments(node)
        weight, bias = given["weight"], given.get("bias")
        if not build.is_constant(weight) or not (bias is None or build.is_constant(bias)):
            return False
        kernel = tuple(build.constant(weight).shape[2:])
        if build.rank(node) != len(kernel) + 2 or not build.is_float(node):
            return False
        attributes = self.geometry(given, kernel)
        attributes["groups"] = given.get("groups", 1)
        epilogue = Epilogue(bias=None if bias is None else build.weight(bias))
        build.step(self.op, node, (given["input"],), attributes, {"weight": build.weight(weight)}, epilogue)
        return True

    op = "conv"

    def geometry(self, given: dict[str, Any], kernel: tuple[int, ...]) -> dict[str, Any]:
        """A Step's attributes; padding strings become (low, high) pairs as torch resolves them."""
        rank = len(kernel)
        dilation = per_axis(given.get("dilation", 1), rank)
        padding = given.get("padding", 0)
        if padding == "same":     # an odd total puts the extra element behind
            totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            pairs = [[total // 2, total - total // 2] for total in totals]
        else:
            pairs = [[p, p] for p in per_axis(0 if padding == "valid" else padding, rank)]
        return {"kernel": list(kernel), "stride": per_axis(given.get("stride", 1), rank), "padding": pairs,
                "dilation": dilation}


class TransposedConvolution(Convolution):
    """conv_transpose1d/2d/3d. Weight [I, O/g, k...]; every input pixel is multiplied with the whole kernel."""

    matches = aten("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    _in_axis, _out_axis = 0, 1
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), ((2, 6, 5, 5),)),
        Sample(lambda: nn.ConvTranspose2d(6, 5, 2, stride=2, bias=False), ((2, 6, 5, 4),)),
        Sample(lambda: nn.ConvTranspose2d(6, 4, 3, groups=2, dilation=2), ((2, 6, 5, 5),)),
        Sample(lambda: nn.ConvTranspose2d(6, 6, 3, groups=6), ((2, 6, 5, 5),)),
        Sample(lambda: nn.ConvTranspose1d(6, 7, 4, stride=2), ((2, 6, 5),)),
        Sample(lambda: nn.ConvTranspose3d(6, 3, 2, stride=2), ((2, 6, 3, 3, 3),)),
    )

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """N * prod(in) * I * O/g * prod(k): the transpose of a convolution from the output to the input.

        Products that padding cuts off are counted, as both fvcore and FlopCounterMode do. Source: Dumoulin,
        Visin, "A guide to convolution arithmetic for deep learning" (2016), section 4.
        """
        x, weight = shape(node.args[0]), shape(node.args[1])  # type: ignore[arg-type]
        spatial = len(weight) - 2
        batch = x[0] if len(x) == spatial + 2 else 1
        return batch * numel(x[-spatial:]) * numel(weight)

    op = "conv_transpose"

    def geometry(self, given: dict[str, Any], kernel: tuple[int, ...]) -> dict[str, Any]:
        return {**super().geometry(given, kernel),
                "output_padding": per_axis(given.get("output_padding", 0), len(kernel))}


def label_product(node: fx.Node, tape: Tape, x: Any, weight: Any, inputs: int, bias: Any = None) -> None:
    """x [..., I] times a matrix whose axis ``inputs`` holds the I: its other axis issues the output's channels."""
    source, rest = tape.consume(node, x, -1)
    tape.tie(node, source, tape.read(node, weight, inputs))
    out = tape.produce(node, weight, 1 - inputs)
    if isinstance(bias, fx.Node):
        tape.tie(node, out, tape.axis(node, bias, 0))
    shape = tape.shape(node)
    planes: list[Tensor] = [p.narrow(p.dim() - 1, 0, 1).expand(shape) for p in rest]
    if out is not None:
        planes.append(spread(out, len(shape) - 1, shape))
    tape.give(node, planes)


class Linear(OpRule):
    """linear(x [..., I], weight [O, I], bias [O])."""

    matches = aten("linear")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.Linear(6, 8), ((2, 6),)),
        Sample(lambda: nn.Linear(37, 13, bias=False), ((3, 37),)),
        Sample(lambda: nn.Linear(6, 1), ((1, 6),)),
        Sample(lambda: nn.Linear(5, 8), ((2, 6, 5),), name="Linear over tokens"),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        label_product(node, tape, node.args[0], node.args[1], 1, argument(node, 2, "bias"))

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """rows * I * O: a matrix product [rows, I] x [I, O] (Golub, Van Loan, "Matrix Computations", 1.1)."""
        return numel(shape(node)) * shape(node.args[1])[1]  # type: ignore[arg-type]

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One addition per output where there is a bias."""
        return numel(shape(node)) if argument(node, 2, "bias") is not None else 0

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        out, inputs = shape(node.args[1])  # type: ignore[arg-type]
        return {"in_features": inputs, "out_features": out}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given = build.arguments(node)
        weight, bias = given["weight"], given.get("bias")
        if not build.is_constant(weight) or not (bias is None or build.is_constant(bias)) \
                or build.rank(weight) != 2 or build.rank(node) < 2 or not build.is_float(node):
            return False
        epilogue = Epilogue(bias=None if bias is None else build.weight(bias))
        build.step("linear", node, (given["input"],), {}, {"weight": build.weight(weight)}, epilogue)
        return True


class Embedding(OpRule):
    """embedding(weight [V, D], indices): the width D is prunable, the rows are the vocabulary and stay."""

    matches = aten("embedding.default")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.Embedding(11, 6), ((2, 5),), prunable=False,
               draw=lambda shape: torch.randint(0, 11, shape)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        weight, shape = node.args[0], tape.shape(node)
        rows = tape.axis(node, weight, 0)
        if rows is not None:
            tape.freeze(node, rows)
        tape.freeze_planes(node, tape.planes(node.args[1]), "indices are looked up")
        width = tape.produce(node, weight, 1)
        tape.give(node, () if width is None else (spread(width, len(shape) - 1, shape),))

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        rows, width = shape(node.args[0])  # type: ignore[arg-type]
        return {"num_embeddings": rows, "embedding_dim": width}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        weight, indices = node.args[:2]
        if not build.is_constant(weight):
            return False
        build.step("embedding", node, (indices,), {}, {"weight": build.weight(weight)})  # type: ignore[arg-type]
        return True


class Multiplied(nn.Module):
    """A sample's module: a bare weight [I, O] on the right of ``@``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


BATCH = "ABCDEFGHIJ"          # letters of leading axes, aligned at the right


def label_einsum(node: fx.Node, tape: Tape, args: Sequence[fx.Node], terms: Sequence[str], out: str) -> Planes:
    """Label a product of tensors given by an einsum's letters; what is removed counts as zero at every operand.

    Axes of weights count as issuing channels where their letter is in ``out``, else as reading them.
    """
    for arg, term in zip(args, terms, strict=True):
        if tape.graph.fqn(arg) is None:
            tape.masked.setdefault(node, []).append(arg)
            continue
        for axis, letter in enumerate(term):
            shared = sum(letter in other for other in terms) > 1
            if letter not in out:
                tape.read(node, arg, axis)
            elif not shared:
                tape.produce(node, arg, axis)
    return tape.contract(node, [(tape.planes(arg), term, tape.shape(arg))
                                for arg, term in zip(args, terms, strict=True)], out)


class MatMul(OpRule):
    """matmul, mm, bmm, addmm, baddbmm of weights or activations. What is contracted leaves on both sides."""

    matches = aten("matmul", "bmm", "mm", "addmm", "baddbmm")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: Pair(torch.matmul, "matmul"), ((2, 6, 5), (2, 5, 7))),
        Sample(lambda: Pair(torch.matmul, "matmul of heads"), ((2, 3, 6, 5), (2, 3, 5, 1))),
        Sample(lambda: Pair(torch.bmm, "bmm"), ((2, 6, 13), (2, 13, 37))),
        Sample(lambda: Pair(torch.baddbmm, "baddbmm"), ((2, 6, 7), (2, 6, 5), (2, 5, 7))),
        Sample(lambda: Multiplied(6, 9), ((2, 6),), "matrix on the right"),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        added = "add" in str(node.target)
        left, right = node.args[1:3] if added else node.args[:2]
        ranks = len(tape.shape(left)), len(tape.shape(right))  # type: ignore[arg-type]
        lead = BATCH[:max(0, max(ranks) - 2)]
        first = "k" if ranks[0] == 1 else lead[len(lead) - ranks[0] + 2:] + "mk"
        second = "k" if ranks[1] == 1 else lead[len(lead) - ranks[1] + 2:] + "kn"
        out = lead + ("m" if ranks[0] > 1 else "") + ("n" if ranks[1] > 1 else "")
        planes = label_einsum(node, tape, (left, right), (first, second), out)  # type: ignore[arg-type]
        if added:
            shape, bias = tape.shape(node), node.args[0]
            planes = tape.combine(node, [(planes, shape), (tape.planes(bias), tape.shape(bias))], shape)  # type: ignore[arg-type]
        tape.give(node, planes)

    def _operands(self, node: fx.Node, shape: ShapeOf) -> tuple[Shape, Shape]:
        left, right = node.args[1:3] if "add" in str(node.target) else node.args[:2]
        return shape(left), shape(right)  # type: ignore[arg-type]

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """batch * M * N * K for [batch, M, K] x [batch, K, N], batches broadcast; a vector is one row or column.

        Source: Golub, Van Loan, "Matrix Computations", section 1.1.
        """
        left, _ = self._operands(node, shape)
        return numel(shape(node)) * left[-1]

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One addition per output where something is added."""
        return numel(shape(node)) if "add" in str(node.target) else 0

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """Elements on the left times columns on the right: too few where the left is broadcast over a batch.

        Nothing for ``baddbmm``, which fvcore does not know; it fails on a vector on the right, which counts
        as usual here. Source: fvcore 0.1.5, jit_handles.
        """
        if "baddbmm" in str(node.target):
            return 0
        left, right = self._operands(node, shape)
        return numel(left) * right[-1] if len(right) > 1 else self.macs(node, shape)

    def lower(self, node: fx.Node, build: Builder) -> bool:
        if build.name(node) not in ("matmul", "bmm", "mm") or not build.is_float(node):
            return False
        left, right = node.args[:2]
        if build.rank(left) < 2 or build.rank(right) < 2:
            return False
        if build.is_constant(right) and build.rank(right) == 2:
            weight = build.store(f"{node.name}.weight", build.constant(right).t().contiguous())  # type: ignore[arg-type]
            build.step("linear", node, (left,), {}, {"weight": weight})
        else:
            build.step("matmul", node, (left, right))
        return True


RULES: tuple[OpRule, ...] = (Convolution(), TransposedConvolution(), Linear(), Embedding(), MatMul())
