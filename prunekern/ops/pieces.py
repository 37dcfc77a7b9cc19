"""Tensors put together and taken apart: cat and stack, split and chunk, slice, narrow and select."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from prunekern.core.builder import Builder
from prunekern.core.graph import Dim, Shape
from prunekern.core.labels import Plane, Tape, compact, varying
from prunekern.core.rule import OpRule, Rewritten, Sample, Sizes, argument, aten
from prunekern.ops.elementwise import MAP, sample
from prunekern.ops.movement import Move, lower_select


class Concatenate(OpRule):
    """cat and stack: label vectors are joined along the axis; along all others the operands run together."""

    matches = aten("cat", "concat", "stack")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: torch.cat((x, y), 1), "cat channels", MAP, (2, 7, 5, 5)),
        sample(lambda x, y: torch.cat((x, y), 2), "cat rows", MAP, MAP),
        sample(lambda x: torch.cat((x, x), 1), "cat with itself", MAP),
        sample(lambda x, y: torch.stack((x, y), 2).sum(2), "stack and sum", MAP, MAP),
        sample(lambda x, y: torch.stack((x, y), 1).flatten(1, 2), "stack and flatten", MAP, MAP),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        tensors: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        shape = tape.shape(node)
        axis = argument(node, 1, "dim", 0) % len(shape)
        stacked = "stack" in str(node.target)
        pieces, pairs = [], []
        for tensor in tensors:
            planes, size = tape.planes(tensor), tape.shape(tensor)
            if size == (0,):
                continue
            if stacked:
                planes, size = tuple(p.unsqueeze(axis) for p in planes), (*size[:axis], 1, *size[axis:])
            hits = [p for p in planes if axis in varying(p)]
            if len(hits) > 1:
                tape.freeze_planes(node, tuple(hits), "two kinds of channels share the joined axis")
                hits = []
            nobody = torch.zeros((1,) * len(size), dtype=torch.long).expand(size)
            pieces.append(hits[0] if hits else nobody)
            rest = [p for p in planes if axis not in varying(p)]
            pairs.append(([p.narrow(axis, 0, 1) for p in rest], (*size[:axis], 1, *size[axis + 1:])))
        merged = tape.combine(node, pairs, (*shape[:axis], 1, *shape[axis + 1:]))
        tape.give(node, [*(p.expand(shape) for p in merged), *self._joined(pieces, axis, shape)])

    def _joined(self, pieces: list[Plane], axis: int, shape: Shape) -> list[Plane]:
        """The planes along the joined axis, one after the other; whatever else one varies along, the result does."""
        live = {axis}.union(*(varying(piece) for piece in pieces))
        small = [compact(piece, live) for piece in pieces]
        joined = torch.cat(small, axis)
        return [joined.expand(shape)] if bool(joined.any()) else []

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        tensors = [t for t in given if build.shape(t) != (Dim(0, 0),)]
        if any(build.dtype(t) != build.dtype(node) for t in tensors):
            return False
        axis = argument(node, 1, "dim", 0) % build.rank(node)
        pieces: list[Any] = tensors
        if build.name(node) == "stack":
            pieces = [build.between("move", node, (t,), (*build.shape(t)[:axis], Dim(0, 1), *build.shape(t)[axis:]),
                                    {"kind": "reshape"}) for t in tensors]
        build.step("cat", node, pieces, {"axis": axis})
        return True


class Split(Move):
    """split, chunk: the pieces become what survives of them."""

    matches = aten("split.Tensor", "split.sizes", "split_with_sizes", "chunk", "tensor_split.indices",
                   "tensor_split.sections")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1), "split by sizes, swapped", MAP),
        sample(lambda x: torch.cat([a.relu() for a in x.split(4, 1)], 1), "split by size", MAP),
        sample(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), "chunked gate", MAP),
    )

    def axis(self, node: fx.Node) -> int:
        return argument(node, 2, "dim", 0)  # type: ignore[no-any-return]

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        axis = self.axis(node) % len(sizes.old(node.args[0]))  # type: ignore[arg-type]
        pieces = [shape[axis] for shape in sizes.new(node)]
        if None in pieces or pieces == [shape[axis] for shape in sizes.old(node)]:
            return None
        return torch.ops.aten.split_with_sizes.default, (node.args[0], pieces, axis), {}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        axis, start = self.axis(node) % build.rank(x), 0
        pieces = [shape[axis] for shape in build.graph.dims[node.name]]
        if any(piece.scale for piece in pieces):
            return False
        for item, piece in enumerate(pieces):
            build.step("move", node, (x,), {"kind": "slice", "axis": axis, "start": start, "step": 1}, item=item)
            start += piece.offset
        return True


class Slice(Move):
    """slice, narrow, select: positions count among what survives. Where every n-th is taken, blocks of n leave."""

    matches = aten("slice.Tensor", "narrow.default", "select.int")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x[:, :4], "first channels", MAP), sample(lambda x: x[:, 2:], "last channels", MAP),
        sample(lambda x: x[:, 1:-1].narrow(1, 1, 2), "narrow", MAP),
        sample(lambda x: x[:, :, ::2, 1:], "strided rows", MAP),
        sample(lambda x: x[:, ::2], "every other channel", MAP),
        sample(lambda x: x[:, 3:6:2], "every other one of some", MAP),
        sample(lambda x: x + x[:, 2:3], "one channel for all", MAP),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        axis = argument(node, 1, "dim", 0) % len(tape.shape(node.args[0]))  # type: ignore[arg-type]
        if self._step(node) != 1:
            for plane in map(compact, tape.planes(node.args[0])):
                if axis in varying(plane):
                    block = torch.arange(plane.shape[axis]) // self._step(node) * self._step(node)
                    tape.unify(plane, plane.index_select(axis, block))
        super().label(node, tape)

    @staticmethod
    def _step(node: fx.Node) -> int:
        return argument(node, 4, "step", 1) if "slice" in str(node.target) else 1

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        axis = argument(node, 1, "dim", 0) % len(sizes.old(x))
        length = sizes.old(x)[axis]
        if length is None or any(isinstance(arg, fx.Node) for arg in node.args[1:]):
            return None
        alive: Tensor = sizes.alive(x, axis)
        if bool(alive.all()):
            return None

        def count(position: int) -> int:
            position = position + length if position < 0 else position
            return int(alive[:max(0, min(position, length))].sum())
        name = str(node.target)
        if "select" in name:
            return node.target, (x, axis, count(node.args[2])), {}  # type: ignore[arg-type]
        if "narrow" in name:
            start, size = count(node.args[2]), count(node.args[2] + node.args[3])  # type: ignore[arg-type,operator]
            return node.target, (x, axis, start, size - start), {}
        start, end, step = argument(node, 2, "start", 0) or 0, argument(node, 3, "end", None), self._step(node)
        within = max(0, start + length if start < 0 else start) % step     # its place in its block
        return node.target, (x, axis, count(start - within) + within, count(length if end is None else end), step), {}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        axis, size = argument(node, 1, "dim", 0) % build.rank(x), None
        if build.shape(x) == build.shape(node):
            build.same(node, x)                     # a slice of everything
            return True
        size = build.shape(x)[axis]
        start = node.args[2] if build.name(node) != "slice" else argument(node, 2, "start", 0) or 0
        if size.scale or not build.is_fixed(start):
            return False
        first = build.fixed(start)
        first = max(0, min(first + size.offset if first < 0 else first, size.offset))
        if build.name(node) == "select":
            lower_select(node, build, x, axis, first)
        else:
            build.step("move", node, (x,), {"kind": "slice", "axis": axis, "start": first,
                                            "step": argument(node, 4, "step", 1)})
        return True


RULES: tuple[OpRule, ...] = (Concatenate(), Split(), Slice())
