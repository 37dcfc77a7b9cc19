"""Reading and writing at positions that tensors of integers name: lookups, gathers, scatters.

Channels on axes that are not indexed pass. Those on an indexed axis stay, but for one case: a constant list of
channels (``x[:, order]``) is executed on their labels, and the list itself is cut and renumbered with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from prunekern.core.graph import Shape, ShapeOf
from prunekern.core.labels import Plane, Planes, Tape, compact, spread, varying
from prunekern.core.rule import OpRule, Sample, argument, aten, numel
from prunekern.ops.contraction import Embedding
from prunekern.ops.elementwise import MAP, Pair, sample

DATA = "positions along these channels are looked up by an index"
COPIES = frozenset(("to", "_to_copy", "lift_fresh_copy", "clone", "detach", "alias", "contiguous", "detach_"))

PICKED = ("index_select", "index", "_unsafe_index")


def passing(node: fx.Node, tape: Tape, planes: Planes, axes: Iterable[int], reason: str = DATA) -> list[Plane]:
    """What passes an index along these axes, with size 1 there; what varies along them alone stays."""
    axes, kept = set(axes), []
    made = [plane for plane in planes if axes & varying(plane) and tape.is_free(plane)]
    tape.freeze_planes(node, tuple(made))            # nobody's positions: not worth a report
    planes = tuple(plane for plane in planes if all(plane is not other for other in made))
    for plane in tape.across(node, planes, axes, reason):
        for axis in axes:
            plane = plane.narrow(axis, 0, min(1, plane.shape[axis]))
        kept.append(plane)
    return kept


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1].rstrip("_") if str(node.target).startswith("aten.") else ""


def channel_list(tape: Tape, index: Any) -> tuple[str, Tensor] | None:
    """(name, values) of an index that is a constant vector of the state, read by nothing but lookups: only then
    may it be renumbered. None otherwise."""
    origin, chain = index, [index]
    while isinstance(origin, fx.Node) and origin.op == "call_function" and _name(origin) in COPIES:
        origin = origin.args[0]
        chain.append(origin)
    name = tape.graph.fqn(origin)
    if name is None or isinstance(tape.graph.tensors[name], nn.Parameter):
        return None
    values = tape.graph.tensors[name]
    twins = [n for n in tape.graph.nodes if n.op == "placeholder" and tape.graph.fqn(n) == name]
    if values.dim() != 1 or values.dtype not in (torch.int32, torch.int64) or len(twins) > 1:
        return None
    for link in chain:
        if not all(user in chain or (_name(user) in PICKED and _names_positions(user, link)) for user in link.users):
            return None
    return name, values


def _names_positions(user: fx.Node, index: fx.Node) -> bool:
    """Whether a lookup uses the node as its one index, and as nothing else."""
    if _name(user) == "index_select":
        return user.args[2] is index and user.args[0] is not index
    given = [item for item in user.args[1] if item is not None]  # type: ignore[union-attr]
    return given == [index] and user.args[0] is not index


class Lookup(OpRule):
    """index (``x[:, i]``, ``table[i, j]``) and index_select."""

    matches = aten("index.Tensor", "_unsafe_index.Tensor", "index_select")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x[:, :, torch.tensor([4, 0, 0])], "rows by number", MAP),
        sample(lambda x: x[:, :, torch.tensor([[4], [0]]), torch.tensor([1, 2, 3])], "a table of positions", MAP),
        sample(lambda x: x[:, torch.tensor([5, 1, 1, 0])], "channels by number", MAP),
        sample(lambda x: x.index_select(1, torch.tensor([5, 1, 1, 0])), "index_select of channels", MAP),
        sample(lambda x: x.index_select(-1, torch.tensor([4, 2])), "index_select of columns", MAP),
        sample(lambda x, y: x[:, :, y[0, 0, 0].gt(0).long()], "columns by data", MAP, (2, 1, 5, 5)),
        sample(lambda x, y: x[:, y[0, 0, 0].gt(0).long()], "channels by data", MAP, (2, 1, 5, 5), prunable=False),
    )

    def indices(self, node: fx.Node, tape: Tape) -> dict[int, fx.Node]:
        """Axis -> the index along it."""
        rank = len(tape.shape(node.args[0]))  # type: ignore[arg-type]
        if _name(node) == "index_select":
            return {node.args[1] % rank: node.args[2]}  # type: ignore[operator,dict-item]
        given: Sequence[Any] = node.args[1]  # type: ignore[assignment]
        return {axis: index for axis, index in enumerate(given) if index is not None}

    def label(self, node: fx.Node, tape: Tape) -> None:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        indices, out = self.indices(node, tape), tape.shape(node)
        picked, planes = self._picked(node, tape, indices), tape.planes(x)
        if picked is not None:
            vector, planes = tape.along(node, planes, next(iter(indices)))
        else:
            for index in indices.values():
                tape.freeze_planes(node, tape.planes(index))
        reason = DATA if tape.graph.fqn(x) is None else ""       # the rows of a table stay, like a vocabulary
        results = [self._moved(node, plane, indices, len(out)).expand(out)
                   for plane in passing(node, tape, planes, indices, reason)]
        if picked is not None and vector is not None:
            results.append(self._renumbered(node, tape, indices, picked, vector))
        tape.give(node, results)

    def _picked(self, node: fx.Node, tape: Tape, indices: dict[int, fx.Node]) -> tuple[str, Tensor] | None:
        return channel_list(tape, next(iter(indices.values()))) if len(indices) == 1 else None

    def _renumbered(self, node: fx.Node, tape: Tape, indices: dict[int, fx.Node], picked: tuple[str, Tensor],
                    vector: Tensor) -> Plane:
        """The labels that a constant list picks; its own entries live and die with them."""
        (axis, index), (name, values) = next(iter(indices.items())), picked
        chosen = vector[values.cpu().long() % len(vector)]
        tape.lookup(node, name, vector)
        own = tape.axis(node, index, 0)
        if own is not None:
            tape.unify(own, chosen)
        return spread(chosen, axis, tape.shape(node))

    def _moved(self, node: fx.Node, plane: Plane, indices: dict[int, fx.Node], rank: int) -> Plane:
        """The operator on a plane of size 1 along the indexed axes, with size 1 where the indices' axes come."""
        if _name(node) == "index_select":
            return plane
        zeros = torch.zeros((1,) * (rank - plane.dim() + len(indices)), dtype=torch.long)
        moved: Plane = torch.ops.aten.index.Tensor(
            compact(plane), [zeros if axis in indices else None for axis in range(plane.dim())])
        return moved

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One copy per element read."""
        return numel(shape(node))


class Gather(OpRule):
    """gather and take_along_dim: along one axis an index of as many axes says which position; other axes pass."""

    matches = aten("gather", "take_along_dim")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: x.gather(2, y.argsort(2).expand(-1, 6, -1, -1)), "gather of rows", MAP, (2, 1, 5, 5)),
        sample(lambda x: x.gather(3, x.argsort(3)), "gather by its own order", MAP),
        sample(lambda x, y: x.gather(2, y.argsort(2)), "gather by another's order", MAP, MAP),
        sample(lambda x: x.gather(1, x.argsort(1)), "gather of channels", MAP, prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x, out = node.args[0], tape.shape(node)
        first = "take" in _name(node)
        axis, index = argument(node, 2 if first else 1, "dim"), argument(node, 1 if first else 2, "index")
        index = node.kwargs.get("indices", index)
        if axis is None:
            tape.freeze_planes(node, tape.planes(x), DATA)
            tape.freeze_planes(node, tape.planes(index))
            return
        axis %= len(out)
        tape.give(node, merged(node, tape, (x, index), axis, out))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One copy per element read."""
        return numel(shape(node))


def merged(node: fx.Node, tape: Tape, operands: Iterable[Any], axis: int, out: Shape) -> list[Plane]:
    """Operands whose axes run together, but for one along which an index says what meets what."""
    flat, pairs = (*out[:axis], 1, *out[axis + 1:]), []
    for operand in operands:
        if not tape.graph.is_tensor(operand) or not tape.shape(operand):
            continue
        numbers = not operand.meta["val"].dtype.is_floating_point          # positions: no channels of their own
        planes = passing(node, tape, tape.planes(operand), (axis,), "" if numbers else DATA)
        shape = tape.shape(operand)
        shape = (*shape[:axis], 1, *shape[axis + 1:])
        whole = [plane for plane in planes
                 if all(plane.shape[a] == out[a] for a in varying(plane))]     # else it takes the first few only
        for plane in planes:
            if not any(plane is other for other in whole):
                tape.freeze(node, plane, "only the first of these channels are looked up")
        kept = [compact(plane).expand(flat) for plane in whole]
        pairs.append((kept, tuple(1 if size == 1 else flat[a] for a, size in enumerate(shape))))
    return [plane.expand(out) for plane in tape.combine(node, pairs, flat)]


class Scatter(OpRule):
    """scatter, scatter_add, scatter_reduce, index_add, index_copy, index_reduce, index_fill: what an axis of the
    first tensor holds is replaced by, added to or compared with what an index sends there; other axes pass."""

    matches = aten("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce.two", "scatter_reduce_.two",
                   "index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_",
                   "index_fill", "index_fill_")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: x.scatter_add(2, y.gt(0).long().expand(-1, 6, -1, -1), x), "scatter_add", MAP,
               (2, 1, 5, 5)),
        sample(lambda x, y: torch.zeros_like(x).scatter_reduce(3, y.argsort(3), x, "amax", include_self=False),
               "scatter_reduce", MAP, MAP),
        sample(lambda x, y: x.scatter(2, y.argsort(2), 0.5), "scatter of a number", MAP, MAP),
        sample(lambda x, y: x.index_add(2, torch.tensor([1, 1, 0]), y, alpha=2), "index_add", MAP, (2, 6, 3, 5)),
        sample(lambda x, y: x.index_copy(3, torch.tensor([1, 4]), y), "index_copy", MAP, (2, 6, 5, 2)),
        sample(lambda x: x.index_fill(3, torch.tensor([1, 4]), 0.0), "index_fill", MAP),
        sample(lambda x, y: x.index_add(1, torch.tensor([1, 1, 0]), y), "index_add to channels", MAP, (2, 3, 5, 5),
               prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x, axis, index, *rest = node.args
        out = tape.shape(node)
        axis %= max(1, len(out))  # type: ignore[operator]
        source = rest[0] if rest else node.kwargs.get("src", node.kwargs.get("source"))
        if "index" in _name(node):
            tape.freeze_planes(node, tape.planes(index))     # a vector of positions, like the axis it belongs to
            index = None
        tape.give(node, merged(node, tape, (x, source, index), axis, out))  # type: ignore[arg-type]

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One operation per element sent; one per element kept where there is none."""
        source = node.args[3] if len(node.args) > 3 else None
        return numel(shape(source)) if isinstance(source, fx.Node) and shape(source) else numel(shape(node))


def written(x: Tensor, value: Any, axis: int, *index: Tensor) -> Tensor:
    """A copy of x after ``x[:, ..., index] = value`` on an axis."""
    x = x.clone()
    x[(slice(None),) * axis + index] = value
    return x


class Write(OpRule):
    """index_put (``x[i, j] = v``): like a lookup, then elementwise with the values that are written there."""

    matches = aten("index_put", "index_put_", "_index_put_impl_")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: written(x, y, 2, torch.tensor([0, 3])), "write to rows", MAP, (2, 6, 2, 5)),
        sample(lambda x, y: written(x, y, 2, torch.tensor([[0, 3]]), torch.tensor([[2], [4]])), "write to a table",
               MAP, (2, 6, 2, 2)),
        sample(lambda x: written(x, 2.0, 3, torch.tensor([True, False, False, True, True])), "write where a mask says",
               MAP),
        sample(lambda x, y: written(x, y, 1, torch.tensor([0, 3])), "write to channels", MAP, (2, 2, 5, 5),
               prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        given: Any = node.args[1]
        values: fx.Node = node.args[2]  # type: ignore[assignment]
        out, taken = tape.shape(node), [axis for axis, index in enumerate(given) if index is not None]
        indices: list[fx.Node] = [given[axis] for axis in taken]
        for index in indices:
            tape.freeze_planes(node, tape.planes(index))
        masks = [index for index in indices if index.meta["val"].dtype in (torch.bool, torch.uint8)]
        if masks and not (len(indices) == 1 == len(tape.shape(masks[0]))):
            for arg in node.all_input_nodes:
                tape.freeze_planes(node, tape.planes(arg), "they are written where a mask says")
            return
        order = self._order(taken, len(out), max(len(tape.shape(index)) for index in indices))
        shape = tuple(1 if axis is None else out[axis] for axis in order)
        own = [self._there(plane, taken, order).expand(shape)
               for plane in passing(node, tape, tape.planes(node.args[0]), taken)]
        lead, sizes = len(order) - len(tape.shape(values)), list(tape.shape(values))
        holes = [i - lead for i, axis in enumerate(order) if axis is None and i >= lead]
        for hole in holes:
            sizes[hole] = 1
        new = passing(node, tape, tape.planes(values), holes)
        results = tape.combine(node, [(own, shape), (new, tuple(sizes))], shape)
        tape.give(node, [self._back(plane, order, out) for plane in results])

    def _order(self, taken: list[int], rank: int, count: int) -> list[int | None]:
        """The axes of what is written: those of x, and None for each of the index. Source: NumPy, advanced indexing."""
        others: list[int | None] = [axis for axis in range(rank) if axis not in taken]
        start = taken[0] if taken == list(range(taken[0], taken[0] + len(taken))) else 0
        return [*others[:start], *[None] * count, *others[start:]]

    def _there(self, plane: Plane, taken: list[int], order: list[int | None]) -> Plane:
        """From the axes of x, of size 1 where it is indexed, to those of what is written."""
        small = compact(plane)
        return small.reshape([1 if axis is None else small.shape[axis] for axis in order])

    def _back(self, plane: Plane, order: list[int | None], out: Shape) -> Plane:
        """From the axes of what is written to those of the tensor it is written to."""
        sizes = [1] * len(out)
        small = compact(plane)
        for i, axis in enumerate(order):
            if axis is not None:
                sizes[axis] = small.shape[i]
        return small.reshape(sizes).expand(out)      # the axes of x keep their order

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One operation per element written."""
        return numel(shape(node.args[2]))  # type: ignore[arg-type]


class EmbeddingBag(Embedding):
    """embedding_bag(weight [V, D], indices, offsets): sums, means or maxima of rows; the width D is prunable."""

    matches = aten("embedding_bag")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: Bag(11, 6), ((2, 5),), "embedding_bag", False, lambda shape: torch.randint(0, 11, shape)),
        Sample(lambda: Bag(11, 6, mode="sum"), ((2, 5),), "embedding_bag of sums", False,
               lambda shape: torch.randint(0, 11, shape)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        weight, shapes = node.args[0], tape.shape(node)
        rows = tape.axis(node, weight, 0)
        if rows is not None:
            tape.freeze(node, rows)
        for arg in node.args[1:]:
            tape.freeze_planes(node, tape.planes(arg))
        width = tape.produce(node, weight, 1)
        out: Any = tuple(shapes[0])  # type: ignore[arg-type]
        tape.give_list(node, [() if width is None else (spread(width, 1, out),), *[()] * (len(shapes) - 1)])

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One addition (or comparison) per element of every row read."""
        return numel(shape(node.args[1])) * shape(node.args[0])[1]  # type: ignore[arg-type]

    lower = OpRule.lower


class Bag(nn.Module):
    """A sample's module: bags of equal size, as ``nn.EmbeddingBag`` takes them without offsets."""

    def __init__(self, rows: int, width: int, mode: str = "mean") -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(rows, width, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.bag(x)  # type: ignore[no-any-return]


class OneHot(OpRule):
    """one_hot: the classes make a new axis, which always stays."""

    matches = aten("one_hot")
    samples: ClassVar[tuple[Sample, ...]] = (
        Sample(lambda: Pair(lambda x: nn.functional.one_hot(x, 7).float(), "one_hot"), ((2, 5),), "one_hot", False,
               lambda shape: torch.randint(0, 7, shape)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        tape.freeze_planes(node, tape.planes(node.args[0]))

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        return numel(shape(node))


class Masked(OpRule):
    """masked_scatter(x, mask, source): the elements of ``source`` fill the places of a mask, in order. Where the
    mask is the same for all indices of the last axis, those run together; anything else stays."""

    matches = aten("masked_scatter", "masked_scatter_")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: x.transpose(1, 2).masked_scatter(
            torch.tensor([True, False, True]).view(1, 3, 1).expand(1, 3, 6), y.transpose(1, 2)).transpose(1, 2),
            "features put where a mask says", (2, 6, 3), (2, 6, 3)),
        sample(lambda x: x.masked_scatter(x > 0, x), "elements put where a mask says", MAP, prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        x, mask, source = node.args
        out, last = tape.shape(node), tape.shape(source)[-1:]  # type: ignore[arg-type]
        if not (last == out[-1:] and self._whole_rows(tape, mask)):
            for arg in (x, mask, source):
                tape.freeze_planes(node, tape.planes(arg), "they are written where a mask says, element by element")
            return
        end, vectors = len(out) - 1, []
        for arg in (x, mask, source):
            rank = len(tape.shape(arg))  # type: ignore[arg-type]
            rows = passing(node, tape, tape.planes(arg), range(rank - 1), "they are written where a mask says")
            vectors.append([compact(plane).reshape(-1) for plane in rows])
        pairs = [(v, out[end:]) for v in vectors]
        tape.give(node, [spread(plane, end, out) for plane in tape.combine(node, pairs, out[end:])])

    def _whole_rows(self, tape: Tape, mask: Any) -> bool:
        """Whether the mask's last axis was made by repeating a single column."""
        while isinstance(mask, fx.Node) and mask.op == "call_function":
            source = mask.args[0]
            if _name(mask) in ("expand", "expand_as") and tape.shape(source)[-1:] == (1,):  # type: ignore[arg-type]
                return True
            if _name(mask) not in COPIES:
                return False
            mask = source
        return False

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """One choice per element."""
        return numel(shape(node))


class Numbers(OpRule):
    """Numbers that follow from sizes alone (positions, grids): nothing in them is a channel."""

    matches = tuple(getattr(getattr(torch.ops.aten, name), overload) for name in (
        "arange", "linspace", "logspace", "eye", "scalar_tensor", "tril_indices", "triu_indices", "rand", "randn")
        for overload in getattr(torch.ops.aten, name).overloads() if "out" not in overload and "names" not in overload)
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x: x * torch.arange(5).to(x.dtype), "times its columns", MAP),)

    def label(self, node: fx.Node, tape: Tape) -> None:
        tape.give(node, ())


RULES: tuple[OpRule, ...] = (Numbers(), Lookup(), Gather(), Scatter(), Write(), EmbeddingBag(), OneHot(), Masked())
