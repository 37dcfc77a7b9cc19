"""The norms of a sliced network count what has left: each in a module of its own, so that the user's class remains."""

from __future__ import annotations

import inspect

from torch import Tensor, fx, nn

from prunekern.core.counted import of
from prunekern.core.graph import owner
from prunekern.core.rule import Registry
from prunekern.graph.islands import Exchangeable, Island, counted_class
from prunekern.graph.labels import Labels
from prunekern.prune.rewrite import NewSizes, emit


def counting(labels: Labels, keep: Tensor, registry: Registry) -> dict[fx.Node, int]:
    """The norms and means that lost channels -> how many values they count."""
    sizes, found = NewSizes(labels, keep), {}
    for node in labels.graph.nodes:
        rule = registry.find(node.target) if node in labels.counted else None
        call = rule.rewrite(node, sizes) if rule is not None else None
        if call is not None:
            found[node] = of(call[0], call[1])
    return found


def count(sliced: nn.Module, labels: Labels, keep: Tensor, registry: Registry) -> None:
    """Exchange the modules of norms that lost channels in a sliced copy, in place. What cannot be exchanged stays; the
    proof then says that the class is not equal, and the rewritten graph takes its place."""
    exchangeable, done = Exchangeable(labels.graph, registry), set[str]()
    for node, number in counting(labels, keep, registry).items():
        path = owner(node)[0]
        if path in done or exchangeable.module(path) is None:
            continue
        done.add(path)
        module = sliced.get_submodule(path)
        if (kind := counted_class(module)) is not None:
            module.of = number  # type: ignore[assignment]
            module.__class__ = kind
        elif (island := exchangeable.island(path)) is not None:
            _put(sliced, module, _rebuilt(module, island, labels, keep, registry))


def _rebuilt(module: nn.Module, island: Island, labels: Labels, keep: Tensor, registry: Registry) -> fx.GraphModule:
    """The module's forward as a graph, with what the rules make of its calls; its tensors are shared, not copied."""
    root, new, env = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    root.training = module.training
    env[island.given] = new.placeholder(next(iter(inspect.signature(module.forward).parameters)))
    sizes = NewSizes(labels, keep)
    for node in island.nodes:
        for arg in node.all_input_nodes:
            name = (labels.graph.fqn(arg) or "").rpartition(".")[2]
            if name and arg not in env:
                setattr(root, name, getattr(module, name))
                env[arg] = new.get_attr(name)
        env[node] = emit(node, new, root, env, sizes, {}, module, registry)
    new.output(env[island.result])
    name = module._get_name()        # a graph module's own, where it has been rebuilt before
    made = fx.GraphModule(root, new, name if name.startswith("Counted") else f"Counted{name}")
    made.train(module.training)
    return made


def _put(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def said(labels: Labels, keep: Tensor, registry: Registry) -> list[str]:
    """What a note says of them."""
    names = list(dict.fromkeys(owner(node)[0] or node.name for node in counting(labels, keep, registry)))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]!r}{more}: these norms count the channels that left as the zeros they are, which is exact"] \
        if names else []
