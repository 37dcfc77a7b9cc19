"""Capture a model as a Graph: torch.export (non-strict) with a free batch, with two honest fallbacks."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim as ExportDim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from prunekern.core import structure
from prunekern.core.graph import Dim, Graph, place
from prunekern.errors import InputError, ModelError, TraceError
from prunekern.graph.evaluate import evaluate
from prunekern.graph.inline import inline_grad_modes
from prunekern.graph.inputs import Call, as_call
from prunekern.graph.measured import Read, Reading, assumed, measured, read_numbers
from prunekern.graph.parts import ghost
from prunekern.graph.refusal import refusal
from prunekern.graph.states import PackedCounts, follow_weights, write_all
from prunekern.graph.unwrap import check_kind, unwrap

LABEL_BATCH = 2
Way = tuple[Call, Any, tuple[str, ...]]     # inputs, sizes that are free, what to say of it
NEARBY = 0.01         # noise on the inputs that a recording must also hold for
NOISY = ("torch.export", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


def trace(model: nn.Module, example_inputs: Any, *, allow_train: bool = False, widen: bool = True) -> Graph:
    """Capture ``model``'s forward as one graph of whole operators; the model is only read.

    example_inputs: a tensor, a tuple (positional) or a dict (keyword arguments); axis 0 is the batch. The
    batch is free in the result wherever the forward allows it; otherwise ``Graph.notes`` says so.
    widen: capture a batch of one at two, where sizes that are 1 by chance cannot be taken for broadcast axes.

    Raises ModelError (not a Module, training mode, NaN, mixed devices), InputError (the forward fails on the
    inputs; the user's own error is chained) and TraceError (control flow that depends on data).
    Source: torch.export (PyTorch 2 export, training IR); fallback: torch.fx make_fx.
    """
    check_model(model, allow_train)
    model, notes = unwrap(model)
    call = as_call(model, example_inputs)
    check_devices(model, call)
    example_batch = call.batch
    with _quiet(), _attributes_kept(model):
        graph = _capture(model, call, example_batch or 1, widen)
    if not graph.output.all_input_nodes:
        raise TraceError(f"{type(model).__name__}.forward returns no tensor that depends on its inputs or weights, so "
                         "nothing could be proven; make it return its result.")
    return replace(graph, module=model, notes=(*notes, *graph.notes))


def check_model(model: nn.Module, allow_train: bool = False) -> None:
    """Refuse what cannot be pruned or proven, before any work is done."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}, not a torch.nn.Module; pass the module itself.")
    check_kind(model)
    if model.training and not allow_train:
        raise ModelError("model is in training mode, so batch norm and dropout would not be what is deployed; "
                         "call model.eval() first.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(f"{name!r} is on the meta device and has no values; load the weights first.")
        if tensor.is_quantized or tensor.dtype in (torch.qint8, torch.quint8, torch.qint32):
            raise ModelError(f"{name!r} is quantised; prune the float model, then quantise the result.")
        if tensor.is_floating_point() and tensor.numel() and bool(torch.isnan(tensor.detach().sum())) \
                and bool(torch.isnan(tensor.detach()).any()):
            raise ModelError(f"{name!r} holds NaN, so no importance or proof means anything; repair the weights.")


def check_devices(model: nn.Module, call: Call) -> None:
    """Model and inputs on one device."""
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1:
        raise ModelError(f"the model's tensors are on {sorted(map(str, devices))}; move it to one device.")
    for name, tensor in call.named_tensors():
        if devices and tensor.device not in devices:
            raise InputError(f"input {name!r} is on {tensor.device}, the model on {next(iter(devices))}; "
                             f"move one of them, e.g. inputs.to({str(next(iter(devices)))!r}).")


def _capture(model: nn.Module, call: Call, example_batch: int, widen: bool) -> Graph:
    """Free batch first; then fixed, at two for a batch of one; then the batch of one itself."""
    wide = call.doubled() if widen else call
    fixed = "the forward fixes its batch size; the graph holds for batch {} only"
    ways: list[Way] = [(wide, None, (fixed.format(wide.batch),))]
    if wide.batch is not None:
        ways.insert(0, (wide, wide.dynamic_shapes(model, ExportDim.DYNAMIC), ()))
    if wide is not call:
        ways.append((call, None, (fixed.format(call.batch),)))
    failures: list[Exception] = []
    graph = _first_export(model, ways, example_batch, failures)
    if graph is None and (numbers := read_numbers(model, wide)):
        graph = _first_export(model, ways[:-1] if wide is not call else ways, example_batch, failures[:], numbers)
    return graph or _fallback(model, call, example_batch, widen, failures)


def _first_export(model: nn.Module, ways: list[Way], example_batch: int, failures: list[Exception],
                  numbers: tuple[Read, ...] | None = None) -> Graph | None:
    """The first way that torch.export takes. numbers: what the forward reads out of its tensors, to be assumed."""
    for given, spec, notes in ways:
        inputs = given.map(lambda t: t.detach())        # export marks the tensor objects that it is given
        try:
            with Reading(numbers) if numbers else contextlib.nullcontext():
                program = _exported(model, inputs, spec)
            graph = _from_export(model, program, inputs, example_batch, notes)
            return replace(graph, notes=(*graph.notes, *assumed(numbers or ())))
        except Exception as error:  # whatever export raises, the next way is tried
            failures.append(error)
    return None


def _exported(model: nn.Module, call: Call, spec: Any) -> torch.export.ExportedProgram:
    """torch.export of a copy; of one that has run before where the first run registers buffers or layers, which
    export would take for inputs that are written to."""
    made = ghost(model)
    program = torch.export.export(made, call.args, dict(call.kwargs), strict=False, dynamic_shapes=spec)
    if {*_tensors(made)[0]} == {*_tensors(model)[0]}:
        return program
    made = ghost(model)
    _run(made, call)
    return torch.export.export(made, call.args, dict(call.kwargs), strict=False, dynamic_shapes=spec)


def _fallback(model: nn.Module, call: Call, example_batch: int, widen: bool, failures: list[Exception]) -> Graph:
    outputs = _run(ghost(model), call)
    names = structure.register(outputs)
    if names:                             # export takes such outputs apart now
        graph = _capture(model, call, example_batch, widen)
        return replace(graph, notes=(*graph.notes, f"the dataclass {', '.join(names)} was registered with torch "
                                                   "(torch.export.register_dataclass), so that its fields are seen"))
    if structure.closed(outputs):
        raise TraceError(f"{type(model).__name__}.forward returns a {structure.closed(outputs)[0]}, whose tensors "
                         "torch cannot see; return tensors in tuples, lists, dicts or dataclasses, or register the "
                         "class with torch.utils._pytree.register_pytree_node.") from failures[-1]
    try:
        graph = _from_make_fx(model, call, example_batch, read_numbers(model, call))
        _check_recording(model, graph, call)
        return graph
    except Exception as error:
        raise refusal(model, call, [failures[-1], error], _exports) from error


def _check_recording(model: nn.Module, graph: Graph, call: Call) -> None:
    """A recording must hold for other inputs too, if only for those that take the same branches: what went through
    NumPy, say, is a constant in it. Raises _OneOff where it does not."""
    for node in graph.nodes:
        if _sized_by_data(node):
            raise _OneOff(f"{place(node)}: the size of its result depends on the data")
    generator = torch.Generator().manual_seed(0)
    noisy = any(tensor.is_floating_point() for _, tensor in call.named_tensors())

    def nearby(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone() if noisy or not tensor.dim() else tensor.flip(0)
        return tensor + (NEARBY * torch.randn(tensor.shape, generator=generator)).to(tensor)
    other = call.map(nearby)
    try:
        _run(model, other)
    except InputError:                    # not any integers will do: lengths in descending order, say
        return
    tensors = {name: tensor.detach() for name, tensor in graph.tensors.items()}
    with torch.no_grad():
        found = evaluate(graph, tensors, other.args, other.kwargs)
    outputs = _run(ghost(model), other), _run(ghost(model), call), found
    for own, near, seen in zip(*map(pytree.tree_leaves, outputs), strict=True):
        if isinstance(own, Tensor) and own.is_floating_point():
            moved, error = float((own - near).abs().max()), float((own - seen).abs().max())
            if not error <= 0.05 * moved + 1e-4 * float(own.abs().max()):
                raise _OneOff("recorded on the example input, the network computes something else on any other")


def _sized_by_data(node: fx.Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()) or \
            node.target is torch.ops.aten._pack_padded_sequence.default:     # its lengths stay in the graph
        return False
    indices = node.args[1] if node.target is torch.ops.aten.index.Tensor else None
    return indices is None or any(isinstance(i, fx.Node) and i.meta["val"].dtype in (torch.bool, torch.uint8)
                                  for i in indices)  # type: ignore[union-attr]


def _run(model: nn.Module, call: Call) -> Any:
    """The forward's outputs on copies of the inputs and of the state. Raises InputError where it fails."""
    state = {name: tensor.detach().clone() for name, tensor in _tensors(model)[2].items()}   # a forward may write
    given = call.map(lambda t: t.clone())
    try:
        with torch.no_grad():
            return torch.func.functional_call(model, state, given.args, dict(given.kwargs))
    except Exception as error:
        raise InputError(f"{type(model).__name__}.forward fails on the example inputs ({call}): "
                         f"{type(error).__name__}: {error}. Pass inputs that the model accepts.") from error


def _exports(model: nn.Module, call: Call) -> bool:
    try:
        torch.export.export(ghost(model), call.args, dict(call.kwargs), strict=False)
    except Exception:
        return False
    return True


class _OneOff(Exception):
    """A recording holds for the example input only."""


class _NotAffine(Exception):
    """A size is not of the form a * batch + b."""


class _Sizes:
    """Turns the symbolic sizes of one trace into Dims."""

    def __init__(self, batch: int | None, measured: Mapping[Any, int] = MappingProxyType({})) -> None:
        self.cache: dict[Any, Dim] = {}
        self.batch, self.measured = batch, measured

    def dim(self, size: Any) -> Dim:
        if not isinstance(size, torch.SymInt):
            return Dim(0, int(size))
        data = free_unbacked_symbols(size)
        if not data <= self.measured.keys():
            raise _NotAffine(f"size {size} depends on the data")
        expr = size.node.expr
        if expr not in self.cache:
            first, second, third = (
                int(expr.xreplace({**dict.fromkeys(expr.free_symbols, n), **self.measured}))
                for n in (2, 4, 6))
            scale = (second - first) // 2
            if third - second != second - first or (second - first) % 2:
                raise _NotAffine(f"size {expr} is not a multiple of the batch")
            self.cache[expr] = Dim(scale, first - 2 * scale, bool(data))
        return self.cache[expr]

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(self.dim(size) for size in value.shape)
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return self.dim(value)
        return value


def _dims(graph: fx.Graph, sizes: _Sizes) -> dict[str, Any]:
    found = {}
    for node in graph.nodes:
        try:
            if node.op != "output":
                found[node.name] = sizes.of(node.meta.get("val"))
        except _NotAffine as error:
            raise _NotAffine(f"{error}\n{node.meta.get('stack_trace', '')}") from None
    return found


def _from_export(model: nn.Module, program: torch.export.ExportedProgram, call: Call, example_batch: int,
                 notes: tuple[str, ...]) -> Graph:
    inline_grad_modes(program.graph_module)
    follow_weights(program.graph)
    write_all(program.graph)
    _drop_assertions(program.graph)
    program.graph_module.graph.eliminate_dead_code()    # averages of attention weights that nobody asked for
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
             **signature.inputs_to_lifted_tensor_constants}
    canonical, tied, tensors = _tensors(model)
    constants: set[str] = set()
    state: dict[str, str] = {}
    for placeholder, name in named.items():
        if name in canonical:
            state[placeholder] = canonical[name]
        else:
            state[placeholder] = name
            tensors[name] = {**program.state_dict, **program.constants}[name]
            constants.add(name)
    inputs = tuple(node.name for node in program.graph.nodes if node.op == "placeholder" and node.name not in state)
    free = not notes and call.batch is not None
    graph = Graph(fx=program.graph, state=state, tensors=tensors, tied=tied, constants=frozenset(constants),
                  inputs=inputs, dims={}, in_spec=program.call_spec.in_spec, out_spec=program.call_spec.out_spec,
                  args=call.args, kwargs=dict(call.kwargs), free_batch=free,
                  batch=(LABEL_BATCH if free and not call.whole else call.batch or 1), example_batch=example_batch,
                  notes=notes)
    return replace(graph, dims=_dims(program.graph, _Sizes(call.batch, measured(graph))))


def _drop_assertions(graph: fx.Graph) -> None:
    """What export asserts (the dtype in front of a cast, say) need not hold of the same network in fp64."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and "_assert" in str(node.target) and not node.users:
            graph.erase_node(node)


def _from_make_fx(model: nn.Module, call: Call, example_batch: int, numbers: tuple[Read, ...] = ()) -> Graph:
    canonical, tied, tensors = _tensors(model)
    names = [name for name in canonical if canonical[name] == name]
    leaves, in_spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    out_spec: list[Any] = []

    def run(state: dict[str, Tensor], leaves: list[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, in_spec)
        with PackedCounts(), Reading(numbers) if numbers else contextlib.nullcontext():
            out = torch.func.functional_call(ghost(model), state, args, kwargs)
        flat, spec = pytree.tree_flatten(out)
        out_spec.append(spec)
        return flat

    copies = {name: tensors[name].detach().clone() for name in names}      # a forward may write to its buffers
    given = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]        # or to its inputs
    with torch.no_grad():
        module = make_fx(run, tracing_mode="real", pre_dispatch=True)(copies, given)
    graph = module.graph
    follow_weights(graph)
    write_all(graph)
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    state = {node.name: name for node, name in zip(placeholders, names, strict=False)}
    constants = _lift_attributes(module, graph, state, tensors)
    for node in list(graph.nodes):
        if str(node.target) == "aten.detach.default":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    dims = _dims(graph, _Sizes(None))
    dims.update({p: tuple(Dim(0, n) for n in tensors[name].shape) for p, name in state.items()})
    inputs = tuple(node.name for node in placeholders[len(names):])
    return Graph(fx=graph, state=state, tensors=tensors, tied=tied, constants=constants, inputs=inputs, dims=dims,
                 in_spec=in_spec, out_spec=out_spec[-1], args=call.args, kwargs=dict(call.kwargs), free_batch=False,
                 batch=call.batch or 1, example_batch=example_batch,
                 notes=("torch.export refused this forward; it was recorded on the example input instead, so the "
                        "branch taken there is assumed and the batch is fixed",
                        *assumed(numbers)))


def _lift_attributes(module: fx.GraphModule, graph: fx.Graph, state: dict[str, str],
                     tensors: dict[str, Tensor]) -> frozenset[str]:
    """Tensors that make_fx stored as attributes become placeholders, as torch.export has them."""
    constants = set()
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        value = getattr(module, str(node.target))
        with graph.inserting_before(next(iter(graph.nodes))):
            placeholder = graph.placeholder(f"c_{node.target}".replace(".", "_"))
        placeholder.meta["val"] = value
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        state[placeholder.name] = str(node.target)
        tensors[str(node.target)] = value
        constants.add(str(node.target))
    return frozenset(constants)


def _tensors(model: nn.Module) -> tuple[dict[str, str], dict[str, str], dict[str, Tensor]]:
    """(every name -> canonical name, tied name -> canonical name, canonical name -> tensor)."""
    canonical: dict[str, str] = {}
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        canonical[name] = first.setdefault(id(tensor), name)
        tensors.setdefault(canonical[name], tensor)
    return canonical, {n: c for n, c in canonical.items() if n != c}, tensors


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a traced forward leaves on its modules: ``self.calls += 1``, ``self.features = x``."""
    torchs = vars(nn.Module())
    before = [(module, dict(vars(module))) for module in model.modules()]
    inside = [(value, copy.copy(value)) for _, own in before for name, value in own.items()
              if isinstance(value, (list, dict, set)) and name not in torchs]
    try:
        yield
    finally:
        for module, own in before:
            vars(module).clear()
            vars(module).update(own)
        for value, content in inside:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export's own log lines and deprecation warnings tell a user nothing; failures come back as errors."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):   # refused graphs are printed
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
