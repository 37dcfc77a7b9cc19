"""What a pruned network is held to: the original, in which removed channels count as zero.

They are zeroed at the inputs of what mixes channels (zeroing producers would be wrong: batch norm shifts zeros).
Operators that look at all channels at once have no such equal; where a policy lets their channels leave all the same,
they are run on what remains of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from prunekern.core.rule import Registry
from prunekern.graph.evaluate import Before, Instead, evaluate, same_dice
from prunekern.graph.inputs import Call
from prunekern.graph.labels import Labels
from prunekern.ops import REGISTRY
from prunekern.prune.rewrite import NewSizes


def masked_outputs(labels: Labels, keep: Tensor, tensors: Mapping[str, Tensor], call: Call) -> list[Any]:
    """The outputs of the original on the given state, as a network without the removed channels must give them."""
    with torch.no_grad(), same_dice():
        outputs = evaluate(labels.graph, tensors, call.args, call.kwargs, before=masking(labels, keep),
                           instead=restricting(labels, keep))
    leaves = labels.graph.output.args[0]
    return [remaining(labels, leaf, value, keep) if isinstance(leaf, fx.Node) else value
            for leaf, value in zip(leaves, outputs, strict=True)]  # type: ignore[arg-type]


def difference(outputs: list[Any], reference: list[Any]) -> float:
    """Largest relative error over tensor outputs; infinite where shapes or non-tensors differ."""
    if len(outputs) != len(reference):
        return float("inf")
    worst = 0.0
    for out, ref in zip(outputs, reference, strict=True):
        if not isinstance(ref, Tensor):
            continue
        if not isinstance(out, Tensor) or out.shape != ref.shape:
            return float("inf")
        if ref.numel():
            scale = max(float(ref.abs().max()), 1e-30) if ref.is_floating_point() else 1.0
            error = float((out.double() - ref.double()).abs().max()) / scale
            worst = max(worst, error if error == error else float("inf"))
    return worst


def masking(labels: Labels, keep: Tensor) -> Before:
    """A hook for ``evaluate`` that multiplies consumers' inputs with what remains of them."""
    masks = {node: {arg: labels.mask(arg, keep) for arg in args} for node, args in labels.masked.items()}

    def before(node: fx.Node, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if node not in masks:
            return values

        def masked(arg: fx.Node, value: Any) -> Any:
            mask = masks[node].get(arg)
            return value if mask is None else torch.where(fitted(mask, value), value, 0)
        return replaced(node, values, masked)
    return before


def gated(labels: Labels, gate: Tensor) -> Before:
    """A hook for ``evaluate`` that multiplies consumers' inputs with the gate of each group: ``masking`` that gradients
    pass. gate: [groups]."""
    def before(node: fx.Node, values: tuple[Any, ...]) -> tuple[Any, ...]:
        args = labels.masked.get(node, ())

        def multiplied(arg: fx.Node, value: Any) -> Any:
            if arg in args and isinstance(value, Tensor):
                for axis, groups in labels.live.get(arg, ()):
                    shape = [-1 if a == axis else 1 for a in range(value.dim())]
                    own = groups.clone() if groups.is_inference() else groups    # autograd saves no others
                    value = value * fitted(gate[own].view(shape), value).to(value.dtype)
            return value
        return replaced(node, values, multiplied) if args else values
    return before


def replaced(node: fx.Node, values: tuple[Any, ...], new: Callable[[fx.Node, Any], Any]) -> tuple[Any, ...]:
    """The values of a call's arguments with those of its tensors exchanged: ``new(argument, value)``."""
    def walk(arg: Any, value: Any) -> Any:
        if isinstance(arg, fx.Node):
            return new(arg, value)
        if isinstance(arg, (list, tuple)):
            return type(value)(walk(a, v) for a, v in zip(arg, value, strict=True))
        return value
    return tuple(walk(a, v) for a, v in zip(node.args, values, strict=True))


def fitted(mask: Tensor, value: Tensor) -> Tensor:
    """A mask made for the labels' batch, for a value of another: heads that share an axis with the batch repeat."""
    for axis, (size, n) in enumerate(zip(value.shape, mask.shape, strict=True)):
        if n not in (1, size):
            mask = torch.cat([mask] * -(-size // n), axis).narrow(axis, 0, size)
    return mask.to(value.device)


def restricting(labels: Labels, keep: Tensor, registry: Registry = REGISTRY) -> Instead | None:
    """A hook for ``evaluate`` that runs the operators of ``labels.restricted`` on what remains of their inputs and
    puts zeros where channels are gone; None where there are none."""
    if not labels.restricted:
        return None
    sizes = NewSizes(labels, keep)

    def instead(node: fx.Node, values: tuple[Any, ...]) -> Any:
        if node not in labels.restricted:
            return NotImplemented
        small: dict[fx.Node, Any] = {}
        replaced(node, values, lambda arg, value: small.setdefault(arg, remaining(labels, arg, value, keep)))
        rule = registry.find(node.target)
        call = (rule.rewrite(node, sizes) if rule else None) or (node.target, node.args, dict(node.kwargs))
        target: Any = call[0]
        args, kwargs = fx.node.map_arg((tuple(call[1]), call[2]), small.__getitem__)
        return _put_back(labels, node, target(*args, **kwargs), keep)
    return instead


def remaining(labels: Labels, node: fx.Node, value: Any, keep: Tensor) -> Any:
    """What is left of an activation (or parameter) once channels are gone."""
    for axis in {axis for axis, _ in labels.live.get(node, ())} if isinstance(value, Tensor) else ():
        alive = fitted(labels.alive(node, axis, keep), value.select(0, 0).new_empty(value.shape[axis]))
        if not bool(alive.all()):
            value = value.index_select(axis, alive.nonzero()[:, 0])
    return value


def _put_back(labels: Labels, node: fx.Node, value: Any, keep: Tensor) -> Any:
    for axis in {axis for axis, _ in labels.live.get(node, ())}:
        alive = labels.alive(node, axis, keep).to(value.device)
        shape = (*value.shape[:axis], len(alive), *value.shape[axis + 1:])
        value = value.new_zeros(shape).index_copy(axis, alive.nonzero()[:, 0], value)
    return value
