"""Data movement. Most of it is executed on the label planes by the very operator; no table of index maps.

The rules below exist for what execution alone cannot say: which sizes in a call follow from channels, and
which positions are new (and so free to go).
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx, nn

from prunekern.core.builder import Builder
from prunekern.core.graph import Dim, Shape
from prunekern.core.labels import Plane, Tape, compact, spread, varying
from prunekern.core.rule import OpRule, Rewritten, Sample, Sizes, argument, aten
from prunekern.ops.elementwise import MAP, sample


class Move(OpRule):
    """Operators that rearrange one tensor without mixing values and without sizes to rewrite."""

    matches = aten("permute", "transpose.int", "transpose_", "t", "t_", "movedim", "swapaxes", "squeeze", "squeeze_",
                   "unsqueeze", "unsqueeze_", "flatten.using_ints", "repeat_interleave.self_int", "flip", "unbind.int",
                   "tril", "triu", "diagonal", "rot90", "numpy_T", "mT")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), "permute", MAP),
        sample(lambda x: x.flatten(1), "flatten", MAP),
        sample(lambda x: x.unsqueeze(1).squeeze(1), "unsqueeze/squeeze", MAP),
        sample(lambda x: x.flip(1), "flip channels", MAP), sample(lambda x: x.flip(3), "flip columns", MAP),
        sample(lambda x: x.repeat_interleave(2, 1), "repeat_interleave", MAP),
    )

    def run(self, node: fx.Node, tape: Tape, plane: Plane) -> Any:
        return tape.execute(node, plane, node.args[0])  # type: ignore[arg-type]

    def label(self, node: fx.Node, tape: Tape) -> None:
        planes = tape.planes(node.args[0])
        results = [self.run(node, tape, plane) for plane in planes]
        if isinstance(tape.graph.dims[node.name], list):
            count = len(tape.graph.dims[node.name])
            tape.give_list(node, [[result[i] for result in results] for i in range(count)])
        else:
            tape.give(node, results)

    orders = ("permute", "transpose", "t", "movedim", "swapaxes", "numpy_T", "mT")
    shapes = ("squeeze", "unsqueeze", "flatten", "view", "reshape", "_unsafe_view", "unflatten", "view_as",
              "reshape_as")

    def lower(self, node: fx.Node, build: Builder) -> bool:
        name = build.name(node)
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        if name in self.shapes:
            build.step("move", node, (x,), {"kind": "reshape"})
        elif name in self.orders:
            probe = torch.empty(tuple(range(2, build.rank(x) + 2)), device="meta")
            moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
            build.step("move", node, (x,), {"kind": "permute", "axes": [size - 2 for size in moved.shape]})
        elif name == "unbind":
            axis = argument(node, 1, "dim", 0) % build.rank(x)
            for i in range(len(build.graph.dims[node.name])):
                lower_select(node, build, x, axis, i, i)
        elif name == "repeat_interleave":
            return self._repeated(node, build, x)
        else:
            return False
        return True

    def _repeated(self, node: fx.Node, build: Builder, x: fx.Node) -> bool:
        """Every index several times in a row: a new axis behind it, expanded."""
        axis, shape = argument(node, 2, "dim", None), build.shape(x)
        if axis is None or not build.is_fixed(node.args[1]):
            return False
        axis %= len(shape)
        one, count = Dim(0, 1), Dim(0, build.fixed(node.args[1]))
        head, tail = shape[:axis + 1], shape[axis + 1:]
        single = build.between("move", node, (x,), (*head, one, *tail), {"kind": "reshape"})
        wide = build.between("move", node, (single,), (*head, count, *tail), {"kind": "expand"})
        build.step("move", node, (wide,), {"kind": "reshape"})
        return True


def lower_select(node: fx.Node, build: Builder, x: fx.Node, axis: int, index: int, item: int | None = None) -> None:
    """One position of an axis, and the axis gone."""
    shape = build.shape(x)
    piece = build.between("move", node, (x,), (*shape[:axis], Dim(0, 1), *shape[axis + 1:]),
                          {"kind": "slice", "axis": axis, "start": index, "step": 1})
    build.step("move", node, (piece,), {"kind": "reshape"}, item=item)


class View(Move):
    """view and reshape: the sizes in the call become the surviving ones."""

    matches = aten("view.default", "reshape", "_unsafe_view", "unflatten.int", "view_as", "reshape_as")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x.view(-1, 150), "hard-coded view", MAP),
        sample(lambda x: x.reshape(x.size(0), 6, 25).view(-1, 6, 5, 5), "there and back", MAP),
        sample(lambda x: x.view(2 * x.size(0) // 2, 3, 2, 5, 5).transpose(1, 2).reshape(-1, 6, 5, 5),
               "channel shuffle", MAP),
        sample(lambda x: x.unflatten(1, (2, 3)).flatten(1, 2), "unflatten", MAP),
    )

    def run(self, node: fx.Node, tape: Tape, plane: Plane) -> Any:
        return plane.reshape(tape.shape(node))

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        if "_as" in str(node.target):
            return None
        new = sizes.new(node)
        if "unflatten" in str(node.target):
            x, axis = node.args[0], node.args[1] % len(sizes.old(node.args[0]))  # type: ignore[operator,arg-type]
            given = list(node.args[2])  # type: ignore[arg-type]
            wanted = new[axis:axis + len(given)]
            return node.target, (x, axis, _resized(given, wanted)), {}
        given = _resized(list(node.args[1]), new)  # type: ignore[arg-type]
        computed = [i for i, size in enumerate(given) if isinstance(size, fx.Node) and sizes.changed(node, i)]
        if computed:             # batch times heads: what is left once every other size is known
            given = [fresh if size == -1 else size for size, fresh in zip(given, new, strict=True)]
            given[computed[0]] = -1
        return node.target, (node.args[0], given), {}


def _resized(given: list[Any], new: tuple[int | None, ...]) -> list[Any]:
    """Numbers become the new sizes; -1 and sizes computed in the graph stay as they are."""
    return [size if isinstance(size, fx.Node) or size == -1 or fresh is None else fresh
            for size, fresh in zip(given, new, strict=True)]


class Expand(OpRule):
    """expand and repeat: positions made from a single one are new, and free to go."""

    matches = aten("expand", "expand_as", "repeat", "tile", "broadcast_to")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: x * y.expand(-1, 6, 5, 5).sigmoid(), "expanded gate", MAP, (2, 1, 5, 5)),
        sample(lambda x, y: x + y.expand_as(x), "expand_as", MAP, (2, 1, 5, 5)),
        sample(lambda x: x.repeat(1, 2, 1, 1), "repeat channels", MAP),
        sample(lambda x, y: x + y.repeat(1, 6, 1, 1), "repeat a map", MAP, (2, 1, 5, 5)),
        sample(lambda x: x + x[:1, :, :, :1].tile(5), "tile the last axis", MAP),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        out, shape, dims = tape.shape(node), tape.shape(x), tape.graph.dims[node.name]
        shift = len(out) - len(shape)
        planes = [self._stretched(node, tape, plane, out) for plane in tape.planes(x)]
        for axis, size in enumerate(out):
            before = shape[axis - shift] if axis >= shift else 1
            if before == 1 and size > 1 and not dims[axis].scale:
                planes.append(spread(tape.free(size), axis, out))
        tape.give(node, planes)

    def _stretched(self, node: fx.Node, tape: Tape, plane: Plane, out: Shape) -> Plane:
        if "repeat" not in str(node.target) and "tile" not in str(node.target):
            return plane.expand(out)
        lead = plane.view((1,) * (len(out) - plane.dim()) + tuple(plane.shape)) if plane.dim() < len(out) else plane
        small = compact(lead)
        times = [size // n if n > 1 else 1 for size, n in zip(out, small.shape, strict=True)]
        return small.repeat(times).expand(out)

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        name = str(node.target)
        if "expand_as" in name:
            return None
        given, new = list(node.args[1]), sizes.new(node)  # type: ignore[arg-type]
        if "expand" in name or "broadcast" in name:
            return node.target, (node.args[0], _resized(given, new)), {}
        old, shift = sizes.old(node.args[0]), len(new) - len(sizes.old(node.args[0]))  # type: ignore[arg-type]
        given = [1] * (len(new) - len(given)) + given            # tile takes counts of the last axes alone
        times = [count if isinstance(count, fx.Node) or i < shift or old[i - shift] != 1 or new[i] is None else new[i]
                 for i, count in enumerate(given)]
        return node.target, (node.args[0], times), {}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        if build.name(node) not in ("expand", "expand_as", "broadcast_to"):
            return False
        build.step("move", node, (node.args[0],), {"kind": "expand"})
        return True


class Roll(Move):
    """roll: the shift counts what survives of the part that wraps around."""

    matches = aten("roll")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x.roll(2, 1), "roll channels", MAP), sample(lambda x: x.roll((1, -1), (2, 3)), "roll", MAP))

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        shifts, axes = list(node.args[1]), argument(node, 2, "dims", [])  # type: ignore[arg-type]
        for i, axis in enumerate(axes):
            length = sizes.old(node.args[0])[axis]  # type: ignore[arg-type]
            alive = sizes.alive(node.args[0], axis)  # type: ignore[arg-type]
            if length is not None and not bool(alive.all()):
                shifts[i] = int(alive[length - shifts[i] % length:].sum())
        return node.target, (node.args[0], shifts, axes), {}

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x: Any = node.args[0]
        shape, axes = build.shape(x), argument(node, 2, "dims", [])
        if not axes or not build.is_fixed(node.args[1]) or any(shape[axis].scale for axis in axes):
            return False
        for shift, axis in zip(build.fixed(node.args[1]), axes, strict=True):
            size, axis = shape[axis].offset, axis % len(shape)
            first = -shift % size if size else 0
            pieces = [build.between("move", node, (x,), (*shape[:axis], Dim(0, length), *shape[axis + 1:]),
                                    {"kind": "slice", "axis": axis, "start": start, "step": 1})
                      for start, length in ((first, size - first), (0, first)) if length]
            x = build.between("cat", node, pieces, shape, {"axis": axis})
        build.step("move", node, (x,), {"kind": "reshape"})
        return True


class ChannelShuffle(Move):
    """channel_shuffle(x, g): every one of the g rows keeps the same channels."""

    matches = aten("channel_shuffle", "native_channel_shuffle")
    samples: ClassVar[tuple[Sample, ...]] = (Sample(lambda: nn.ChannelShuffle(2), (MAP,)),)

    def label(self, node: fx.Node, tape: Tape) -> None:
        groups: int = node.args[1]  # type: ignore[assignment]
        shape, planes = tape.shape(node), []
        for plane in tape.planes(node.args[0]):
            if 1 not in varying(plane):
                planes.append(plane)
                continue
            vector, _ = tape.along(node, (plane,), 1)
            table = vector.view(groups, -1)  # type: ignore[union-attr]
            tape.joint.append(table)
            planes.append(spread(table.t().reshape(-1), 1, shape))
        tape.give(node, planes)

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        first, channels, *rest = build.shape(x)
        groups: int = node.args[1]  # type: ignore[assignment]
        split = (first, Dim(0, groups), Dim(0, channels.offset // groups), *rest)
        return not channels.scale and build.reordered(node, x, split, (0, 2, 1, *range(3, len(split))))


class PixelShuffle(Move):
    """pixel_shuffle and pixel_unshuffle: the r * r channels that make one channel of the larger map leave together."""

    matches = aten("pixel_shuffle", "pixel_unshuffle")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: nn.PixelShuffle(2), ((2, 8, 3, 3),)), Sample(lambda: nn.PixelUnshuffle(2), ((2, 6, 4, 4),)))

    def run(self, node: fx.Node, tape: Tape, plane: Plane) -> Any:
        moved = super().run(node, tape, plane)
        channels, rest = tape.along(node, (moved,), moved.dim() - 3)
        tape.freeze_planes(node, rest)        # all make one channel of the image, or are positions
        return moved if channels is None else spread(channels, moved.dim() - 3, tape.shape(node))

    def lower(self, node: fx.Node, build: Builder) -> bool:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        factor: int = node.args[1]  # type: ignore[assignment]
        unshuffle = "unshuffle" in build.name(node)
        fine, coarse = (build.shape(x), build.shape(node)) if unshuffle else (build.shape(node), build.shape(x))
        *lead, channels, height, width = fine
        r, (high, wide), n = Dim(0, factor), coarse[-2:], len(lead)
        if channels.scale or height.scale or width.scale:
            return False
        if unshuffle:
            axes = (*range(n + 1), n + 2, n + 4, n + 1, n + 3)
            return build.reordered(node, x, (*lead, channels, high, r, wide, r), axes)
        axes = (*range(n + 1), n + 3, n + 1, n + 4, n + 2)
        return build.reordered(node, x, (*lead, channels, r, r, high, wide), axes)


class GetItem(OpRule):
    """One tensor out of several."""

    matches = (operator.getitem,)

    def label(self, node: fx.Node, tape: Tape) -> None:
        several = tape.memory.get(node.args[0])  # type: ignore[arg-type]
        if several:
            tape.memory[node] = several[node.args[1]]


class Creation(OpRule):
    """Tensors made of one value: every position is new, and free to go with what it meets."""

    matches = aten("new_zeros", "new_ones", "new_full", "new_empty") + tuple(
        getattr(torch.ops.aten, name).default for name in ("zeros", "ones", "full"))
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: torch.cat((x, x.new_zeros(x.size(0), 3, 5, 5)), 1), "cat with zeros", MAP),)

    def label(self, node: fx.Node, tape: Tape) -> None:
        shape, dims = tape.shape(node), tape.graph.dims[node.name]
        tape.give(node, [spread(tape.free(size), axis, shape) for axis, size in enumerate(shape)
                         if size > 1 and not dims[axis].scale])

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        index = 1 if "new_" in str(node.target) else 0
        given = list(node.args[index])  # type: ignore[arg-type]
        args = (*node.args[:index], _resized(given, sizes.new(node)), *node.args[index + 1:])
        return node.target, args, dict(node.kwargs)


RULES: tuple[OpRule, ...] = (Move(), View(), Expand(), Roll(), ChannelShuffle(), PixelShuffle(), GetItem(), Creation())
