"""Capture by one recording, of the example inputs: for a forward that torch.export refuses."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from prunekern.core.graph import Dim, Graph, place
from prunekern.errors import InputError
from prunekern.graph.evaluate import evaluate
from prunekern.graph.inputs import Call
from prunekern.graph.measured import Read, Reading, assumed, read_numbers
from prunekern.graph.parts import ghost, tensors_of
from prunekern.graph.sizes import Sizes, dims_of
from prunekern.graph.states import PackedCounts, follow_weights, write_all

NEARBY = 0.01         # noise on the inputs that a recording must also hold for


class OneOff(Exception):
    """A recording holds for the example input only."""


def capture_once(model: nn.Module, call: Call, example_batch: int) -> Graph:
    """The graph of a forward on these inputs; it says that the branch taken there is assumed.

    Raises OneOff where it does not even hold for inputs nearby, and whatever the forward raises while it is recorded.
    Source: torch.fx make_fx.
    """
    graph = _recorded(model, call, example_batch, read_numbers(model, call))
    _check_recording(model, graph, call)
    return graph


def _check_recording(model: nn.Module, graph: Graph, call: Call) -> None:
    """A recording must hold for other inputs too, if only for those that take the same branches: what went through
    NumPy, say, is a constant in it. Raises OneOff where it does not."""
    for node in graph.nodes:
        if _sized_by_data(node):
            raise OneOff(f"{place(node)}: the size of its result depends on the data")
    generator = torch.Generator().manual_seed(0)
    noisy = any(tensor.is_floating_point() for _, tensor in call.named_tensors())

    def nearby(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone() if noisy or not tensor.dim() else tensor.flip(0)
        return tensor + (NEARBY * torch.randn(tensor.shape, generator=generator)).to(tensor)
    other = call.map(nearby)
    try:
        run_forward(model, other)
    except InputError:                    # not any integers will do: lengths in descending order, say
        return
    tensors = {name: tensor.detach() for name, tensor in graph.tensors.items()}
    with torch.no_grad():
        found = evaluate(graph, tensors, other.args, other.kwargs)
    outputs = run_forward(ghost(model), other), run_forward(ghost(model), call), found
    for own, near, seen in zip(*map(pytree.tree_leaves, outputs), strict=True):
        if isinstance(own, Tensor) and own.is_floating_point():
            moved, error = float((own - near).abs().max()), float((own - seen).abs().max())
            if not error <= 0.05 * moved + 1e-4 * float(own.abs().max()):
                raise OneOff("recorded on the example input, the network computes something else on any other")


def _sized_by_data(node: fx.Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()) or \
            node.target is torch.ops.aten._pack_padded_sequence.default:     # its lengths stay in the graph
        return False
    indices = node.args[1] if node.target is torch.ops.aten.index.Tensor else None
    return indices is None or any(isinstance(i, fx.Node) and i.meta["val"].dtype in (torch.bool, torch.uint8)
                                  for i in indices)  # type: ignore[union-attr]


def run_forward(model: nn.Module, call: Call) -> Any:
    """The forward's outputs on copies of the inputs and of the state. Raises InputError where it fails."""
    state = {name: tensor.detach().clone() for name, tensor in tensors_of(model)[2].items()}   # a forward may write
    given = call.map(lambda t: t.clone())
    try:
        with torch.no_grad():
            return torch.func.functional_call(model, state, given.args, dict(given.kwargs))
    except Exception as error:
        raise InputError(f"{type(model).__name__}.forward fails on the example inputs ({call}): "
                         f"{type(error).__name__}: {error}. Pass inputs that the model accepts.") from error


def _recorded(model: nn.Module, call: Call, example_batch: int, numbers: tuple[Read, ...]) -> Graph:
    canonical, tied, tensors = tensors_of(model)
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
    dims = dims_of(graph, Sizes(None))
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
