"""Capture by two recordings, at two batch sizes, compared call by call: what torch.export finds, in a fraction of its
time.

Nothing is computed: tensors are fake, they have shapes only. Whatever is the same in both recordings belongs to the
network; an integer or a size that differs is ``a * N + b`` of the batch, or the forward does something with its batch
that two recordings cannot tell, and torch.export is asked.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from prunekern.core.graph import Dim, Graph
from prunekern.graph.inputs import Call
from prunekern.graph.parts import ghost, tensors_of
from prunekern.graph.recorder import Recorder, Recording, Ref, Step, Unclear
from prunekern.graph.sizes import LABEL_BATCH
from prunekern.graph.states import follow_weights, write_all

APART = 1009        # prime: what a quotient, remainder or bound gives at batches so far apart is no a*N+b of them
THIRD = 1367        # for sizes with an offset: N*N looks like a*N+b at any two batches
CALLS = 1_000_000   # of one forward, at most
PLAIN = (int, float, bool, str, type(None))

aten = torch.ops.aten
AS_IN_EXPORT = {aten.lift_fresh.default: aten.lift_fresh_copy.default}     # constants are not to be written to


def capture_twice(model: nn.Module, call: Call, example_batch: int) -> Graph:
    """The graph of a forward in evaluation mode, its batch free.

    Raises Unclear, or whatever the forward raises on tensors without values, where this is no way to capture it: state
    that is written to, sizes that depend on data, a batch that is fixed, branches or loops over it, autocasting.
    """
    batch = call.batch or 1
    if batch < 2 or call.whole or any(module.training for module in model.modules()):
        raise Unclear("not a network in evaluation mode on a batch of rows")
    runs = _Runs(model, call)
    first = runs.at(batch, CALLS)
    calls = len(first.recording.steps)
    merged = _merged(first, runs.at(batch + APART, calls))
    # Labels are computed at a small batch, of which a slice of 32 rows holds fewer than of the example.
    third = LABEL_BATCH if batch > LABEL_BATCH else batch + THIRD if merged.offsets else None
    if third is not None and merged != _merged(first, runs.at(third, calls)):
        raise Unclear("some size is no a * N + b of the batch")
    return _graph(runs, call, first, merged, example_batch)


@dataclass(frozen=True)
class _Run:
    """One recorded forward. outputs: flat, with a Ref for every tensor."""

    batch: int
    recording: Recording
    outputs: tuple[Any, ...]
    spec: Any


class _Runs:
    """Forwards of copies of one model, each as fresh as the first, on inputs of any batch."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call = model, call
        self.canonical, self.tied, self.tensors = tensors_of(model)
        self.fakes = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
        self.state = {name: self.fakes.from_tensor(tensor, static_shapes=True) for name, tensor in self.tensors.items()}
        self.leaves, self.in_spec = pytree.tree_flatten((call.args, dict(call.kwargs)))

    def at(self, batch: int, limit: int) -> _Run:
        made = ghost(self.model, {id(tensor): self.state[name] for name, tensor in self.tensors.items()})
        if made is self.model:
            raise Unclear("the model cannot be copied")
        leaves = [self._given(leaf, batch) for leaf in self.leaves]
        given = [*self.state.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        recorder = Recorder(given, len(self.state), limit)
        with _as_in_export(), self.fakes:
            flat, spec = pytree.tree_flatten(recorder.run(made, args, kwargs))
        if any(type(leaf) not in PLAIN and not isinstance(leaf, Tensor) for leaf in flat):
            raise Unclear("an output that is neither a tensor nor a number")
        after = tensors_of(made)
        if after[0] != self.canonical or any(after[2][name] is not fake for name, fake in self.state.items()):
            raise Unclear("the forward registers or replaces tensors")
        return _Run(batch, recorder.recording, tuple(map(recorder.refs, flat)), spec)

    def _given(self, leaf: Any, batch: int) -> Any:
        """An input without values, at another batch in the memory order that it has."""
        if not isinstance(leaf, Tensor):
            return leaf
        fake = self.fakes.from_tensor(leaf.detach(), static_shapes=True)
        if batch == self.call.batch or not self.call.has_batch(leaf):
            return fake
        order = sorted(range(leaf.dim()), key=lambda axis: (-leaf.stride()[axis], axis))
        sizes = (batch, *leaf.shape[1:])
        with self.fakes:
            return torch.empty([sizes[axis] for axis in order], dtype=leaf.dtype, device=leaf.device).permute(
                [order.index(axis) for axis in range(leaf.dim())])


@contextlib.contextmanager
def _as_in_export() -> Iterator[None]:
    """What forwards ask to take the way meant for captures. Attention layers stay operators; that cuDNN may be used is
    not written into the calls."""
    compiler, mha = torch.compiler, torch.backends.mha
    before, fast = (compiler._is_compiling_flag, compiler._is_exporting_flag), mha.get_fastpath_enabled()
    compiler._is_compiling_flag = compiler._is_exporting_flag = True
    mha.set_fastpath_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        compiler._is_compiling_flag, compiler._is_exporting_flag = before
        mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class _Call:
    """A call at any batch: sizes among its arguments are numbers or Dims."""

    target: Any
    args: Any
    kwargs: Mapping[str, Any]
    results: tuple[Ref | None, ...]
    dims: tuple[Any, ...]


@dataclass(frozen=True)
class _Merged:
    calls: tuple[_Call, ...]
    outputs: Any
    given: tuple[Any, ...]
    offsets: bool


def _merged(first: _Run, other: _Run) -> _Merged:
    """What two recordings agree on. Raises Unclear where they are not of one network."""
    merge = _Merge(first.batch, other.batch)
    steps, others = first.recording.steps, other.recording.steps
    if len(steps) != len(others) or first.spec != other.spec:
        raise Unclear("other calls at another batch")
    calls = tuple(map(merge.step, steps, others))
    if not _same_constants(first.recording.constants, other.recording.constants):
        raise Unclear("other constants at another batch")
    given = tuple(merge.value(tuple(a.shape), tuple(b.shape))
                  for a, b in zip(first.recording.given, other.recording.given, strict=True))
    return _Merged(calls, merge.value(first.outputs, other.outputs), given, merge.offsets)


class _Merge:
    """offsets: whether some size was found to be a * N + b with neither of them 0."""

    def __init__(self, first: int, other: int) -> None:
        self.first, self.other, self.offsets = first, other, False

    def step(self, a: Step, b: Step) -> _Call:
        if a.target is not b.target or a.results != b.results or a.kwargs.keys() != b.kwargs.keys():
            raise Unclear(f"{a.target} at one batch, {b.target} at another")
        return _Call(a.target, self.value(a.args, b.args), {key: self.value(a.kwargs[key], b.kwargs[key])
                                                            for key in a.kwargs}, a.results,
                     self.value(a.shapes, b.shapes))

    def value(self, a: Any, b: Any) -> Any:
        """The value at any batch: as it is where it is the same at both, else a Dim."""
        if type(a) is not type(b):
            raise Unclear(f"{a} at one batch, {b} at another")
        if isinstance(a, (tuple, list)):
            if a == b:
                return a
            if len(a) != len(b):
                raise Unclear(f"{a} at one batch, {b} at another")
            return type(a)(map(self.value, a, b))
        if a == b or (a != a and b != b):
            return a
        scale, rest = divmod(b - a, self.other - self.first) if type(a) is int else (0, 1)
        if rest:
            raise Unclear(f"{a} at one batch, {b} at another")
        offset = a - scale * self.first
        self.offsets |= bool(offset)
        return Dim(scale, offset)


def _same_constants(first: Mapping[Ref, tuple[str, Tensor]], other: Mapping[Ref, tuple[str, Tensor]]) -> bool:
    return first.keys() == other.keys() and all(
        a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
        for (_, a), (_, b) in ((first[ref], other[ref]) for ref in first))


def _graph(runs: _Runs, call: Call, first: _Run, merged: _Merged, example_batch: int) -> Graph:
    build = _Builder(runs, call, first, merged)
    graph = build.graph
    follow_weights(graph)
    write_all(graph)
    graph.eliminate_dead_code()
    dims = {node.name: node.meta.pop("dims") for node in graph.nodes if node.op != "output"}
    return Graph(fx=graph, state=build.state, tensors=build.tensors, tied=runs.tied, constants=build.constants,
                 inputs=build.inputs, dims=dims, in_spec=runs.in_spec, out_spec=first.spec, args=call.args,
                 kwargs=dict(call.kwargs), free_batch=True, batch=LABEL_BATCH, example_batch=example_batch)


class _Builder:
    """The calls as an fx graph in the form that torch.export gives: state, constants, inputs, sizes, calls."""

    def __init__(self, runs: _Runs, call: Call, first: _Run, merged: _Merged) -> None:
        self.runs, self.call, self.first, self.merged = runs, call, first, merged
        self.graph, self.state, self.tensors = fx.Graph(), dict[str, str](), dict(runs.tensors)
        self.env: dict[Ref, fx.Node] = {}
        self.sizes: dict[Dim, fx.Node] = {}
        self.rows: fx.Node | None = None
        self._given()
        self.last = list(self.graph.nodes)[-1]
        for step, merged_call in zip(first.recording.steps, merged.calls, strict=True):
            self._call(step, merged_call)
        outputs = tuple(self._argument(value) for value in merged.outputs)
        self.graph.output(outputs)

    def _given(self) -> None:
        parameters = dict(self.runs.model.named_parameters(remove_duplicate=False))
        refs = map(Ref, range(len(self.first.recording.given)))
        for name in self.runs.state:
            self._state(next(refs), name, "p" if name in parameters else "b", self.runs.state[name])
        names = _constant_names(self.runs.model, self.first.recording.constants, self.tensors)
        for ref, name in names.items():
            self.tensors[name] = self.first.recording.constants[ref][1]
            self._state(ref, name, "c", self.tensors[name])
        self.constants = frozenset(names.values())
        self.inputs = tuple(self._input(name, leaf, refs) for name, leaf in
                            zip(_input_names(self.runs.model, self.call), self.runs.leaves, strict=True))

    def _state(self, ref: Ref, name: str, kind: str, value: Tensor) -> None:
        node = self._placeholder(f"{kind}_{name}", value, tuple(Dim(0, size) for size in value.shape))
        self.state[node.name] = name
        self.env[ref] = node

    def _input(self, name: str, leaf: Any, refs: Iterator[Ref]) -> str:
        if not isinstance(leaf, Tensor):
            number = isinstance(leaf, int) and not isinstance(leaf, bool)
            return self._placeholder(name, leaf, Dim(0, leaf) if number else leaf).name
        ref = next(refs)
        node = self.env[ref] = self._placeholder(name, self.first.recording.given[ref.number],
                                                 _dims(self.merged.given[ref.number]))
        if self.call.has_batch(leaf):
            self.rows = self.rows or node
        return node.name

    def _placeholder(self, name: str, value: Any, dims: Any) -> fx.Node:
        node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta.update(val=value, dims=dims)
        return node

    def _call(self, step: Step, call: _Call) -> None:
        meta = {"nn_module_stack": step.stack, "stack_trace": step.line}
        dims = [_dims(size) for size in call.dims]
        node = self._node(call.target, self._argument(call.args), self._argument(dict(call.kwargs)), meta,
                          list(step.values) if step.several else step.values[0], dims if step.several else dims[0])
        for place, ref in enumerate(call.results):
            if ref is not None:
                self.env[ref] = node if not step.several else self._node(
                    operator.getitem, (node, place), {}, meta, step.values[place], dims[place])

    def _node(self, target: Any, args: Any, kwargs: Any, meta: dict[str, Any], value: Any, dims: Any) -> fx.Node:
        target = AS_IN_EXPORT.get(target, target)
        packet = getattr(target, "overloadpacket", target)
        node = self.graph.create_node("call_function", target, args, kwargs, name=packet.__name__)
        node.meta.update(meta, val=value, dims=dims)
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self.env[value]
        if isinstance(value, Dim):
            return self._size(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._argument, value))
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        return value

    def _size(self, dim: Dim) -> fx.Node:
        """The node that computes a size: ``sym_size(x, 0) * scale + offset``."""
        if dim not in self.sizes:
            target: Any
            args: tuple[Any, ...]
            if dim.offset:
                target, args = operator.add, (self._size(Dim(dim.scale, 0)), dim.offset)
            elif dim.scale != 1:
                target, args = operator.mul, (self._size(Dim(1, 0)), dim.scale)
            else:
                target, args = aten.sym_size.int, (self.rows, 0)
            with self.graph.inserting_after(self.last) if dim == Dim(1, 0) else contextlib.nullcontext():
                self.sizes[dim] = self._node(target, args, {}, {}, dim.at(self.first.batch), dim)
        return self.sizes[dim]


def _dims(sizes: Any) -> Any:
    return None if sizes is None else tuple(size if isinstance(size, Dim) else Dim(0, size) for size in sizes)


def _constant_names(model: nn.Module, constants: Mapping[Ref, tuple[str, Tensor]],
                    taken: Mapping[str, Tensor]) -> dict[Ref, str]:
    """A module's attribute is named after it; what a forward makes, after its module and in the order of use."""
    attributes = {id(value): f"{path}.{name}".removeprefix(".") for path, module in model.named_modules()
                  for name, value in vars(module).items() if isinstance(value, Tensor)}
    names: dict[Ref, str] = {}
    for ref, (path, tensor) in constants.items():
        made = (f"{path}.lifted_tensor_{number}".removeprefix(".") for number in itertools.count())
        wishes = itertools.chain([attributes[id(tensor)]] if id(tensor) in attributes else [], made)
        names[ref] = next(name for name in wishes if name not in taken and name not in names.values())
    return names


def _input_names(model: nn.Module, call: Call) -> list[str]:
    """By leaf of the inputs: the forward's own name of the argument, and the way further in where it lies deeper."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    names = []
    paths: list[Any] = [path for path, _ in pytree.tree_flatten_with_path((call.args, dict(call.kwargs)))[0]]
    for which, first, *deeper in paths:
        place = first.key if which.idx else first.idx
        name = place if which.idx else plain[place] if place < len(plain) else f"{rest}_{place - len(plain)}"
        names.append("_".join([name, *re.findall(r"\w+", pytree.keystr(tuple(deeper)))]))
    return names
