"""Training towards channels that can go: penalties on whole groups, and pruning that may still be taken back.

Each is given to ``fit(sparsity=...)``, or called in a loop of your own: ``before_step(model)`` between backward and
step, ``after_epoch(model, epoch)`` after every pass over the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.core.plan import Plan
from prunekern.errors import InputError
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.prune.importance.slices import axis_sums
from prunekern.prune.oneshot import Pruned, apply_plan, groups_of, propose
from prunekern.prune.slice import plan_of
from prunekern.prune.target import Meter, Target, as_target, ignored


@dataclass(frozen=True, eq=False)
class Slice:
    """An axis with channels of one parameter. table: group of each index [n]; [rows, n] where each of ``rows`` blocks
    of axis 0 has its own. consumed: layers read channels along it."""

    name: str
    axis: int
    table: Tensor
    consumed: bool

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """values [groups] laid along the axis, in the shape of the parameter."""
        rows = len(self.table) if self.table.dim() == 2 else 1
        along = values[self.table.to(values.device)].to(like.device).reshape(rows, 1, like.shape[self.axis], 1)
        rest = like.shape[self.axis + 1:].numel()
        front = like.numel() // (rows * like.shape[self.axis] * rest) if like.numel() else 0
        return along.expand(rows, front, like.shape[self.axis], rest).reshape(like.shape)


class Sparsity:
    """What acts on the groups of a network while it trains.

    groups: of the network, or of one with the same names and shapes, such as the original of a copy. ignore: globs of
    layers left alone. averages: whether it goes together with an average of the weights.
    """

    averages = True

    def __init__(self, groups: Groups, *, ignore: Sequence[str] = ()) -> None:
        self.groups, self.ignore = groups, (ignore,) if isinstance(ignore, str) else tuple(ignore)
        labels, tensors = groups.labels, groups.graph.tensors
        self.free = torch.zeros(labels.groups, dtype=torch.bool)
        for family in groups:
            self.free[family.groups] = True
        self.free &= ~ignored(groups, self.ignore)
        consumed = set(labels.consumed)
        self.slices = tuple(Slice(name, axis, table, (name, axis) in consumed)
                            for (name, axis), table in sorted(labels.axes.items(), key=lambda item: item[0])
                            if isinstance(tensors[name], nn.Parameter) and bool(self.free[table].any()))

    def before_step(self, model: nn.Module) -> None:
        """Called between backward and step: change gradients."""

    def after_step(self, model: nn.Module) -> None:
        """Called after every update of the weights."""

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called after every epoch (from 0), before validation."""

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, JSON-able."""
        return {"method": type(self).__name__, "graph": self.groups.fingerprint(), "ignore": list(self.ignore)}

    def state(self) -> dict[str, Tensor]:
        """What changes while it trains; a checkpoint holds it."""
        return {}

    def put_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``."""

    def check(self, model: nn.Module) -> None:
        """Raises InputError where the model is not the one that the groups describe."""
        own = _parameters(model)
        for part in self.slices:
            wanted = tuple(self.groups.graph.tensors[part.name].shape)
            found = tuple(own[part.name].shape) if part.name in own else None
            if found != wanted:
                raise InputError(f"{type(self).__name__}: the groups have {part.name!r} with shape {wanted}, the model "
                                 f"has {'none' if found is None else found}; make groups of the model that is trained.")

    def _each(self, model: nn.Module) -> Iterator[tuple[Slice, nn.Parameter]]:
        own = _parameters(model)
        for part in self.slices:
            if part.name not in own:
                self.check(model)
            yield part, own[part.name]


class GroupLasso(Sparsity):
    """Adds the gradient of ``strength * sum over groups of e_g * sqrt(n_g) * |w_g|``: whole groups shrink to nothing.

    w_g: all weights of group g in all layers it runs through, n_g of them. e_g is 1, or with ``emphasis`` a
    ``2 ** (a * (largest - |w_g|) / (largest - smallest))`` within each family, which leaves the large ones in peace.
    Sources: Wen et al., SSL (NeurIPS 2016); the groups and the emphasis (a = 4): Fang et al., DepGraph (CVPR 2023).
    """

    def __init__(self, groups: Groups, strength: float = 1e-4, *, emphasis: float = 0.0,
                 ignore: Sequence[str] = ()) -> None:
        super().__init__(groups, ignore=ignore)
        if not 0 < strength < float("inf") or emphasis < 0:
            raise InputError(f"GroupLasso: strength={strength} must be positive, emphasis={emphasis} 0 or more.")
        self.strength, self.emphasis = strength, emphasis
        self.counts = torch.zeros(groups.labels.groups)
        for part in self.slices:
            shape = groups.graph.tensors[part.name].shape
            each = float(shape.numel()) / part.table.numel()
            self.counts += torch.bincount(part.table.reshape(-1), minlength=len(self.counts)) * each
        self.family = torch.full((groups.labels.groups,), len(groups), dtype=torch.long)
        for number, family in enumerate(groups):
            self.family[family.groups] = number

    def norms(self, model: nn.Module) -> Tensor:
        """|w_g| of every group [groups], differentiable; 0 for those that stay."""
        squares: Tensor | None = None
        for part, weight in self._each(model):
            along = axis_sums(weight.square(), part.axis, part.table).reshape(-1)
            if squares is None:
                squares = torch.zeros(len(self.free), dtype=along.dtype, device=along.device)
            squares = squares.index_add(0, part.table.reshape(-1).to(along.device), along.to(squares.dtype))
        found = torch.zeros(len(self.free)) if squares is None else squares
        return torch.where(self.free.to(found.device), found, 0).clamp(min=1e-24).sqrt()

    def penalty(self, model: nn.Module) -> Tensor:
        """The value of the penalty, differentiable but for the emphasis; a term of the loss in a loop of your own."""
        norms = self.norms(model)
        return (self._weights(norms.detach()) * norms).sum()

    def before_step(self, model: nn.Module) -> None:
        with torch.no_grad():
            norms = self.norms(model)
            pull = self._weights(norms) / norms
            for part, weight in self._each(model):
                if weight.requires_grad:
                    _add(weight, part.spread(pull, weight) * weight)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "strength": self.strength, "emphasis": self.emphasis}

    def _weights(self, norms: Tensor) -> Tensor:
        """strength * e_g * sqrt(n_g) of every group that may go, 0 elsewhere."""
        free, family = self.free.to(norms.device), self.family.to(norms.device)
        found = self.strength * self.counts.to(norms.device, norms.dtype).sqrt() * free
        if self.emphasis:
            ends = norms.new_zeros(len(self.groups) + 1)
            most = ends.scatter_reduce(0, family, norms, "amax", include_self=False)[family]
            least = ends.scatter_reduce(0, family, norms, "amin", include_self=False)[family]
            found = found * 2.0 ** (self.emphasis * (most - norms) / (most - least).clamp(min=1e-12))
        return found


class Choosing(Sparsity):
    """Keeps a choice of groups for a target, and cuts it in the end. options: those of ``prune.propose``."""

    def __init__(self, groups: Groups, target: Target | None, options: Mapping[str, Any]) -> None:
        super().__init__(groups, ignore=options.get("ignore", ()))
        self.target, self.options = as_target(target), dict(options)
        self.plan, self.keep = propose(groups, self.target, **self.options)

    def state(self) -> dict[str, Tensor]:
        return {"keep": self.keep}

    def put_state(self, state: Mapping[str, Tensor]) -> None:
        self.keep = state["keep"].clone()

    def settings(self) -> dict[str, Any]:
        plain = {name: value if isinstance(value, (str, int, float, bool, type(None))) else
                 list(value) if isinstance(value, tuple) else getattr(value, "__qualname__", type(value).__name__)
                 for name, value in self.options.items()}
        return {**super().settings(), "target": self.target.to_json(), "options": plain}

    def cut(self, model: nn.Module, *, seed: int = 0) -> Pruned:
        """The trained model without the chosen groups, proven. Raises what ``prunekern.apply_plan`` raises."""
        graph = self.groups.graph
        groups = groups_of(model, Call(graph.args, graph.kwargs), policy=self.groups.labels.policy, allow_train=True)
        return apply_plan(model, None, self.chosen(), groups=groups, seed=seed)

    def chosen(self) -> Plan:
        """The plan that carries the choice out."""
        costs = Meter(self.groups).change(self.keep)
        return plan_of(self.groups, self.keep, costs=costs, target=dict(self.plan.target), notes=self.plan.notes)


class GrowingReg(Choosing):
    """An L2 penalty on the groups that are to go, which grows by ``step`` every ``every`` updates up to ``ceiling``.

    The choice is made at first, on the weights as the groups have them, for ``target`` with ``options`` (criterion,
    ranking, ...: those of ``prunekern.prune``); ``cut`` carries it out. Adds ``lambda * w`` to the gradients of the
    weights of these groups in all layers. Source: Wang et al., Neural Pruning via Growing Regularization (ICLR 2021),
    GReg-1; there step 1e-4 every 10 updates (5 on CIFAR), ceiling 1.
    """

    def __init__(self, groups: Groups, target: Target | None = None, *, step: float = 1e-4, every: int = 10,
                 ceiling: float = 1.0, **options: Any) -> None:
        super().__init__(groups, target, options)
        if not 0 < step <= ceiling < float("inf") or every < 1:
            raise InputError(f"GrowingReg: step={step} must be positive and at most ceiling={ceiling}, every={every} "
                             "at least 1.")
        self.step, self.every, self.ceiling, self.updates = step, every, ceiling, 0

    @property
    def strength(self) -> float:
        """The penalty's factor at the next update."""
        return min(self.step * (1 + self.updates // self.every), self.ceiling)

    def before_step(self, model: nn.Module) -> None:
        gone = (~self.keep & self.free).float()
        masks: dict[str, tuple[nn.Parameter, Tensor]] = {}
        with torch.no_grad():
            for part, weight in self._each(model):
                mask = part.spread(gone, weight)
                masks[part.name] = (weight, torch.maximum(masks[part.name][1], mask) if part.name in masks else mask)
            for weight, mask in masks.values():
                if weight.requires_grad:
                    _add(weight, mask * weight * self.strength)
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "updates": torch.tensor(self.updates)}

    def put_state(self, state: Mapping[str, Tensor]) -> None:
        super().put_state(state)
        self.updates = int(state["updates"])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "step": self.step, "every": self.every, "ceiling": self.ceiling}


class SoftPruning(Choosing):
    """After every epoch the least important groups for ``target`` are silenced; the next epoch may revive them.

    Silenced is what layers read from them (their consumers' weights become zero): the network then computes what the
    cut one would, and gradients bring back what is missed. A choice is made anew each time, on the weights of the
    moment, with ``options`` of ``prunekern.prune``; ``cut`` carries out the last. Source: He et al., Soft Filter
    Pruning (IJCAI 2018), which zeroes the filters themselves; after a batch norm that is not the pruned network.
    """

    averages = False

    def __init__(self, groups: Groups, target: Target | None = None, *, every: int = 1, **options: Any) -> None:
        super().__init__(groups, target, options)
        if every < 1:
            raise InputError(f"SoftPruning: every={every} must be at least 1 epoch.")
        self.every = every
        self.read = torch.zeros_like(self.free)
        for part in self.slices:
            if part.consumed:
                self.read[part.table.reshape(-1)] = True

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        if (epoch + 1) % self.every:
            return
        self.plan, self.keep = propose(_with_weights(self.groups, model), self.target, **self.options)
        gone = ~self.keep & self.free
        with torch.no_grad():
            for part, weight in self._each(model):
                here = gone & self.read if part.consumed else gone & ~self.read
                weight.masked_fill_(part.spread(here.float(), weight) > 0, 0)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "every": self.every}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _add(weight: nn.Parameter, amount: Tensor) -> None:
    """To the gradient, also where a batch gave none."""
    weight.grad = amount.to(weight.dtype) if weight.grad is None else weight.grad.add_(amount)


def _with_weights(groups: Groups, model: nn.Module) -> Groups:
    """The same groups over the weights that the model has now."""
    state = {**dict(model.named_buffers(remove_duplicate=False)), **_parameters(model)}
    graph = groups.graph
    device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
    tensors = {name: state.get(name, tensor.to(device)) for name, tensor in graph.tensors.items()}
    return replace(groups, labels=replace(groups.labels, graph=replace(graph, tensors=tensors)))
