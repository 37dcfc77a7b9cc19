"""Count a traced network: per operator, per module and in total, from shapes alone."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor, fx, nn

from prunekern.core import files
from prunekern.core.graph import Graph, Shape, ShapeOf, owner, place, target_name
from prunekern.core.rule import OpRule, Registry, numel
from prunekern.cost.memory import Memory, Peak, memory, shapes_of
from prunekern.errors import InputError
from prunekern.graph.inputs import infer
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY

VERSION = 1
REFUSED = (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True, slots=True)
class Cost:
    """What something costs in one forward.

    macs:         multiply-accumulates of contractions (convolutions, linear layers, matrix products); a bias
                  is added, not multiplied, so it is no MAC.
    elementwise:  operations outside contractions, about one per element touched.
    fvcore_flops: what fvcore's FlopCountAnalysis counts: MACs, and some elementwise work by its own table.
    params:       elements of parameters, a tied one once. buffers: the same of buffers (running statistics).
    weight_bytes: bytes of both. read_bytes, written_bytes: activations, a view costing nothing.
    """

    macs: int = 0
    elementwise: int = 0
    fvcore_flops: int = 0
    params: int = 0
    buffers: int = 0
    weight_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    @property
    def flops(self) -> int:
        """2 * macs: one multiplication and one addition each."""
        return 2 * self.macs

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations read and written."""
        return self.read_bytes + self.written_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "flops": self.flops}


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator call. shape: that of its output; of the first one where it has several.

    A parameter is on the account of the call that reads it first, so that layers add up to the total.
    """

    name: str
    module: str
    op: str
    shape: Shape
    cost: Cost


@dataclass(frozen=True, slots=True)
class Module:
    """A module with everything called inside it, however deep; ``''`` is the model. Parameters: its own and
    those below, tied ones once."""

    path: str
    kind: str
    cost: Cost


@dataclass(frozen=True, slots=True)
class Uncounted:
    """Calls whose arithmetic is in no total: where they are, and why."""

    op: str
    where: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Profile:
    """The costs of one forward at a batch size.

    layers: every operator call in order. unused: parameters and buffers that no call reads or owns.
    total = the sum of layers + unused. modules: inclusive, in order of first call.
    uncounted: operators without a formula; a total is a lower bound while there are any.
    """

    batch: int
    total: Cost
    layers: tuple[Layer, ...]
    modules: tuple[Module, ...]
    unused: Cost
    peak: Peak
    uncounted: tuple[Uncounted, ...]
    notes: tuple[str, ...]

    @property
    def macs(self) -> int:
        return self.total.macs

    @property
    def flops(self) -> int:
        return self.total.flops

    @property
    def params(self) -> int:
        return self.total.params

    def by_operator(self) -> dict[str, Cost]:
        """Operator (``aten.conv2d``) -> the sum over its calls."""
        sums: dict[str, Cost] = {}
        for layer in self.layers:
            sums[layer.op] = sums.get(layer.op, Cost()) + layer.cost
        return sums

    def __getitem__(self, path: str) -> Module:
        """The module of a path (``''`` is the model)."""
        return next(module for module in self.modules if module.path == path)

    def to_json(self) -> str:
        """Everything, as versioned JSON text; counts are exact integers, sizes are bytes."""
        def plain(item: Any) -> dict[str, Any]:
            own = {f.name: getattr(item, f.name) for f in fields(item) if f.name != "cost"}
            return {**own, **item.cost.to_dict()}
        return json.dumps({
            "format": "prunekern-profile", "version": VERSION, "batch": self.batch,
            "total": self.total.to_dict(), "unused": self.unused.to_dict(), "peak": asdict(self.peak),
            "layers": [plain(layer) for layer in self.layers],
            "modules": [plain(module) for module in self.modules],
            "uncounted": [asdict(item) for item in self.uncounted], "notes": list(self.notes)}, indent=1)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the JSON to a file, whole or not at all. Raises ArtefactError where that fails."""
        files.write_text(Path(path), self.to_json() + "\n")
        return Path(path)

    def __str__(self) -> str:
        from prunekern.cost.table import text
        return text(self)

    def show(self, *, full: bool = False, file: TextIO | None = None) -> None:
        """Print as a table, with rich where it is installed. full: also operators without MACs or weights."""
        from prunekern.cost.table import show
        show(self, full=full, file=file)


def profile(model: nn.Module | Graph, inputs: Any = None, *, batch: int | None = None,
            shapes: ShapeOf | None = None, registry: Registry = REGISTRY) -> Profile:
    """What a model costs: MACs, FLOPs, elementwise operations, parameters, bytes, peak activation memory.

    model: a module in evaluation mode, or its Graph. inputs: what its forward takes (see ``trace``); not
    needed for a Graph, nor where the first layer says it all. batch: another batch size than the inputs have.
    shapes: other shapes than the graph's own, such as those that a plan predicts.

    Raises what ``trace`` raises, and InputError for a batch that the graph cannot have.
    """
    notes: tuple[str, ...] = ()
    if isinstance(model, Graph):
        graph = model
    else:
        if inputs is None and isinstance(model, nn.Module):
            inputs = infer(model)
            notes = (f"example inputs were inferred from the first layer: {tuple(inputs.shape)}",)
        graph = trace(model, inputs)
    size = _batch(graph, batch)
    return _Counter(graph, registry, shapes or graph.shapes(size)).profile(size, notes + graph.notes)


def _batch(graph: Graph, wanted: int | None) -> int:
    if graph.free_batch:
        size = graph.example_batch if wanted is None else wanted
        if size < 1:
            raise InputError(f"batch {size} is not a batch size; pass 1 or more.")
        return size
    if wanted not in (None, graph.batch):
        raise InputError(f"the forward fixes its batch size at {graph.batch}, so it cannot be counted at "
                         f"{wanted}; make it free in forward (x.size(0) in place of a number).")
    return graph.batch


class Costs:
    """MACs, parameters and bytes of a graph under any shapes: what a search for a target asks over and over.

    Finds the contractions, their rules and the weights once. ``shape`` maps every node, state included, to
    its shape, e.g. ``graph.shapes(1)``.
    """

    def __init__(self, graph: Graph, registry: Registry = REGISTRY) -> None:
        self.graph = graph
        ruled = ((node, registry.find(node.target)) for node in graph.nodes if node.op == "call_function")
        self._macs = [(rule.macs, node) for node, rule in ruled if rule and _contracts(rule, node, graph)]
        self._state = state_nodes(graph)

    def macs(self, shape: ShapeOf) -> int:
        return sum(formula(node, shape) for formula, node in self._macs)

    def params(self, shape: ShapeOf) -> int:
        """Elements of all parameters, tied ones once, used or not."""
        return sum(numel(shape(node)) for node, tensor in self._state if isinstance(tensor, nn.Parameter))

    def bytes(self, shape: ShapeOf) -> int:
        """Bytes of all parameters and buffers."""
        return sum(tensor.element_size() * numel(shape(node)) for node, tensor in self._state)


def macs_of(graph: Graph, shape: ShapeOf, registry: Registry = REGISTRY) -> int:
    """MACs of all contractions of a graph under the given shapes; see ``Costs`` for many such questions."""
    return Costs(graph, registry).macs(shape)


def _contracts(rule: OpRule, node: fx.Node, graph: Graph) -> bool:
    try:
        return rule.macs(node, graph.shape) > 0
    except REFUSED:
        return False                      # named in Profile.uncounted


def state_nodes(graph: Graph) -> list[tuple[fx.Node, Tensor]]:
    """(node, tensor) of every parameter and buffer of the module, once each."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        name = graph.fqn(node)
        if name is not None and name not in graph.constants:
            found.setdefault(name, node)
    return [(node, graph.tensors[name]) for name, node in found.items()]


class _Counter:
    """One pass over a graph."""

    def __init__(self, graph: Graph, registry: Registry, shape: ShapeOf) -> None:
        self.graph, self.registry, self.shape = graph, registry, shape
        self.memory: Memory = memory(graph)
        self.weights = {graph.state[node.name]: self._weight(node, tensor)
                        for node, tensor in state_nodes(graph)}
        self.missing: dict[tuple[str, str], list[str]] = {}

    def profile(self, batch: int, notes: tuple[str, ...]) -> Profile:
        calls = [node for node in self.graph.nodes if self._is_call(node)]
        owners = {node: self._owner(node) for node in calls}
        held = self._accounts(calls, owners)
        costs = {node: self._call(node) for node in calls}
        layers = tuple(Layer(node.name, owners[node], target_name(node), shapes_of(self.shape(node))[0],
                             costs[node] + _total(self.weights[name] for name in held.get(node, ())))
                       for node in calls)
        unused = _total(self.weights[name] for name in held.get(None, ()))
        return Profile(
            batch=batch, total=_total([unused, *(layer.cost for layer in layers)]), layers=layers,
            modules=tuple(self._modules(owners, costs)), unused=unused,
            peak=self.memory.peak(self.graph, self.shape), notes=notes,
            uncounted=tuple(Uncounted(op, tuple(where), why) for (op, why), where in self.missing.items()))

    def _is_call(self, node: fx.Node) -> bool:
        """A call that makes tensors; sizes and picking one of several tensors are no layers."""
        return (node.op == "call_function" and node.target is not operator.getitem
                and bool(shapes_of(self.shape(node))))

    def _owner(self, node: fx.Node) -> str:
        """The path of the module that made the call; where the trace does not say, of the weight it reads."""
        if node.meta.get("nn_module_stack"):
            return owner(node)[0]
        names = (self.graph.fqn(arg) or "" for arg in node.all_input_nodes)
        return next((_parent(name) for name in names if name in self.weights), "")

    def _call(self, node: fx.Node) -> Cost:
        rule = self.registry.find(node.target)
        read, written = self.memory.traffic(node, self.shape)
        if rule is None:
            self._miss(node, "no rule for this operator")
            return Cost(read_bytes=read, written_bytes=written)
        try:
            return Cost(macs=rule.macs(node, self.shape), elementwise=rule.elementwise(node, self.shape),
                        fvcore_flops=rule.fvcore(node, self.shape), read_bytes=read, written_bytes=written)
        except REFUSED as error:
            self._miss(node, f"its formula cannot handle this call ({type(error).__name__}: {error})")
            return Cost(read_bytes=read, written_bytes=written)

    def _miss(self, node: fx.Node, reason: str) -> None:
        self.missing.setdefault((target_name(node), reason), []).append(place(node))

    def _weight(self, node: fx.Node, tensor: Tensor) -> Cost:
        size = numel(self.shape(node))
        parameter = isinstance(tensor, nn.Parameter)
        return Cost(params=size if parameter else 0, buffers=0 if parameter else size,
                    weight_bytes=size * tensor.element_size())

    def _accounts(self, calls: Iterable[fx.Node],
                  owners: Mapping[fx.Node, str]) -> dict[fx.Node | None, list[str]]:
        """Which call each weight is on the account of: the first to read it, else the first of its module."""
        reader: dict[str, fx.Node] = {}
        home: dict[str, fx.Node] = {}
        for node in calls:
            home.setdefault(owners[node], node)
            for arg in node.all_input_nodes:
                name = self.graph.fqn(arg)
                if name is not None:
                    reader.setdefault(name, node)
        held: dict[fx.Node | None, list[str]] = {}
        for name in self.weights:
            held.setdefault(reader.get(name, home.get(_parent(name))), []).append(name)
        return held

    def _modules(self, owners: Mapping[fx.Node, str], costs: Mapping[fx.Node, Cost]) -> Iterator[Module]:
        kinds: dict[str, str] = {"": ""}
        sums: dict[str, Cost] = {}
        for node, cost in costs.items():
            stack = _stack(node) or dict.fromkeys(_prefixes(owners[node]), "")
            for path, kind in stack.items():
                kinds[path] = kinds.get(path) or kind
                sums[path] = sums.get(path, Cost()) + cost
        names = {name: name for name in self.weights} | dict(self.graph.tied)
        below: dict[str, dict[str, Cost]] = {}
        for alias, name in names.items():
            for path in _prefixes(_parent(alias)):
                below.setdefault(path, {})[name] = self.weights[name]
        for path in {**kinds, **below}:
            weights = _total(below.get(path, {}).values())
            yield Module(path, kinds.get(path, ""), sums.get(path, Cost()) + weights)


def _total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _prefixes(path: str) -> list[str]:
    """``''``, ``a``, ``a.b`` for ``a.b``."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _stack(node: fx.Node) -> dict[str, str]:
    """Path -> class name of every module that was in its forward when the call was made, outermost first."""
    found: dict[str, str] = {}
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        found[re.sub(r"@\d+", "", path)] = name
    return found
