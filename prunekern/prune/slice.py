"""Choice -> plan -> a physically smaller module. The given model is never modified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunekern.core.graph import Graph, Shape, at, owner
from prunekern.core.plan import Plan
from prunekern.core.rule import Registry
from prunekern.errors import PlanError
from prunekern.graph.groups import Groups
from prunekern.graph.labels import Labels
from prunekern.graph.parts import copied


def plan_of(groups: Groups, keep: Tensor, **details: Any) -> Plan:
    """Write down a choice. keep: boolean [groups]; details: further fields of Plan."""
    labels = groups.labels
    kept: dict[str, dict[int, list[Any]]] = {}
    for (name, axis), index in labels.axes.items():
        alive = keep[index]
        if bool(alive.all()) or name in labels.graph.constants:
            continue
        kept.setdefault(name, {})[axis] = _indices(alive)
    shapes = {}
    for node in labels.graph.nodes:
        if node.op == "call_function" and labels.live.get(node):
            new = labels.dims(node, keep)
            if new != labels.graph.dims[node.name]:
                shapes[node.name] = _text(new)
    return Plan(graph=groups.fingerprint(), kept=kept, shapes=shapes, policy=labels.policy.to_json(),
                outputs=_kept_outputs(labels, keep), **details)


def _kept_outputs(labels: Labels, keep: Tensor) -> dict[str, dict[int, list[int]]]:
    found: dict[str, dict[int, list[int]]] = {}
    for number, leaf in enumerate(labels.graph.output.args[0]):  # type: ignore[arg-type]
        for axis in {axis for axis, _ in labels.live.get(leaf, ())} if isinstance(leaf, fx.Node) else ():
            alive = labels.alive(leaf, axis, keep)
            if not bool(alive.all()):
                found.setdefault(str(number), {})[axis] = alive.nonzero()[:, 0].tolist()
    return found


def _indices(alive: Tensor) -> list[Any]:
    if alive.dim() == 1:
        return alive.nonzero()[:, 0].tolist()
    return [row.nonzero()[:, 0].tolist() for row in alive]


def _text(dims: Any) -> Any:
    return [_text(d) for d in dims] if isinstance(dims, (list, tuple)) else str(dims)


def choice_of(groups: Groups, plan: Plan) -> Tensor:
    """The boolean choice [groups] that a plan stands for.

    Raises PlanError where the plan belongs to another graph, names what is not there, is out of range, keeps
    nothing of an axis, or asks for half a group.
    """
    if plan.graph != groups.fingerprint():
        raise PlanError(f"the plan belongs to graph {plan.graph}, this is {groups.fingerprint()} (another model, "
                        "input or version); make a plan for this model.")
    labels, keep = groups.labels, groups.everything()
    for name, axes in plan.kept.items():
        for axis, kept in axes.items():
            if (name, axis) not in labels.axes:
                raise PlanError(f"plan.kept[{name!r}][{axis}]: this graph has no such axis with channels.")
            index = labels.axes[name, axis]
            alive = _alive_of(name, axis, kept, index)
            keep[index[~alive]] = False
    if not bool(keep[0]):
        raise PlanError("the plan removes channels that must stay (inputs, outputs or frozen ones); "
                        "prunekern doctor lists them.")
    _check_consistent(groups, plan, keep)
    return keep


def _alive_of(name: str, axis: int, kept: list[Any], index: Tensor) -> Tensor:
    where = f"plan.kept[{name!r}][{axis}]"
    if not kept:
        raise PlanError(f"{where} keeps nothing; at least one channel must stay.")
    alive = torch.zeros_like(index, dtype=torch.bool)
    rows = kept if index.dim() == 2 else [kept]
    table = alive if index.dim() == 2 else alive.unsqueeze(0)
    if index.dim() == 2 and (len(rows) != len(index) or not all(isinstance(row, list) for row in rows)):
        raise PlanError(f"{where} needs {len(index)} lists, one per group of the convolution.")
    for row, indices in zip(table, rows, strict=True):
        if not all(isinstance(i, int) and 0 <= i < len(row) for i in indices) or len(set(indices)) != len(indices):
            raise PlanError(f"{where} must hold different indices from 0 to {len(row) - 1}.")
        row[torch.tensor(indices, dtype=torch.long)] = True
    return alive


def _check_consistent(groups: Groups, plan: Plan, keep: Tensor) -> None:
    labels = groups.labels
    for (name, axis), index in labels.axes.items():
        if name in labels.graph.constants:
            continue
        want = keep[index]
        kept = plan.kept.get(name, {}).get(axis)
        if (kept is None and not bool(want.all())) or (kept is not None and _indices(want) != sorted_rows(kept)):
            family = next((f.name for f in groups if any((m.name, m.axis) == (name, axis) for m in f.members)), "?")
            raise PlanError(f"plan.kept[{name!r}][{axis}] does not agree with the rest of its family {family!r}: "
                            "channels of one group leave together; edit all members, or use keep masks.")
        if want.dim() == 1 and not bool(want.any()):
            raise PlanError(f"{name!r} axis {axis} would keep no channel; at least one must stay.")
    check_balance(labels, keep)


def sorted_rows(kept: list[Any]) -> list[Any]:
    return [sorted(row) for row in kept] if kept and isinstance(kept[0], list) else sorted(kept)


def check_balance(labels: Labels, keep: Tensor) -> None:
    """Raises PlanError where the rows of a grouped convolution would keep different numbers of channels."""
    for table in labels.balanced:
        counts = keep[table].sum(1)
        if int(counts.min()) != int(counts.max()) or int(counts.min()) == 0:
            raise PlanError(f"a grouped convolution needs as many channels in each group; the plan leaves "
                            f"{counts.tolist()}.")


def sliced_tensors(groups: Groups, keep: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state after slicing, by canonical name; tensors that stay whole are the given ones."""
    labels = groups.labels
    result = dict(tensors)
    for name in {name for name, _ in labels.axes} | labels.lookups.keys():
        if name in result:
            result[name] = cut_tensor(labels, name, result[name], keep)
    return result


def cut_tensor(labels: Labels, name: str, tensor: Tensor, keep: Tensor) -> Tensor:
    """What remains of the tensor of that name."""
    if name in labels.lookups:            # numbers of channels: count among those that remain
        alive = keep[labels.lookups[name]].to(tensor.device)
        tensor = (alive.cumsum(0) - 1)[tensor.long() % len(alive)].to(tensor.dtype)
    for axis in range(tensor.dim()):
        table = labels.axes.get((name, axis), keep)
        if table.dim() == 2:
            return _sliced_rows(labels, name, tensor, keep, table)
    for axis in range(tensor.dim()):
        index = labels.axes.get((name, axis))
        if index is not None and not bool(keep[index].all()):
            tensor = tensor.index_select(axis, keep[index].nonzero()[:, 0].to(tensor.device))
    return tensor


def _sliced_rows(labels: Labels, name: str, tensor: Tensor, keep: Tensor, table: Tensor) -> Tensor:
    """A grouped weight: axis 0 in as many blocks as the table has rows, axis 1 sliced per block."""
    alive0 = keep[labels.axes[name, 0]]
    alive1 = keep[table]
    blocks = []
    for block, rows, columns in zip(tensor.chunk(len(table)), alive0.chunk(len(table)), alive1, strict=True):
        if bool(rows.any()):
            device = tensor.device
            blocks.append(block[rows.nonzero()[:, 0].to(device)][:, columns.nonzero()[:, 0].to(device)])
    return torch.cat(blocks)


def slice_module(model: nn.Module, groups: Groups, keep: Tensor, registry: Registry) -> nn.Module:
    """A deep copy of ``model`` with every parameter, buffer and size attribute cut down to the choice.

    Device, dtype, ``requires_grad``, hooks and train/eval mode are those of the originals. Dense weights are
    never copied: the cut ones take their place while copying. The module's own ``forward`` may still hold
    hard-coded sizes; the proof finds out. Where the graph is that of another module (wrappers taken off, weights
    baked), that one is copied; what cannot be copied whole comes as its ``Parts``.
    """
    graph = groups.graph
    model = model if graph.module is None else graph.module
    old = {name: t for name, t in graph.tensors.items() if name not in graph.constants}
    with torch.no_grad():
        new = sliced_tensors(groups, keep, {name: tensor.detach() for name, tensor in old.items()})
        memo: dict[int, Any] = {id(old[name]): _like(old[name], tensor.clone())
                                for name, tensor in new.items()
                                if tensor.shape != old[name].shape or name in groups.labels.lookups}
    smaller = copied(model, memo)
    resize_modules(smaller, groups, keep, registry)
    return smaller


def _like(original: Tensor, data: Tensor) -> Tensor:
    """A smaller parameter or buffer with the class, hooks and attributes of the one it replaces."""
    if not isinstance(original, nn.Parameter):
        return data
    parameter = nn.Parameter(data, requires_grad=original.requires_grad)
    parameter.__class__ = original.__class__
    parameter.__dict__.update({k: v for k, v in original.__dict__.items() if k not in ("grad",)})
    return parameter


def resize_modules(module: nn.Module, groups: Groups, keep: Tensor, registry: Registry) -> None:
    """Set ``out_channels``, ``num_features``, ... wherever a module's attribute was the old size."""
    labels = groups.labels
    graph = labels.graph
    modules = dict(module.named_modules(remove_duplicate=False))
    wanted: dict[tuple[str, str], Any] = {}
    for node in graph.nodes:
        rule = registry.find(node.target)
        if rule is None or node.op != "call_function":
            continue
        before = rule.attributes(node, graph.shape)
        after = rule.attributes(node, lambda n: predicted(labels, n, keep)) if before else {}
        for attribute, value in before.items():
            if after[attribute] != value:
                for path in _modules_of(graph, node):
                    target = modules.get(path)      # none for a slice of a ModuleList, made in a forward
                    if getattr(target, attribute, None) == value and wanted.get((path, attribute)) is None:
                        wanted[path, attribute] = after[attribute]
    for (path, attribute), value in wanted.items():
        setattr(modules[path], attribute, value)


def _modules_of(graph: Graph, node: fx.Node) -> list[str]:
    """The modules that own a call: the one whose forward made it, and those that hold its parameters."""
    paths = [] if node.meta.get("nn_module_stack") is None else [owner(node)[0]]
    for arg in node.all_input_nodes:
        name = graph.fqn(arg)
        if name is not None and name not in graph.constants:
            aliases = [alias for alias, target in graph.tied.items() if target == name]
            paths += [full.rpartition(".")[0] for full in (name, *aliases)]
    return list(dict.fromkeys(paths))


def predicted(labels: Labels, node: fx.Node, keep: Tensor, batch: int | None = None) -> Shape:
    """The shape a node will have after slicing, at a batch size."""
    return at(labels.dims(node, keep), labels.graph.batch if batch is None else batch)  # type: ignore[no-any-return]
