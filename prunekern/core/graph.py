"""The one kind of graph that labels, costs and lowering read: a traced network, frozen.

Shapes are stored as affine functions of the batch size, so that one trace serves every batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

Shape = tuple[int, ...]
ShapeOf = Callable[[Node], Shape]


@dataclass(frozen=True, slots=True)
class Dim:
    """One size: ``scale * batch + offset``; ``scale`` is 0 for sizes that do not depend on the batch.

    measured: it depends on the data; the numbers are those of the example inputs.
    """

    scale: int
    offset: int
    measured: bool = False

    def at(self, batch: int) -> int:
        return self.scale * batch + self.offset

    def __str__(self) -> str:
        about = "~" if self.measured else ""
        if not self.scale:
            return f"{about}{self.offset}"
        head = about + ("N" if self.scale == 1 else f"{self.scale}N")
        return head if not self.offset else f"{head}{self.offset:+d}"


@dataclass(frozen=True)
class Graph:
    """A traced network at the level of whole ATen operators (conv2d, linear, batch_norm, ...).

    fx:       the operators; placeholders are the state (parameters, buffers, constants), then the inputs.
    state:    placeholder name -> name of the tensor in the module.
    tensors:  name -> the module's own tensor (never copied, never written); tied names once.
    tied:     every other name of a tied tensor -> the name it has in ``tensors``.
    constants: names in ``tensors`` that belong to the trace, not to the module.
    dims:     node name -> its shape (tensors), list of shapes (several tensors) or value (sizes).
    batch:    the batch size that labels are computed for; None when the trace is fixed to its example.
    module:   the network that ``tensors`` belong to: the given one without wrappers or, where computed weights are
              baked, its parts. Slicing copies it.
    """

    fx: fx.Graph
    state: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    tied: Mapping[str, str]
    constants: frozenset[str]
    inputs: tuple[str, ...]
    dims: Mapping[str, Any]
    in_spec: Any
    out_spec: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    free_batch: bool
    batch: int
    example_batch: int
    notes: tuple[str, ...] = ()
    module: nn.Module | None = field(default=None, repr=False)
    nodes: tuple[Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.fx.nodes))

    def shape(self, node: Node, batch: int | None = None) -> Shape:
        """The shape of a tensor-valued node at a batch size (default: the one labels use)."""
        return at(self.dims[node.name], self.batch if batch is None else batch)  # type: ignore[no-any-return]

    def shapes(self, batch: int | None = None) -> ShapeOf:
        return lambda node: self.shape(node, batch)

    def value(self, arg: Any, batch: int | None = None) -> Any:
        """An argument with every size node inside it replaced by its number."""
        return fx.node.map_arg(arg, lambda n: at(self.dims[n.name], self.batch if batch is None else batch))

    def fqn(self, node: Any) -> str | None:
        """The state tensor a node stands for, or None."""
        return self.state.get(node.name) if isinstance(node, Node) else None

    def is_tensor(self, node: Any) -> bool:
        return isinstance(node, Node) and isinstance(self.dims.get(node.name), tuple)

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    def __str__(self) -> str:
        rows = [f"{len(self.nodes)} nodes, {len(self.tensors)} tensors, batch "
                + ("free" if self.free_batch else f"fixed at {self.example_batch}")]
        for node in self.nodes:
            if node.op == "call_function" and self.is_tensor(node):
                shape = "x".join(str(dim) for dim in self.dims[node.name])
                rows.append(f"  {node.name:<24} {target_name(node):<32} {shape:<20} {owner(node)[0]}")
        return "\n".join(rows)


def at(dims: Any, batch: int) -> Any:
    """Evaluate a Dim, or any nest of tuples and lists of them, at a batch size."""
    if isinstance(dims, Dim):
        return dims.at(batch)
    if isinstance(dims, (tuple, list)):
        return type(dims)(at(dim, batch) for dim in dims)
    return dims


def owner(node: Node) -> tuple[str, str]:
    """(path, class name) of the module whose forward made the node; ``('', '')`` where unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return re.sub(r"@\d+", "", path), kind


def source(node: Node) -> str:
    """``file.py:12`` of the innermost line of the user's code behind a node ('' where unknown)."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]]
    return "{}:{}".format(*own[-1]) if own else ""


def target_name(node: Node) -> str:
    """``aten.conv2d``-like short name of a call."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def place(node: Node) -> str:
    """How a message names a node: ``'layer1.0.conv1' (aten.conv2d, net.py:12)``."""
    path, line = owner(node)[0] or node.name, source(node)
    return f"{path!r} ({target_name(node)}{', ' + line if line else ''})"


def mutates(target: Any) -> bool:
    """Whether an operator writes to its first argument."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def pure(target: Any) -> Any:
    """The form of an in-place operator that leaves its argument alone (itself where it already does)."""
    if not mutates(target):
        return target
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    wanted = [str(argument.type) for argument in target._schema.arguments]
    overloads = [getattr(packet, key) for key in packet.overloads()] if packet is not None else []
    return next((one for one in overloads if not one._schema.is_mutable     # pow_.Scalar is pow.Tensor_Scalar
                 and [str(argument.type) for argument in one._schema.arguments] == wanted), target)
