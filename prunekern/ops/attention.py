"""Scaled dot-product attention: its heads, or the widths inside them, are pruned."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, fx
from torch.nn import functional

from prunekern.core.builder import Builder
from prunekern.core.graph import Shape, ShapeOf
from prunekern.core.labels import Plane, Tape, compact
from prunekern.core.rule import OpRule, Rewritten, Sample, Sizes, argument, aten, numel
from prunekern.ops.contraction import BATCH
from prunekern.ops.elementwise import sample


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in which several query heads share a key head."""
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class Attention(OpRule):
    """scaled_dot_product_attention(q [..., H, L, E], k [..., H, S, E], v [..., H, S, Ev]).

    Whole heads leave, or widths: those of q and k together, those of v with the layer that reads the result.
    """

    matches = aten("scaled_dot_product_attention")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(functional.scaled_dot_product_attention, "attention", (2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 4)),
        sample(grouped, "grouped-query attention", (2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        """Scores q k^T plus a mask, a softmax over what is attended to, and a product with v."""
        query, key, value = node.args[:3]
        tape.masked.setdefault(node, []).extend((query, key, value))  # type: ignore[arg-type]
        q, k, v = (self._operand(node, tape, arg) for arg in (query, key, value))  # type: ignore[arg-type]
        lead, wide = BATCH[:len(q[1]) - 2], BATCH[:len(k[1]) - 2]
        scores = tape.contract(node, [(q[0], lead + "le", q[1]), (k[0], wide + "se", k[1])], lead + "ls")
        shape = (*(max(pair) for pair in zip(q[1][:-2], k[1][:-2], strict=True)), q[1][-2], k[1][-2])
        mask: Any = argument(node, 3, "attn_mask")
        if isinstance(mask, fx.Node):
            scores = tape.combine(node, [(scores, shape), (tape.planes(mask), tape.shape(mask))], shape)
        weights = tape.across(node, scores, (len(shape) - 1,), "softmax runs across them")
        tape.give(node, tape.contract(node, [(weights, lead + "ls", shape), (v[0], wide + "sf", v[1])], lead + "lf"))

    def _operand(self, node: fx.Node, tape: Tape, arg: fx.Node) -> tuple[list[Plane], Shape]:
        """Planes and shape of q, k or v; with ``enable_gqa`` each key head stands for several query heads."""
        planes, shape = list(tape.planes(arg)), tape.shape(arg)
        heads = tape.shape(node.args[0])[-3] if len(shape) > 2 else 1  # type: ignore[arg-type]
        if argument(node, 7, "enable_gqa", False) and shape[-3] not in (1, heads):
            axis, times = len(shape) - 3, heads // shape[-3]
            shape = (*shape[:-3], heads, *shape[-2:])
            planes = [compact(p, (axis,)).repeat_interleave(times, axis).expand(shape) for p in planes]
        return planes, shape

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        """The scale that follows from the width is pinned to that of the original."""
        old, new = (which(node.args[0])[-1] for which in (sizes.old, sizes.new))  # type: ignore[arg-type]
        if old == new or argument(node, 6, "scale") is not None:
            return None
        return node.target, tuple(node.args[:6]), {**node.kwargs, "scale": old ** -0.5}

    def _sizes(self, node: fx.Node, shape: ShapeOf) -> tuple[Shape, Shape, Shape]:
        query, key, value = (shape(arg) for arg in node.args[:3])  # type: ignore[arg-type]
        return query, key, value

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """N * H * L * S * (E + Ev): scores q k^T, then their product with v. A mask spares nothing.

        Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
        """
        query, key, value = self._sizes(node, shape)
        return numel(query[:-1]) * key[-2] * (query[-1] + value[-1])

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Per score: one scaling, three for the softmax, one more for a mask."""
        query, key, _ = self._sizes(node, shape)
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        return numel(query[:-1]) * key[-2] * (4 if mask is None else 5)

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """fvcore does not know attention as one operator."""
        return 0

    def lower(self, node: fx.Node, build: Builder) -> bool:
        given = build.arguments(node)
        mask = given.get("attn_mask")
        if given.get("dropout_p", 0.0) != 0.0 or not build.is_float(node) or build.rank(node) < 3:
            return False
        inputs = [given[name] for name in ("query", "key", "value")] + ([] if mask is None else [mask])
        scale = given.get("scale")
        build.step("attention", node, inputs, {"causal": bool(given.get("is_causal", False)),
                                               "scale": None if scale is None else float(scale)})
        return True


RULES: tuple[OpRule, ...] = (Attention(),)
