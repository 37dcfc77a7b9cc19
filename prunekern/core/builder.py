"""Turns the nodes of a Graph into Steps: what an operator rule's ``lower`` is given.

In-place operators become pure ones here: a tensor's later readers read the new value, a write to a view is
scattered into what it is a view of, and other views of that are made anew where they are read again. What
depends on parameters alone is computed once, here, and becomes a weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunekern.core.arguments import by_name, encode, operator_name
from prunekern.core.graph import Dim, Graph, mutates, owner, place, pure
from prunekern.core.program import NO_EPILOGUE, Epilogue, Program, Slot, Step
from prunekern.core.rule import OpRule
from prunekern.core.views import BASE, VALUE, Broken, Constant, relation, scatter
from prunekern.errors import LoweringError


class Builder:
    """Walks a Graph in order; ``values`` holds what every node stands for: a Slot, a Constant, several by index."""

    def __init__(self, graph: Graph, find: Callable[[Any], OpRule | None]) -> None:
        self.graph, self.find = graph, find
        self.steps: list[Step] = []
        self.weights: dict[str, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}
        self.notes: list[str] = list(graph.notes)
        self._names: set[str] = set()
        self._root: dict[fx.Node, fx.Node] = {}          # node -> the node that is the same tensor
        self._base: dict[fx.Node, fx.Node] = {}          # view -> what it is a view of
        self._pieces: dict[fx.Node, dict[int, Slot]] = {}
        self._loaded: dict[str, Slot] = {}
        self._dtypes = {node.name: _dtypes(node) for node in graph.nodes}
        self._writes = any(mutates(node.target) for node in graph.nodes)

    # ---- what a rule asks ----------------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> tuple[Dim, ...]:
        return self.graph.dims[node.name]  # type: ignore[no-any-return]

    def rank(self, node: Any) -> int:
        return len(self.shape(node))

    def is_tensor(self, arg: Any) -> bool:
        return self.graph.is_tensor(arg)

    def dtype(self, node: fx.Node) -> torch.dtype:
        return self._dtypes[node.name][0]  # type: ignore[no-any-return]

    def is_float(self, node: Any) -> bool:
        return self.is_tensor(node) and self.dtype(node).is_floating_point

    def is_constant(self, arg: Any) -> bool:
        return isinstance(arg, fx.Node) and isinstance(self.value(arg), Constant)

    def constant(self, arg: fx.Node) -> Tensor:
        """The tensor that a constant node holds."""
        return self.weights[self.weight(arg)]

    def weight(self, arg: fx.Node) -> str:
        """The name of a constant node's tensor."""
        value = self.value(arg)
        if not isinstance(value, Constant):
            raise LoweringError(f"{place(arg)} depends on the inputs where a weight is expected")
        return value.name

    def slot(self, arg: fx.Node) -> Slot:
        """The slot that holds a node's value; a constant is loaded into one."""
        value = self.value(arg)
        if isinstance(value, Constant):
            return self._load(value.name)
        if not isinstance(value, Slot):
            raise LoweringError(f"{place(arg)} is no tensor that a step can read")
        return value

    def fixed(self, arg: Any) -> Any:
        """Numbers of an argument with sizes in it. Raises LoweringError where they depend on the batch."""
        def number(node: fx.Node) -> Any:
            dim = self.graph.dims[node.name]
            if not isinstance(dim, Dim) or dim.scale:
                raise LoweringError(f"{place(node)} depends on the batch where a fixed number is expected")
            return dim.offset
        return fx.node.map_arg(arg, number)

    def is_fixed(self, arg: Any) -> bool:
        sizes = [self.graph.dims[n.name] for n in pytree.tree_leaves(arg) if isinstance(n, fx.Node)]
        return all(isinstance(dim, Dim) and not dim.scale for dim in sizes)

    def name(self, node: fx.Node) -> str:
        """The operator's name without namespace, overload and the underscore of its in-place form."""
        return str(node.target._schema.name).split("::")[1].removesuffix("_")  # type: ignore[union-attr]

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """A call's arguments by their name in the operator's schema."""
        return by_name(node)

    # ---- what a rule writes --------------------------------------------------------------------------------

    def store(self, name: str, tensor: Tensor) -> str:
        """Keep a new weight; gives the name it got."""
        name = self._unique(name)
        self.weights[name] = tensor.detach()
        return name

    def step(self, op: str, node: fx.Node, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None,
             weights: Mapping[str, str] | None = None, epilogue: Epilogue = NO_EPILOGUE,
             item: int | None = None) -> Slot:
        """Add a Step that gives the node's value. ``inputs`` are nodes or Slots.

        item: which of the node's several tensors this is (a node of which only the first one is read: 0).
        """
        dims, several = self.graph.dims[node.name], item is not None
        index = item or 0
        slot = Slot(self._unique(f"{node.name}.{index}" if several else node.name), dims[index] if several else dims,
                    self._dtypes[node.name][index])
        slots = tuple(each if isinstance(each, Slot) else self.slot(each) for each in inputs)
        self.steps.append(Step(op, slot.name, slots, (slot,), dict(attributes or {}), dict(weights or {}), epilogue,
                               self._macs(node), owner(node)[0], place(node)))
        if several:
            self._pieces.setdefault(node, {})[index] = slot
            self.values[node] = self._pieces[node]
        else:
            self.values[node] = slot
        return slot

    def several(self, op: str, node: fx.Node, inputs: Sequence[fx.Node], attributes: Mapping[str, Any],
                weights: Mapping[str, str]) -> None:
        """Add a Step that gives all of a node's several tensors."""
        kinds = zip(self.graph.dims[node.name], self._dtypes[node.name], strict=True)
        slots = [Slot(self._unique(f"{node.name}.{i}"), *kind) for i, kind in enumerate(kinds)]
        self.steps.append(Step(op, self._unique(node.name), tuple(map(self.slot, inputs)), tuple(slots),
                               dict(attributes), dict(weights), macs=self._macs(node), source=owner(node)[0],
                               place=place(node)))
        self.values[node] = dict(enumerate(slots))

    def only_first(self, node: fx.Node) -> bool:
        """Of a node's several tensors, only the first one is read."""
        return all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)

    def between(self, op: str, node: fx.Node, inputs: Sequence[Any], shape: tuple[Dim, ...],
                attributes: Mapping[str, Any] | None = None, epilogue: Epilogue = NO_EPILOGUE) -> Slot:
        """Add a Step for a part of what the node does; gives its slot."""
        slot = Slot(self._unique(f"{node.name}.{op}"), shape, self._dtypes[node.name][0])
        slots = tuple(item if isinstance(item, Slot) else self.slot(item) for item in inputs)
        self.steps.append(Step(op, slot.name, slots, (slot,), dict(attributes or {}), epilogue=epilogue,
                               source=owner(node)[0], place=place(node)))
        return slot

    def reordered(self, node: fx.Node, x: fx.Node, split: tuple[Dim, ...], axes: Sequence[int]) -> bool:
        """The node is x in a finer shape, its axes permuted, in the node's own shape."""
        fine = self.between("move", node, (x,), split, {"kind": "reshape"})
        order = {"kind": "permute", "axes": list(axes)}
        moved = self.between("move", node, (fine,), tuple(split[a] for a in axes), order)
        self.step("move", node, (moved,), {"kind": "reshape"})
        return True

    def same(self, node: fx.Node, source: fx.Node) -> None:
        """The node has its source's value and needs no step."""
        self.values[node] = self.value(source)

    # ---- the walk ------------------------------------------------------------------------------------------

    def run(self, parameters: tuple[str, ...] = ()) -> Program:
        """The raw Program: one or more Steps a node, nothing folded."""
        graph, inputs = self.graph, []
        for node in graph.nodes:
            if node.op == "placeholder":
                inputs += self._placeholder(node)
            elif node.op == "call_function":
                self.lower(node)
        outputs = tuple(self._output(leaf) for leaf in pytree.tree_leaves(graph.output.args[0], is_leaf=_is_none))
        program = Program((), {}, tuple(inputs), outputs, graph.in_spec, graph.out_spec, parameters,
                          batch=None if graph.free_batch else graph.batch, notes=tuple(self.notes))
        return program.with_steps(self.steps, self.weights)

    def lower(self, node: fx.Node) -> None:
        """Add a node's Steps and give it its value."""
        dims = self.graph.dims.get(node.name)
        if isinstance(dims, Dim) or not (isinstance(dims, (tuple, list))):
            return                                        # a size or an assertion
        target = node.target
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if target is operator.getitem:
            if not node.users:
                return
            self.values[node] = self.value(source)[node.args[1]]  # type: ignore[arg-type]
            if source in self._base:
                self._base[node] = source
            return
        if not self._folded(node):
            rule, count = self.find(target), len(self.steps)
            if rule is None or not rule.lower(node, self):
                del self.steps[count:]
                self.aten(node)
        if source is None or not self._writes:
            return
        if mutates(target):
            self._root[node] = self._top(source)
            self._written(source, self.values[node])
            return
        kind = relation(node)
        if kind == "itself":
            self._root[node] = self._top(source)
        elif kind == "view":
            self._base[node] = source

    def aten(self, node: fx.Node) -> None:
        """The visible Step for an operator that stays what it is."""
        target, kwargs = pure(node.target), dict(node.kwargs)
        if mutates(target):
            raise LoweringError(f"{place(node)} writes to its argument and has no pure form; use one in the model.")
        self._call(node, node.name, target, node.args, kwargs)

    # ---- inside --------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        top = self._top(node)
        if top not in self.values:
            base = self._base.get(top)
            if base is None:
                raise LoweringError(f"{place(node)} has no value a step could read")
            self.lower(top)                               # a view of something that was written since
        value = self.values[top]
        if isinstance(value, Broken):
            raise LoweringError(value.message)
        return value

    def _top(self, node: fx.Node) -> fx.Node:
        while node in self._root:
            node = self._root[node]
        return node

    def _placeholder(self, node: fx.Node) -> list[Any]:
        name = self.graph.state.get(node.name)
        if name is not None:
            if name not in self.weights:
                self.weights[name] = self.graph.tensors[name].detach()
                self._names.add(name)
            self.values[node] = Constant(name)
            return []
        dims = self.graph.dims.get(node.name)
        if not isinstance(dims, tuple):
            return [dims]
        slot = Slot(self._unique(node.name), dims, self.dtype(node))
        self.values[node] = slot
        return [slot]

    def _output(self, leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        if self.graph.is_tensor(leaf):
            return self.slot(leaf)
        return self.graph.dims[leaf.name]

    def _load(self, name: str) -> Slot:
        if name not in self._loaded:
            tensor = self.weights[name]
            slot = Slot(self._unique(f"{name}.constant"), tuple(Dim(0, n) for n in tensor.shape), tensor.dtype)
            self.steps.append(Step("constant", slot.name, (), (slot,), {}, {"value": name}, source=name, place=name))
            self._loaded[name] = slot
        return self._loaded[name]

    def _folded(self, node: fx.Node) -> bool:
        """Compute a node that depends on no input; its result becomes a weight."""
        target = pure(node.target)
        if not isinstance(target, torch._ops.OpOverload) or mutates(target) \
                or torch.Tag.nondeterministic_seeded in target.tags \
                or any(dtype.is_complex for dtype in self._dtypes[node.name]):   # on disk: real
            return False
        leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
        for leaf in leaves:
            if isinstance(leaf, fx.Node) and not (self.is_fixed(leaf) if isinstance(self.graph.dims[leaf.name], Dim)
                                                  else self.is_constant(leaf)):
                return False

        def put(leaf: fx.Node) -> Any:
            dim = self.graph.dims[leaf.name]
            return dim.offset if isinstance(dim, Dim) else self.constant(leaf)
        with torch.no_grad():
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), put)
            result = target(*args, **kwargs)
        self.values[node] = pytree.tree_map_only(Tensor, lambda t: self._hold(node.name, t), result)
        return True

    def _hold(self, name: str, tensor: Tensor) -> Constant:
        for known, other in self.weights.items():         # a no-op gives the weight itself, not another one
            if other.data_ptr() == tensor.data_ptr() and other.shape == tensor.shape \
                    and other.stride() == tensor.stride() and other.dtype == tensor.dtype and tensor.numel():
                return Constant(known)
        return Constant(self.store(name, tensor.clone()))

    def _call(self, node: fx.Node, name: str, target: Any, args: Any, kwargs: Any) -> None:
        """Add an ATen Step; arguments hold nodes, Slots, Constants and numbers."""
        inputs: list[Slot] = []
        weights: dict[str, str] = {}

        def reference(arg: Any) -> dict[str, Any] | None:
            if isinstance(arg, fx.Node):
                dims = self.graph.dims.get(arg.name)
                if isinstance(dims, Dim):
                    return {"dim": [dims.scale, dims.offset]} if dims.scale else None
                arg = self.value(arg)
            if isinstance(arg, Slot):
                if arg not in inputs:
                    inputs.append(arg)
                return {"input": inputs.index(arg)}
            if isinstance(arg, Constant):
                role = next((r for r, n in weights.items() if n == arg.name), f"w{len(weights)}")
                weights[role] = arg.name
                return {"weight": role}
            return None
        try:
            attributes = {"target": operator_name(target),
                          "args": encode(self._sizes(args), reference),
                          "kwargs": {key: encode(self._sizes(arg), reference) for key, arg in kwargs.items()}}
        except LoweringError as error:
            raise LoweringError(f"{place(node)}: {error}; write this part with other operators, or lower the "
                                "modules around it.") from error
        dims, dtypes = self.graph.dims[node.name], self._dtypes[node.name]
        name = self._unique(name)
        if isinstance(dims, tuple):
            if any(dim.measured for dim in dims):
                attributes["sized"] = True                # by the data: the sizes of a run must be those of the layout
            outputs = [Slot(name, dims, dtypes[0])]
        else:
            outputs = [Slot(self._unique(f"{name}.{i}"), shape, dtype)
                       for i, (shape, dtype) in enumerate(zip(dims, dtypes, strict=True))]
        self.steps.append(Step("aten", name, tuple(inputs), tuple(outputs), attributes, weights,
                               macs=self._macs(node), source=owner(node)[0], place=place(node)))
        self.values[node] = outputs[0] if isinstance(dims, tuple) else dict(enumerate(outputs))

    def _sizes(self, arg: Any) -> Any:
        """Sizes that do not depend on the batch as plain numbers; the others stay nodes."""
        def number(node: fx.Node) -> Any:
            dim = self.graph.dims.get(node.name)
            return dim.offset if isinstance(dim, Dim) and not dim.scale else node
        return fx.node.map_arg(arg, number)

    def _macs(self, node: fx.Node) -> Dim:
        rule = self.find(node.target)
        return Dim(0, 0) if rule is None else self.affine(lambda batch: rule.macs(node, self.graph.shapes(batch)))

    def affine(self, count: Callable[[int], int]) -> Dim:
        """A count of the batch as a Dim."""
        if not self.graph.free_batch:
            return Dim(0, count(self.graph.batch))
        first, second = count(2), count(3)
        return Dim(second - first, first - 2 * (second - first))

    def _written(self, node: fx.Node, value: Any) -> None:
        """A tensor has a new value: so has what it is a view of, and views of that are stale."""
        top = self._top(node)
        self.values[top] = value
        self._forget_views(top)
        base = self._base.get(top)
        if base is None:
            return
        call = scatter(top, self.shape(base)) if self.is_tensor(base) else None
        written: Any = Broken(
            f"{place(node)} is written in place, and so is {place(base)} that it is a view of; this cannot be made "
            "pure. Assign to a new tensor instead (torch.cat, torch.where).")
        if call is not None:
            swap = {BASE: self.value(base), VALUE: value}
            written = self._scattered(base, call[0], [swap.get(arg, arg) if arg in (BASE, VALUE) else arg
                                                      for arg in call[1]])
        self._written(base, written)
        self.values[top] = value

    def _forget_views(self, top: fx.Node) -> None:
        for view, base in list(self._base.items()):
            if self._top(base) is top and view in self.values:
                del self.values[view]
                self._forget_views(view)

    def _scattered(self, base: fx.Node, target: Any, args: Sequence[Any]) -> Any:
        """The value of a call that has the base's shape: computed now where it is constant, else a Step."""
        if not any(isinstance(leaf, Slot) or (isinstance(leaf, Dim) and leaf.scale)
                   for leaf in pytree.tree_leaves(args, is_leaf=lambda leaf: isinstance(leaf, (Slot, Dim)))):
            numbers = pytree.tree_map_only((Constant, Dim), lambda leaf: leaf.offset if isinstance(leaf, Dim)
                                           else self.weights[leaf.name], list(args),
                                           is_leaf=lambda leaf: isinstance(leaf, (Constant, Dim)))
            return self._hold(base.name, target(*numbers))
        self._call(base, f"{base.name}.written", target, tuple(args), {})
        return self.values[base]

    def _unique(self, name: str) -> str:
        fresh, count = name, 1
        while fresh in self._names:
            fresh, count = f"{name}.{count}", count + 1
        self._names.add(fresh)
        return fresh


def _dtypes(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return [item.dtype for item in pytree.tree_leaves(value) if isinstance(item, Tensor)]


def _is_none(leaf: Any) -> bool:
    return leaf is None

