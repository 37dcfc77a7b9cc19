"""Capture a model as a Graph, its batch free: by two recordings where they tell all, else by torch.export (non-strict)
and two honest fallbacks."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim as ExportDim

from prunekern.core import structure
from prunekern.core.graph import Graph
from prunekern.errors import InputError, ModelError, TraceError
from prunekern.graph.inline import inline_grad_modes
from prunekern.graph.inputs import Call, as_call
from prunekern.graph.measured import Read, Reading, assumed, measured, read_numbers
from prunekern.graph.once import capture_once, run_forward
from prunekern.graph.parts import ghost, tensors_of
from prunekern.graph.refusal import refusal
from prunekern.graph.sizes import LABEL_BATCH, Sizes, dims_of
from prunekern.graph.states import follow_weights, write_all
from prunekern.graph.twice import capture_twice
from prunekern.graph.unwrap import check_kind, unwrap

Way = tuple[Call, Any, tuple[str, ...]]     # inputs, sizes that are free, what to say of it
NOISY = ("torch.export", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


def trace(model: nn.Module, example_inputs: Any, *, allow_train: bool = False, widen: bool = True) -> Graph:
    """Capture ``model``'s forward as one graph of whole operators; the model is only read.

    example_inputs: a tensor, a tuple (positional) or a dict (keyword arguments); axis 0 is the batch. The
    batch is free in the result wherever the forward allows it; otherwise ``Graph.notes`` says so.
    widen: capture a batch of one at two, where sizes that are 1 by chance cannot be taken for broadcast axes.

    Raises ModelError (not a Module, training mode, NaN, mixed devices), InputError (the forward fails on the
    inputs; the user's own error is chained) and TraceError (control flow that depends on data).
    Source: torch.export (PyTorch 2 export, training IR), whose graphs two recordings reproduce; fallback: make_fx.
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
    with contextlib.suppress(Exception):        # whatever it raises, torch.export is asked
        return capture_twice(model, wide.map(lambda t: t.detach()), example_batch)
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
    if {*tensors_of(made)[0]} == {*tensors_of(model)[0]}:
        return program
    made = ghost(model)
    run_forward(made, call)
    return torch.export.export(made, call.args, dict(call.kwargs), strict=False, dynamic_shapes=spec)


def _fallback(model: nn.Module, call: Call, example_batch: int, widen: bool, failures: list[Exception]) -> Graph:
    outputs = run_forward(ghost(model), call)
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
        return capture_once(model, call, example_batch)
    except Exception as error:
        raise refusal(model, call, [failures[-1], error], _exports) from error


def _exports(model: nn.Module, call: Call) -> bool:
    try:
        torch.export.export(ghost(model), call.args, dict(call.kwargs), strict=False)
    except Exception:
        return False
    return True


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
    canonical, tied, tensors = tensors_of(model)
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
    return replace(graph, dims=dims_of(program.graph, Sizes(call.batch, measured(graph))))


def _drop_assertions(graph: fx.Graph) -> None:
    """What export asserts (the dtype in front of a cast, say) need not hold of the same network in fp64."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and "_assert" in str(node.target) and not node.users:
            graph.erase_node(node)


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
