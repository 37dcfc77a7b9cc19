"""What the library knows about one operator family, and the registry that finds it.

``prunekern/ops/<family>.py`` subclasses OpRule; everything about an operator is in that one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, fx, nn

from prunekern.core.graph import Shape, ShapeOf
from prunekern.core.labels import Tape

if TYPE_CHECKING:
    from prunekern.core.builder import Builder

Rewritten = tuple[Any, tuple[Any, ...], dict[str, Any]]     # operator, positional and keyword arguments


@dataclass(frozen=True)
class Sample:
    """A module that uses an operator and the shapes of its inputs; the contract tests run every one of them.

    shapes: one shape per positional input, batch first. ``draw`` makes an input of a shape (default: normal).
    prunable: channels on axis 1 that are pruned in front of the module pass it, so the oracle expects them to
    go; False where the operator rightly holds on to them.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    name: str = ""
    prunable: bool = True
    draw: Callable[[Shape], Tensor] = torch.randn

    def __str__(self) -> str:
        return (self.name or repr(self.build())).replace("\n", "")[:80]

    def inputs(self, batch: int | None = None) -> tuple[Tensor, ...]:
        return tuple(self.draw(shape if batch is None else (batch, *shape[1:])) for shape in self.shapes)


class Sizes(Protocol):
    """What rewriting a hard-coded size may ask: shapes before and after slicing (sizes with the batch in
    them are None), and which old indices of an axis remain."""

    def old(self, node: fx.Node) -> Any: ...

    def new(self, node: fx.Node) -> Any: ...

    def changed(self, node: fx.Node, axis: int) -> bool: ...

    def alive(self, node: fx.Node, axis: int) -> Tensor: ...

    def counts(self, node: fx.Node) -> bool:
        """Whether a norm or mean counts what is gone (``core/counted.py``)."""


class OpRule:
    """One operator family. Subclasses override what differs from a shape-keeping, cost-free operator."""

    matches: ClassVar[tuple[Any, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ()      # operators ("library::name") that exist once their library is imported
    samples: ClassVar[tuple[Sample, ...]] = ()

    def label(self, node: fx.Node, tape: Tape) -> None:
        """Record which labels run together, and give the node its planes."""
        raise NotImplementedError

    def macs(self, node: fx.Node, shape: ShapeOf) -> int:
        """Multiply-accumulates of the contraction, from shapes alone."""
        return 0

    def elementwise(self, node: fx.Node, shape: ShapeOf) -> int:
        """Operations outside contractions, about one per element touched."""
        return 0

    def fvcore(self, node: fx.Node, shape: ShapeOf) -> int:
        """What fvcore's FlopCountAnalysis counts for the same call (its table mixes MACs and element counts)."""
        return self.macs(node, shape)

    def attributes(self, node: fx.Node, shape: ShapeOf) -> dict[str, Any]:
        """Attributes of the owning module that follow from shapes (``out_channels``, ...)."""
        return {}

    def rewrite(self, node: fx.Node, sizes: Sizes) -> Rewritten | None:
        """The call on the sliced network; None where it is what it was."""
        return None

    def lower(self, node: fx.Node, build: Builder) -> bool:
        """Add the node's Steps to a Program; False leaves it to a visible ATen step."""
        return False


class Registry:
    """Operator -> rule."""

    def __init__(self, rules: Iterable[OpRule]) -> None:
        self.rules = tuple(rules)
        self._by_target: dict[Any, OpRule] = {}
        self._by_name = {name: rule for rule in self.rules for name in rule.names}
        for rule in self.rules:
            for target in rule.matches:
                if target in self._by_target:
                    raise ValueError(f"{target} has two rules")
                self._by_target[target] = rule

    def find(self, target: Any) -> OpRule | None:
        schema = getattr(target, "_schema", None)
        return self._by_target.get(target) or (self._by_name.get(schema.name) if schema is not None else None)

    def __iter__(self) -> Iterator[OpRule]:
        return iter(self.rules)

    def samples(self) -> list[tuple[OpRule, Sample]]:
        return [(rule, sample) for rule in self.rules for sample in rule.samples]


def aten(*names: str) -> tuple[Any, ...]:
    """All functional and in-place overloads of ATen operators by name (names this torch lacks are skipped).

    ``name.overload`` picks one overload.
    """
    found = []
    for name in names:
        packet_name, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, packet_name, None)
        if packet is None:
            continue
        for key in [overload] if overload else packet.overloads():
            op = getattr(packet, key)
            tensors = any("Tensor" in str(a.type) for a in op._schema.arguments)
            if tensors and not any(a.is_out for a in op._schema.arguments):
                found.append(op)
    return tuple(found)


def argument(node: fx.Node, index: int, name: str = "", default: Any = None) -> Any:
    """A call's argument by position or, where it was passed so, by name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def numel(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
