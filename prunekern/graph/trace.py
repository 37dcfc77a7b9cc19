"""Capture a model as a Graph: torch.export (non-strict) with a free batch, with two honest fallbacks."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim as ExportDim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from prunekern.core.graph import Dim, Graph
from prunekern.errors import InputError, ModelError, TraceError
from prunekern.graph.inline import inline_grad_modes
from prunekern.graph.inputs import Call, as_call
from prunekern.graph.states import PackedCounts, follow_weights

LABEL_BATCH = 2
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
    call = as_call(model, example_inputs)
    check_devices(model, call)
    example_batch = call.batch
    with _quiet(), _attributes_kept(model):
        return _capture(model, call, example_batch or 1, widen)


def check_model(model: nn.Module, allow_train: bool = False) -> None:
    """Refuse what cannot be pruned or proven, before any work is done."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}, not a torch.nn.Module; pass the module itself.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("model is scripted (torch.jit); pass the original nn.Module it was made from.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"model is wrapped in {type(model).__name__}; pass model.module and wrap the result again.")
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
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise ModelError(f"{name!r} is a quantised module; prune the float model, then quantise the result.")


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
    ways: list[tuple[Call, Any, tuple[str, ...]]] = [(wide, None, (fixed.format(wide.batch),))]
    if wide.batch is not None:
        ways.insert(0, (wide, wide.dynamic_shapes(model, ExportDim.DYNAMIC), ()))
    if wide is not call:
        ways.append((call, None, (fixed.format(call.batch),)))
    failures: list[Exception] = []
    for given, spec, notes in ways:
        inputs = given.map(lambda t: t.detach())        # export marks the tensor objects that it is given
        try:
            program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False, dynamic_shapes=spec)
            return _from_export(model, program, inputs, example_batch, notes)
        except Exception as error:  # whatever export raises, the next way is tried
            failures.append(error)
    return _fallback(model, call, example_batch, failures)


def _fallback(model: nn.Module, call: Call, example_batch: int, failures: list[Exception]) -> Graph:
    state = {name: tensor.detach().clone() for name, tensor in _tensors(model)[2].items()}   # a forward may write
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, call.args, dict(call.kwargs))
    except Exception as error:
        raise InputError(f"{type(model).__name__}.forward fails on the example inputs ({call}): "
                         f"{type(error).__name__}: {error}. Pass inputs that the model accepts.") from error
    try:
        return _from_make_fx(model, call, example_batch)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be captured as one graph: {_first_line(failures[-1], error)}. "
            "Its forward depends on the data; make that part a function of shapes only, or compress the "
            "submodules that do not, e.g. prunekern.compress(model.backbone, ...).") from error


def _first_line(error: Exception, last: Exception) -> str:
    """The first line of an error, with the line of the user's code that export blames, or where the ``last``
    attempt broke off."""
    text = str(error).strip()
    head = text.splitlines()[0] if text else type(error).__name__
    blame = [line.strip() for line in text.splitlines() if 'File "' in line and "/torch/" not in line]
    blame = blame or [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(last.__traceback__)
                      if "/torch/" not in f.filename and f.filename != __file__]
    return f"{type(error).__name__}: {head}" + (f" ({blame[-1]})" if blame else "")


class _NotAffine(Exception):
    """A size is not of the form a * batch + b."""


class _Sizes:
    """Turns the symbolic sizes of one trace into Dims."""

    def __init__(self, batch: int | None) -> None:
        self.cache: dict[Any, Dim] = {}
        self.batch = batch

    def dim(self, size: Any) -> Dim:
        if not isinstance(size, torch.SymInt):
            return Dim(0, int(size))
        expr = size.node.expr
        if expr not in self.cache:
            first, second, third = (
                int(expr.xreplace(dict.fromkeys(expr.free_symbols, n)))
                for n in (2, 4, 6))
            scale = (second - first) // 2
            if third - second != second - first or (second - first) % 2:
                raise _NotAffine(f"size {expr} is not a multiple of the batch")
            self.cache[expr] = Dim(scale, first - 2 * scale)
        return self.cache[expr]

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(self.dim(size) for size in value.shape)
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return self.dim(value)
        return value


def _from_export(model: nn.Module, program: torch.export.ExportedProgram, call: Call, example_batch: int,
                 notes: tuple[str, ...]) -> Graph:
    inline_grad_modes(program.graph_module)
    follow_weights(program.graph)
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
            tensors[name] = program.constants[name]
            constants.add(name)
    inputs = tuple(node.name for node in program.graph.nodes if node.op == "placeholder" and node.name not in state)
    free = not notes and call.batch is not None
    sizes = _Sizes(call.batch)
    dims = {node.name: sizes.of(node.meta.get("val")) for node in program.graph.nodes if node.op != "output"}
    return Graph(fx=program.graph, state=state, tensors=tensors, tied=tied, constants=frozenset(constants),
                 inputs=inputs, dims=dims, in_spec=program.call_spec.in_spec, out_spec=program.call_spec.out_spec,
                 args=call.args, kwargs=dict(call.kwargs), free_batch=free,
                 batch=LABEL_BATCH if free else (call.batch or 1), example_batch=example_batch, notes=notes)


def _from_make_fx(model: nn.Module, call: Call, example_batch: int) -> Graph:
    canonical, tied, tensors = _tensors(model)
    names = [name for name in canonical if canonical[name] == name]
    leaves, in_spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    out_spec: list[Any] = []

    def run(state: dict[str, Tensor], leaves: list[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, in_spec)
        with PackedCounts():
            out = torch.func.functional_call(model, state, args, kwargs)
        flat, spec = pytree.tree_flatten(out)
        out_spec.append(spec)
        return flat

    copies = {name: tensors[name].detach().clone() for name in names}      # a forward may write to its buffers
    with torch.no_grad():
        module = make_fx(run, tracing_mode="real", pre_dispatch=True)(copies, leaves)
    graph = module.graph
    follow_weights(graph)
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    state = {node.name: name for node, name in zip(placeholders, names, strict=False)}
    constants = _lift_attributes(module, graph, state, tensors)
    for node in list(graph.nodes):
        if str(node.target) == "aten.detach.default":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    sizes = _Sizes(None)
    dims = {node.name: sizes.of(node.meta.get("val")) for node in graph.nodes if node.op != "output"}
    dims.update({p: tuple(Dim(0, n) for n in tensors[name].shape) for p, name in state.items()})
    inputs = tuple(node.name for node in placeholders[len(names):])
    return Graph(fx=graph, state=state, tensors=tensors, tied=tied, constants=constants, inputs=inputs, dims=dims,
                 in_spec=in_spec, out_spec=out_spec[-1], args=call.args, kwargs=dict(call.kwargs), free_batch=False,
                 batch=call.batch or 1, example_batch=example_batch,
                 notes=("torch.export refused this forward; it was recorded on the example input instead, so the "
                        "branch taken there is assumed and the batch is fixed",))


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
