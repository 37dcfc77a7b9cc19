"""A rewritten graph module as plain data, and back: what ``load`` without a model class builds on. No pickle."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeInfo

from prunekern.core import structure
from prunekern.errors import ArtefactError, UnsupportedOp
from prunekern.prune.rewrite import FunctionalBatchNorm, FunctionalRecurrent, PrunedModule, Structure

VERSION = 1
FOLLOWERS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "FunctionalBatchNorm": lambda d: FunctionalBatchNorm(d["momentum"], d["eps"]),
    "FunctionalRecurrent": lambda d: FunctionalRecurrent(d["operator"]),
    "Dropout": lambda d: nn.Dropout(d["p"]),
    "Dropout2d": lambda d: nn.Dropout2d(d["p"]),
}
PLAIN = (bool, int, float, str, type(None))


def to_data(module: PrunedModule) -> dict[str, Any]:
    """JSON-able description of a module made by ``rewrite(..., layers=False)``, without its weights.

    Raises UnsupportedOp where a call cannot be written down (an operator that holds a subgraph, say).
    """
    nodes = [_node_data(module, node) for node in module.graph.nodes]
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    parameters = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    persistent = set(module.state_dict())
    return {"format": "prunekern-graph", "version": VERSION, "nodes": nodes, "arguments": list(info.orig_args),
            "in_spec": structure.dumps(info.in_spec), "out_spec": structure.dumps(info.out_spec),
            "parameters": parameters, "training": module.training,
            "transient": [name for name, _ in module.named_buffers() if name not in persistent]}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a module, transient buffers included."""
    return {**dict(module.named_buffers()), **dict(module.named_parameters())}


def from_data(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PrunedModule:
    """Build the module again. tensors: ``state_of`` it. Raises ArtefactError where the data is not understood."""
    if data.get("format") != "prunekern-graph" or data.get("version") != VERSION:
        raise ArtefactError(f"the graph has format {data.get('format')!r}, version {data.get('version')!r}; this "
                            f"prunekern reads prunekern-graph version {VERSION}.")
    try:
        return _build(data, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtefactError(f"the saved graph is damaged ({type(error).__name__}: {error}); save it again.") from error


def _build(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PrunedModule:
    root, graph = nn.Module(), fx.Graph()
    env: dict[str, fx.Node] = {}
    for name, tensor in tensors.items():
        _place(root, name, tensor, data)
    for item in data["nodes"]:
        args, kwargs = _decoded(item["args"], env), _decoded(item["kwargs"], env)
        kind = item["op"]
        if kind == "placeholder":
            node = graph.placeholder(item["name"])
        elif kind == "get_attr":
            node = graph.get_attr(item["target"])
        elif kind == "module":
            root.add_module(item["target"], FOLLOWERS[item["kind"]](item["settings"]))
            node = graph.call_module(item["target"], tuple(args), kwargs)
        elif kind == "output":
            node = graph.output(args[0])
        else:
            node = graph.call_function(_target(item["target"]), tuple(args), kwargs)
        env[item["name"]] = node
    graph.set_codegen(Structure(_PyTreeInfo(data["arguments"], structure.loads(data["in_spec"]),
                                            structure.loads(data["out_spec"]))))
    module = PrunedModule(root, graph, class_name="PrunedModule")
    return module.train(data["training"])


def _place(root: nn.Module, name: str, tensor: Tensor, data: Mapping[str, Any]) -> None:
    path, _, leaf = name.rpartition(".")
    parent = root
    for part in path.split(".") if path else []:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    if name in data["parameters"]:
        parent.register_parameter(leaf, nn.Parameter(tensor, requires_grad=data["parameters"][name]))
    else:
        parent.register_buffer(leaf, tensor, persistent=name not in data["transient"])


def _node_data(module: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    item: dict[str, Any] = {"op": node.op, "name": node.name, "args": _encoded(node.args, node),
                            "kwargs": _encoded(dict(node.kwargs), node)}
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        kind = type(child).__name__
        if kind not in FOLLOWERS:
            raise UnsupportedOp(f"{node.name}: a {kind} cannot be written down; rewrite with layers=False.")
        settings = {k: getattr(child, k) for k in ("p", "momentum", "eps", "operator") if hasattr(child, k)}
        item.update(op="module", kind=kind, settings=settings, target=str(node.target))
    elif node.op == "call_function":
        item["target"] = _target_name(node)
    elif node.op == "get_attr":
        if not isinstance(_attribute(module, str(node.target)), Tensor):
            raise UnsupportedOp(f"{node.name}: {node.target} holds a subgraph, which cannot be written down.")
        item["target"] = str(node.target)
    return item


def _attribute(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _target_name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return f"operator.{name}"
    if getattr(torch, name, None) is target:
        return f"torch.{name}"
    raise UnsupportedOp(f"{node.name}: {target} cannot be written down.")


def _target(name: str) -> Callable[..., Any]:
    parts = name.split(".")
    if parts[0] == "operator":
        return getattr(operator, parts[1])  # type: ignore[no-any-return]
    if parts[0] == "torch":
        return getattr(torch, parts[1])  # type: ignore[no-any-return]
    namespace, operator_name, overload = parts
    return getattr(getattr(getattr(torch.ops, namespace), operator_name), overload)  # type: ignore[no-any-return]


def _encoded(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [_encoded(item, node) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encoded(item, node) for key, item in value.items()}}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise UnsupportedOp(f"{node.name}: an argument of type {type(value).__name__} cannot be written down.")


def _decoded(value: Any, env: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, env) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "node":
        return env[content]
    if kind == "dict":
        return {key: _decoded(item, env) for key, item in content.items()}
    return torch.device(content) if kind == "device" else getattr(torch, content)


