"""einsum: any product of weights and activations; counted exactly for one and two operands."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from prunekern.core.graph import ShapeOf
from prunekern.core.labels import Tape
from prunekern.core.rule import OpRule, Sample, aten, numel
from prunekern.ops.contraction import label_einsum
from prunekern.ops.elementwise import sample

BMM = (("abc", "abd", "acd"), ("abc", "adc", "adb"))     # equations that fvcore has formulas for


class Einsum(OpRule):
    """einsum(equation, tensors)."""

    matches = aten("einsum.default")
    samples: ClassVar[tuple[Sample, ...]] = (
        sample(lambda x, y: torch.einsum("bij,bjk->bik", x, y), "einsum as bmm", (2, 6, 5), (2, 5, 13)),
        sample(lambda x, y: torch.einsum("nchw, cd -> ndhw", x, y[0]), "einsum as 1x1 convolution",
               (2, 6, 5, 7), (2, 6, 4)),
        sample(lambda x, y: torch.einsum("...ci,...cj->...ij", x, y), "einsum with an ellipsis",
               (2, 6, 5), (2, 6, 3)),
        sample(lambda x: torch.einsum("bcij->bij", x), "einsum of one", (2, 6, 5, 5)),
    )

    def label(self, node: fx.Node, tape: Tape) -> None:
        terms, wanted, _ = self._terms(node, tape.shape)
        tape.give(node, label_einsum(node, tape, node.args[1], terms, wanted))  # type: ignore[arg-type]

    def _terms(self, node: fx.Node, shape: ShapeOf) -> tuple[list[str], str, dict[str, int]]:
        """The index string of each operand and of the output, and the size of every index.

        An ellipsis becomes indices of its own, aligned at the right. Raises ValueError for a repeated index.
        """
        given, _, wanted = str(node.args[0]).replace(" ", "").partition("->")
        terms, sizes = given.split(","), dict[str, int]()
        for position, (term, tensor) in enumerate(zip(terms, node.args[1], strict=True)):  # type: ignore[arg-type]
            size = shape(tensor)
            covered = len(size) - len(term.replace("...", ""))
            terms[position] = term = term.replace("...", "0123456789"[10 - covered:])
            if len(set(term)) < len(term):
                raise ValueError(f"index repeated within one operand of {node.args[0]!r}")
            for index, length in zip(term, size, strict=True):
                sizes[index] = max(sizes.get(index, 1), length)
        spread = "".join(sorted(index for index in sizes if not index.isalpha()))
        if "->" not in str(node.args[0]):
            joined = "".join(terms)
            wanted = "..." + "".join(sorted(i for i in set(joined) if i.isalpha() and joined.count(i) == 1))
        return terms, wanted.replace("...", spread), sizes

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """The product of the sizes of all indices that are in the output or in both operands; one operand: 0.

        An index of one operand alone that the output lacks is summed before anything is multiplied; what is
        left is one batched matrix product or, where nothing is summed, an elementwise one (0). Raises ValueError
        for more operands, whose count depends on the order they are taken in. Source: the documentation of
        numpy.einsum and torch.einsum.
        """
        terms, wanted, sizes = self._terms(node, shape)
        if len(terms) > 2:
            raise ValueError(f"{len(terms)} operands")
        if not self._contracts(terms, wanted):
            return 0
        return numel(tuple(n for i, n in sizes.items() if i in wanted or (i in terms[0] and i in terms[1])))

    @staticmethod
    def _contracts(terms: list[str], wanted: str) -> bool:
        return any(index in other and index not in wanted for other in terms[1:] for index in terms[0])

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Elements of the operands of which an index is summed on its own; of the output, where nothing else is."""
        terms, wanted, sizes = self._terms(node, shape)
        product = len(terms) == 2 and not self._contracts(terms, wanted)
        return numel(shape(node)) * product + sum(numel(tuple(sizes[i] for i in term)) for n, term in enumerate(terms)
                   if any(i not in wanted and all(i not in other for m, other in enumerate(terms) if m != n)
                          for i in term))

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """Two equations exactly, others as half of what numpy.einsum_path prints, with its four digits.

        That is never 0, not even for one operand. Source: fvcore 0.1.5, jit_handles.einsum_flop_jit.
        """
        terms, wanted, sizes = self._terms(node, shape)
        total = numel(tuple(sizes.values()))
        names = dict(zip(dict.fromkeys("".join(terms)), "abcdefgh", strict=False))
        if tuple("".join(names[i] for i in term) for term in (*terms, wanted)) in BMM:
            return total
        summed = len(sizes) > len(wanted)
        return int(float(f"{total * (max(1, len(terms) - 1) + summed):.3e}") / 2)


RULES: tuple[OpRule, ...] = (Einsum(),)
