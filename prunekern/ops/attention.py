"""Scaled dot-product attention: counted exactly; the heads and widths that meet in it stay."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, fx
from torch.nn import functional

from prunekern.core.builder import Builder
from prunekern.core.graph import Shape, ShapeOf
from prunekern.core.labels import Tape
from prunekern.core.rule import OpRule, Sample, aten, numel
from prunekern.ops.elementwise import sample


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in which several query heads share a key head."""
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class Attention(OpRule):
    """scaled_dot_product_attention(q [..., H, L, E], k [..., H, S, E], v [..., H, S, Ev])."""

    matches = aten("scaled_dot_product_attention")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(functional.scaled_dot_product_attention, "attention", (2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 4),
               prunable=False),
        sample(grouped, "grouped-query attention", (2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), prunable=False),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        for arg in node.all_input_nodes:
            tape.freeze_planes(node, tape.planes(arg), "heads and positions meet in attention")
        tape.give(node, ())

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
