"""The sliced network as a graph module of our own: hard-coded sizes replaced by what survives.

Unlike ``ExportedProgram.module()`` it trains (batch norm and dropout follow ``self.training``), takes any
batch the original took, keeps parameter names, and keeps the torch.nn layers it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.nn import functional

from prunekern.core.arguments import find_operator
from prunekern.core.graph import Graph, owner
from prunekern.core.rule import Registry, argument
from prunekern.core.rule import aten as operators
from prunekern.graph.labels import Labels
from prunekern.prune.slice import cut_tensor

aten = torch.ops.aten
RECURRENT = operators("lstm", "gru", "rnn_tanh", "rnn_relu")
ORIGIN = "prunekern_origin"      # node.meta key: name of the traced node it stands for


class Structure(_PyTreeCodeGen):
    """How inputs and outputs nest. Immutable, so copies of a module share it (copying the specs warns)."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self


class PrunedModule(fx.GraphModule):
    """A network rebuilt from its trace, with the sizes that survived. Ordinary in every respect but its class:
    the original's own methods, hooks and branches not taken on the example inputs are gone."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "PrunedModule") -> None:
        super().__init__(root, graph, class_name)
        # GraphModule copies what the graph reads, in its order; state dicts are to stay what they were.
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            vars(self)[table] = vars(root)[table]

    def _deepcopy_init(self) -> Callable[..., None]:
        return PrunedModule.__init__

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        for spec in (self._in_spec, self._out_spec):      # immutable; copying them warns
            memo[id(spec)] = spec
        return super().__deepcopy__(memo)


class FunctionalBatchNorm(nn.Module):
    """``F.batch_norm`` as somebody's forward called it, following train() and eval()."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
                var: Tensor | None) -> Tensor:
        training = self.training or mean is None
        return functional.batch_norm(x, mean, var, weight, bias, training, self.momentum, self.eps)


class FunctionalRecurrent(nn.Module):
    """A recurrent operator as somebody's forward called it, following train() and eval(): dropout between layers, and
    gradients where cuDNN computes them. operator: ``lstm.input``, ``gru.data``, ..."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        call = find_operator(f"aten.{self.operator}")
        mode = [argument.name for argument in call._schema.arguments].index("train")
        return call(*given[:mode], self.training, *given[mode + 1:])  # type: ignore[no-any-return]


RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def own_name(name: str) -> str:
    """A state or module name as the graph module has it: 'graph' and the like are taken by its own attributes."""
    head, dot, tail = name.partition(".")
    return f"module_{head}{dot}{tail}" if head in RESERVED else name


class NewSizes:
    """Shapes before and after slicing, for rules that rewrite their calls."""

    def __init__(self, labels: Labels, keep: Tensor) -> None:
        self.labels, self.keep = labels, keep

    def old(self, node: fx.Node) -> Any:
        return _known(self.labels.graph.dims[node.name])

    def new(self, node: fx.Node) -> Any:
        return _known(self.labels.dims(node, self.keep))

    def changed(self, node: fx.Node, axis: int) -> bool:
        return bool(self.labels.dims(node, self.keep)[axis] != self.labels.graph.dims[node.name][axis])

    def alive(self, node: fx.Node, axis: int) -> Tensor:
        return self.labels.alive(node, axis, self.keep)

    def counts(self, node: fx.Node) -> bool:
        return node in self.labels.counted


def _known(dims: Any) -> Any:
    if isinstance(dims, list):
        return [_known(item) for item in dims]
    return tuple(None if dim.scale or dim.measured else dim.offset for dim in dims)


def rewrite(labels: Labels, keep: Tensor, modules: nn.Module, registry: Registry, *,
            layers: bool = True) -> PrunedModule:
    """Build the module. modules: the sliced copy of the user's module; its tensors and its torch.nn layers (where
    a layer is one call of the graph) become part of the new one, not copies of them. layers=False: operators
    only, which is the form that can be written down as data (``prunekern.prune.portable``)."""
    graph = labels.graph
    constants = {name: cut_tensor(labels, name, graph.tensors[name], keep) for name in graph.constants}
    state = {**graph.tensors, **constants, **dict(modules.named_buffers()), **dict(modules.named_parameters())}
    flags = [(path, child.training) for path, child in modules.named_modules()]
    root = nn.Module()
    root.training = modules.training
    leaves = _leaf_calls(graph, modules) if layers else {}
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    sizes = NewSizes(labels, keep)
    users = _state_users(graph, leaves)
    for node in graph.nodes:
        if node.op == "placeholder":
            name = graph.fqn(node)
            if name is None:
                env[node] = new.placeholder(node.name)
                env[node].meta.update(node.meta)
            elif node in users:
                _attach(root, name, state[name], modules, name in graph.constants)
                env[node] = new.get_attr(own_name(name))
        elif node.op == "output":
            new.output(fx.node.map_arg(node.args[0], env.__getitem__))
        elif node.op == "get_attr":
            root.add_module(str(node.target), getattr(graph.fx.owning_module, str(node.target)))
            env[node] = new.get_attr(str(node.target))
        elif "_assert" not in str(node.target):
            env[node] = emit(node, new, root, env, sizes, leaves, modules, registry)
            env[node].meta[ORIGIN] = node.name
    for name, tensor in _named_state(modules):         # what the forward does not read is in state dicts all the same
        _attach(root, name, tensor, modules, False)
    _order_like(root, modules, own_name)
    new.set_codegen(Structure(_PyTreeInfo(_input_names(graph), graph.in_spec, graph.out_spec)))
    module = PrunedModule(root, new, class_name="PrunedModule")
    for part in module.modules():
        part.training = modules.training
    for path, flag in flags:                         # every part keeps its own, in both forms: they share layers
        if path and _has(module, own_name(path)):
            module.get_submodule(own_name(path)).training = flag
    return module


def emit(node: fx.Node, new: fx.Graph, root: nn.Module, env: Mapping[fx.Node, fx.Node], sizes: NewSizes,
          leaves: Mapping[fx.Node, str], modules: nn.Module, registry: Registry) -> fx.Node:
    """The call in the new graph: a layer of the network, a layer that follows train(), or what its rule makes of it.
    leaves: calls that are a layer's whole forward -> its path. env: old node -> new one."""
    if node in leaves:
        path = leaves[node]
        _attach_module(root, path, modules.get_submodule(path))
        return new.call_module(own_name(path), (env[node.args[0]],))  # type: ignore[index]
    following = _mode_follower(node)
    if following is not None:
        module, args = following
        name = f"_{node.name}"
        module.train(modules.training)
        root.add_module(name, module)
        return new.call_module(name, fx.node.map_arg(args, env.__getitem__))
    rule = registry.find(node.target)
    call = rule.rewrite(node, sizes) if rule is not None else None
    target, args, kwargs = call if call is not None else (node.target, node.args, dict(node.kwargs))
    mapped: Any = fx.node.map_arg((tuple(args), kwargs), env.__getitem__)
    return new.call_function(target, *mapped)  # type: ignore[arg-type]


def _mode_follower(node: fx.Node) -> tuple[nn.Module, tuple[Any, ...]] | None:
    """A module that does what a call whose result depends on train/eval mode does in both modes."""
    if node.target is aten.batch_norm.default:
        return FunctionalBatchNorm(node.args[6], node.args[7]), tuple(node.args[:5])  # type: ignore[arg-type]
    if node.target is aten.dropout.default:
        return nn.Dropout(argument(node, 1, "p", 0.5)), (node.args[0],)
    if node.target is aten.feature_dropout.default:
        return nn.Dropout2d(argument(node, 1, "p", 0.5)), (node.args[0],)
    if node.target in RECURRENT:
        return FunctionalRecurrent(str(node.target).removeprefix("aten.")), node.args
    return None


def _leaf_calls(graph: Graph, modules: nn.Module) -> dict[fx.Node, str]:
    """Calls that are the whole forward of one torch.nn layer -> the layer's path."""
    by_call: dict[tuple[str, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function" and stack:
            by_call.setdefault(tuple(stack), []).append(node)      # its keys tell one call of a module from the next
    found = {}
    for nodes in by_call.values():
        path = owner(nodes[0])[0]
        if len(nodes) == 1 and path and _has(modules, path) and _is_leaf(graph, nodes[0], modules.get_submodule(path)):
            found[nodes[0]] = path
    return found


def _is_leaf(graph: Graph, node: fx.Node, module: nn.Module) -> bool:
    if not type(module).__module__.startswith("torch.nn.modules.") or list(module.children()):
        return False
    if module._forward_hooks or module._forward_pre_hooks or not node.args:
        return False           # hooks' own operators are in the graph already
    own = {id(t) for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]}
    inputs = [arg for arg in node.all_input_nodes if graph.fqn(arg) is None]
    states = [arg for arg in node.all_input_nodes if graph.fqn(arg) is not None]
    return inputs == [node.args[0]] and len(states) <= len(own) and not isinstance(
        module, (nn.MultiheadAttention, nn.Flatten, nn.Unflatten, nn.RNNBase, nn.Embedding, nn.Bilinear))


def _state_users(graph: Graph, leaves: Mapping[fx.Node, str]) -> set[fx.Node]:
    """State placeholders that some call reads directly, not through a layer."""
    return {arg for node in graph.nodes if node not in leaves for arg in node.all_input_nodes
            if graph.fqn(arg) is not None}


def _parent(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else []:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _attach(root: nn.Module, name: str, tensor: Tensor, modules: nn.Module, constant: bool) -> None:
    path, _, leaf = name.rpartition(".")
    parent, own_leaf = _parent(root, own_name(name).rpartition(".")[0]), own_name(name).rpartition(".")[2]
    if own_leaf in parent._parameters or own_leaf in parent._buffers:
        return
    original = None if constant else getattr(modules.get_submodule(path), leaf)
    if isinstance(original, nn.Parameter):
        parent.register_parameter(own_leaf, original)
    else:
        persistent = not constant and leaf not in modules.get_submodule(path)._non_persistent_buffers_set
        parent.register_buffer(own_leaf, tensor if original is None else original, persistent=persistent)


def _attach_module(root: nn.Module, path: str, module: nn.Module) -> None:
    head, _, leaf = own_name(path).rpartition(".")
    parent = _parent(root, head)
    existing = parent._modules.get(leaf)
    if existing is not module:
        if existing is not None:      # a container made for a parameter read directly: the layer holds it too
            del parent._modules[leaf]
        parent.add_module(leaf, module)


def _named_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _order_like(made: nn.Module, original: nn.Module, renamed: Callable[[str], str] = str) -> None:
    """Everything in the order of the original, so that state dicts and printouts list it alike."""
    for table in ("_modules", "_parameters", "_buffers"):
        own, order = vars(made)[table], [renamed(name) for name in vars(original)[table]]
        for name in [*(name for name in order if name in own), *(name for name in own if name not in order)]:
            own[name] = own.pop(name)
    for name, child in original._modules.items():
        twin = made._modules.get(renamed(name))
        if child is not None and twin is not None and twin is not child:
            _order_like(twin, child)


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            return False
        module = child
    return True


def _input_names(graph: Graph) -> list[str]:
    positional = [f"input_{i}" if len(graph.args) > 1 else "input" for i in range(len(graph.args))]
    return [*positional, *graph.kwargs]
