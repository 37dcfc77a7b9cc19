"""Products of rows with the matrix of the expert that each was sent to: mixtures of experts with stacked weights."""

from __future__ import annotations

from typing import Any

from torch import fx

from prunekern.core.graph import ShapeOf
from prunekern.core.labels import Tape, varying
from prunekern.core.rule import OpRule, argument, aten, numel
from prunekern.ops.contraction import label_einsum


class GroupedProduct(OpRule):
    """_grouped_mm(x [T, K], weights [E, K, N], ends [E]): row t meets the matrix of its expert. Widths leave, in all
    experts the same ones; whole experts stay, as the rows say where each begins."""

    matches = aten("_grouped_mm")
    names = ("transformers::grouped_mm_fallback",)       # the same with its first three arguments

    def label(self, node: fx.Node, tape: Tape) -> None:
        x, weights = node.args[:2]
        for plane in tape.planes(weights):
            if 0 in varying(plane):
                tape.freeze(node, plane)
        for vector in (argument(node, 2, "offs"), argument(node, 3, "bias")):
            tape.freeze_planes(node, tape.planes(vector), "it says where the rows of each expert are")
        tape.memory[weights] = tuple(p for p in tape.planes(weights) if 0 not in varying(p))  # type: ignore[index]
        tape.give(node, label_einsum(node, tape, (x, weights), ("tk", "ekn"), "tn"))  # type: ignore[arg-type]

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """T * K * N: every row meets one expert's matrix (Shazeer et al., "Outrageously Large Neural Networks",
        2017)."""
        weights: Any = node.args[1]
        return numel(shape(node)) * shape(weights)[1]

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """fvcore does not know products by groups."""
        return 0


RULES: tuple[OpRule, ...] = (GroupedProduct(),)
