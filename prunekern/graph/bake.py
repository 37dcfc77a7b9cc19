"""Weights that a forward computes from parameters alone, folded to what they come to.

Weight standardisation, spectral norm and the like look across the channels of a parameter before it is used, so no
channel of the result may leave while it is computed anew at every call. For inference it is a constant. Where that
frees channels, the graph gets the computed tensor as a parameter of its own, and what made it leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunekern.core.graph import Dim, Graph, mutates, owner
from prunekern.core.labels import FIXED
from prunekern.core.policy import DEFAULT, Policy
from prunekern.core.rule import Registry
from prunekern.graph.labels import Labels, label
from prunekern.graph.parts import parts_of

SHOWN = 4             # names in the note
ROLES = ("weight", "bias")


def labelled(graph: Graph, registry: Registry, *, policy: Policy = DEFAULT) -> Labels:
    """The labels of a graph or, where computing weights from parameters holds channels back, of the graph with
    those weights baked (``labels.graph``); its notes name them."""
    labels = label(graph, registry, policy=policy)
    suspects = _suspects(labels, registry)
    if not suspects:
        return labels
    baked, names = bake(graph, list(suspects))
    again = label(baked, registry, policy=policy)
    useful = [node for node, altered in suspects.items() if altered or _freed(labels, node, again, names[node])]
    if not useful or len(useful) == len(suspects):
        return again if useful else labels
    return label(bake(graph, useful)[0], registry, policy=policy)


def _suspects(labels: Labels, registry: Registry) -> dict[fx.Node, bool]:
    """Computed weights behind an operator that holds channels -> whether one lets them go but would then compute
    something else (a sum over fewer channels)."""
    graph = labels.graph
    computed = computed_nodes(graph)
    holds = {item.node for item in labels.frozen}
    behind: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node in computed:
            before = [behind[arg] for arg in node.all_input_nodes if arg in behind]
            alters = node in labels.masked and not _contracts(graph, node, registry)
            if before or alters or node in holds:
                behind[node] = alters or any(before)
    return {node: altered for node, altered in behind.items() if _is_weight(graph, node) and any(
        user not in computed for user in node.users) and not any(_written(user, node) for user in node.users)}


def _contracts(graph: Graph, node: fx.Node, registry: Registry) -> bool:
    rule = registry.find(node.target)
    return rule is not None and rule.macs(node, graph.shape) > 0


def _is_weight(graph: Graph, node: fx.Node) -> bool:
    value = node.meta.get("val")
    return graph.is_tensor(node) and isinstance(value, Tensor) and value.is_floating_point()


def _written(user: fx.Node, node: fx.Node) -> bool:
    return mutates(user.target) and user.args[0] is node


def _freed(before: Labels, node: fx.Node, after: Labels, name: str) -> bool:
    """Whether more indices of a computed weight may leave once it is baked."""
    free = sum(int((groups != FIXED).sum()) for _, groups in before.live.get(node, ()))
    return sum(int((groups != FIXED).sum()) for (owned, _), groups in after.axes.items() if owned == name) > free


def computed_nodes(graph: Graph) -> set[fx.Node]:
    """Calls that see parameters, buffers and numbers only, and give the same at every call."""
    if any(graph.fqn(node.args[0]) is not None for node in graph.nodes if mutates(node.target)):
        return set()                                   # state that changes from call to call
    found: set[fx.Node] = set()
    for node in graph.nodes:
        fixed = node.op == "call_function" and not mutates(node.target) and not _draws(node.target)
        if fixed and all(arg in found or graph.fqn(arg) is not None for arg in node.all_input_nodes):
            found.add(node)
    return found


def _draws(target: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def bake(graph: Graph, chosen: list[fx.Node]) -> tuple[Graph, dict[fx.Node, str]]:
    """The graph with the ``chosen`` computed nodes as state, and the name of each. What only they needed is gone,
    parameters included."""
    computed = computed_nodes(graph)
    kept = _kept(graph, computed, chosen)
    dropped = {name for node in graph.nodes if (name := graph.fqn(node)) and node not in kept} \
        - {name for node in kept if (name := graph.fqn(node))}
    values = _values(graph, computed, chosen)
    names = _names(graph, chosen, values, {*graph.tensors, *graph.tied} - dropped)
    baked = {name: _tensor(graph, node, values[node]) for node, name in names.items()}
    tied = {alias: name for alias, name in graph.tied.items() if name not in dropped}
    gone = dropped | (graph.tied.keys() - tied.keys())
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name not in dropped} | baked
    new, env = _rebuilt(graph, kept, chosen)
    state = {env[node].name: graph.state[node.name] for node in kept if graph.fqn(node)} \
        | {env[node].name: name for node, name in names.items()}
    dims = {copy.name: graph.dims[node.name] for node, copy in env.items() if node.name in graph.dims} \
        | {env[node].name: tuple(Dim(0, size) for size in values[node].shape) for node in chosen}
    inputs = tuple(copy.name for node, copy in env.items() if node.name in graph.inputs)
    module = None if graph.module is None else parts_of(graph.module, gone, baked)
    return replace(graph, fx=new, state=state, tensors=tensors, tied=tied, constants=graph.constants - dropped,
                   inputs=inputs, dims=dims, module=module, notes=(*graph.notes, _note(list(baked)))), names


def _kept(graph: Graph, computed: set[fx.Node], chosen: Collection[fx.Node]) -> set[fx.Node]:
    """All nodes but those that only the chosen ones needed."""
    kept: set[fx.Node] = set()
    read = {graph.fqn(node) for node in graph.nodes if node.users}
    for node in reversed(graph.nodes):
        own = node not in computed and (graph.fqn(node) is None or graph.fqn(node) not in read)   # unread state stays
        if node not in chosen and (own or any(user in kept for user in node.users)):
            kept.add(node)
    return kept


def _names(graph: Graph, chosen: list[fx.Node], values: Mapping[fx.Node, Tensor],
           taken: set[str]) -> dict[fx.Node, str]:
    """A name for each; one name for what is computed twice (for a layer that is called twice)."""
    names: dict[fx.Node, str] = {}
    made_of = {node: set(_sources(graph, node)) for node in chosen}
    for node in chosen:
        same = (other for other in names if made_of[other] == made_of[node]
                and values[other].shape == values[node].shape and torch.equal(values[other], values[node]))
        twin = next(same, None)
        names[node] = _free_name(_wish(graph, node), taken.union(names.values())) if twin is None else names[twin]
    return names


def _rebuilt(graph: Graph, kept: set[fx.Node], chosen: list[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the operators in which the chosen nodes are placeholders, after those of other state."""
    new, env = fx.Graph(graph.fx.owning_module), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node in kept and graph.fqn(node) is not None:
            env[node] = new.node_copy(node)
    for node in chosen:
        env[node] = new.placeholder(f"baked_{node.name}")
        env[node].meta["val"] = node.meta["val"]
    for node in graph.nodes:
        if node in kept and node not in env:
            env[node] = new.node_copy(node, env.__getitem__)
    return new, env


def _values(graph: Graph, computed: set[fx.Node], chosen: list[fx.Node]) -> dict[fx.Node, Tensor]:
    """What the chosen nodes come to, in the dtype that the network computes them in."""
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            name = graph.fqn(node)
            if name is not None:
                env[node] = graph.tensors[name].detach()
            elif node in computed:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return {node: env[node].clone(memory_format=torch.contiguous_format) for node in chosen}


def _sources(graph: Graph, node: fx.Node) -> list[str]:
    """Names of the tensors that a computed node is made of, the last read first."""
    found: dict[str, None] = {}
    seen, ahead = {node}, [node]
    while ahead:
        for arg in ahead.pop().all_input_nodes:
            name = graph.fqn(arg)
            if name is not None:
                found[name] = None
            elif arg not in seen:
                seen.add(arg)
                ahead.append(arg)
    return list(found)


def _tensor(graph: Graph, node: fx.Node, value: Tensor) -> Tensor:
    """A parameter where one went into it, else a buffer."""
    raw = [tensor for name in _sources(graph, node) if isinstance(tensor := graph.tensors[name], nn.Parameter)]
    return nn.Parameter(value, requires_grad=any(tensor.requires_grad for tensor in raw)) if raw else value


def _wish(graph: Graph, node: fx.Node) -> str:
    """``conv.weight`` for what the layer 'conv' makes of its own tensors and uses as its weight; else the name of
    the raw tensor of the same shape; else that of any."""
    sources = _sources(graph, node)
    for user in node.users:
        path, role = owner(user)[0], _role(user, node)
        if path and role and any(name.startswith(f"{path}.") for name in sources):
            return f"{path}.{role}"
    alike = [name for name in sources if tuple(graph.tensors[name].shape) == graph.shape(node)]
    return (*alike, *sources, "constant")[0]


def _role(user: fx.Node, node: fx.Node) -> str:
    schema = getattr(user.target, "_schema", None)
    arguments = [argument.name for argument in schema.arguments] if schema is not None else []
    return next((name for name, arg in zip(arguments, user.args, strict=False) if arg is node and name in ROLES), "")


def _free_name(wish: str, taken: Collection[str]) -> str:
    """The name, or one like it that neither a tensor nor a layer with tensors has."""
    path, dot, leaf = wish.rpartition(".")
    names = [wish, f"{path}{dot}baked_{leaf}", *(f"{path}{dot}baked_{leaf}_{i}" for i in range(2, len(taken) + 4))]
    return next(name for name in names if name not in taken and not any(t.startswith(f"{name}.") for t in taken))


def _note(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (f"baked: {', '.join(map(repr, names[:SHOWN]))}{more}. The forward computes them from other parameters, "
            "across channels, at every call; the result holds the computed values, and fine-tuning trains those")
