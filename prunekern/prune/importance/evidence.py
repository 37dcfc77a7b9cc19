"""What a criterion may look at: the groups, the weights, and what calibration data tells about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from prunekern.core.graph import Graph
from prunekern.core.rule import aten
from prunekern.errors import InputError
from prunekern.graph.groups import Groups
from prunekern.graph.labels import Labels
from prunekern.prune.importance.calibration import Data, calls
from prunekern.prune.importance.curvature import Curvature, curvature
from prunekern.prune.importance.passes import Batch, differentiable, first, loss_of, output_of, run

Contribution = tuple[Tensor, Tensor]
"""(group of each entry [n], score of each entry [n], not negative; higher means more important)."""


@dataclass(frozen=True)
class Weight:
    """A tensor whose slices belong to groups.

    axes: axis -> group of each index [n]; [rows, n] where each of ``rows`` blocks of axis 0 has its own.
    """

    name: str
    tensor: Tensor
    axes: Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class Statistics:
    """An activation along one of its axes with channels, over all calibration data. fp64, on the CPU.

    node: what was measured; groups [n]: the group of each index; magnitude [n]: mean |x|; mean [n];
    zeros [n]: share of exact zeros.
    """

    node: str
    axis: int
    groups: Tensor
    magnitude: Tensor
    mean: Tensor
    zeros: Tensor


@dataclass(frozen=True, eq=False)
class Site:
    """Where activations are looked at: an axis with channels of a node; groups [n]: the group of each index."""

    node: str
    axis: int
    groups: Tensor


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything a criterion may use. Gradients and activations are computed when first asked for, then kept.

    batches: calibration data (``calibration.Data``); None where there is none.
    loss:    ``loss(output, target)``, or ``loss(output)`` where batches hold no target; averaged over the
             batch. Default: cross-entropy of class scores.
    seed:    for criteria that draw at random.
    remarks: what criteria want told beside their scores (``remark``); ``score`` puts it into its notes.
    """

    groups: Groups
    batches: Data | None = None
    loss: Callable[..., Tensor] | None = None
    seed: int = 0
    remarks: list[str] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.groups.graph

    def weights(self) -> tuple[Weight, ...]:
        """Every parameter with channels, in the order in which the graph first uses them.

        Buffers are left out (statistics carry no importance), but for those that are weights of a layer.
        """
        return self._weights

    def gradients(self) -> Mapping[str, Tensor]:
        """Name -> gradient of the mean loss over all calibration rows, of every floating-point parameter.

        The module's own ``.grad`` fields are never touched. Raises InputError without data or targets.
        """
        return self._gradients

    def activations(self) -> tuple[Statistics, ...]:
        """Of every activation that layers read channels from, once each, in the order of the graph.

        Measured where the activation function left it, before poolings and changes of shape.
        Raises InputError without data.
        """
        return self._activations

    def curvature(self) -> Curvature:
        """Means of squared per-sample gradients, by weight and by group (``curvature.curvature``).

        Works without targets: labels are then drawn from the model's output. Raises InputError without data, or
        where there is no output to draw from.
        """
        return self._curvature

    def maps(self, see: Callable[[Site, Tensor], None], rows: int | None = None) -> None:
        """Show the activations themselves, batch after batch: nothing of them is kept here.

        see(site, value): value [rows, channels, positions...], what ``activations`` measures. rows: only the first so
        many rows of the data. Raises InputError without data.
        """
        sites: dict[fx.Node, list[Site]] = {}
        for node in _measured(self.groups.labels):
            sites[node] = [Site(node.name, axis, groups) for axis, groups in self.groups.labels.live[node]]

        def after(node: fx.Node, value: Any) -> None:
            for site in sites.get(node, ()):
                shown = value.unsqueeze(0) if site.axis == 0 else value
                see(site, shown.movedim(max(site.axis, 1), 1))

        for number, (call, _) in enumerate(first(self._calls("activations"), rows)):
            with torch.no_grad():
                run(self.graph, self.graph.tensors, call, number, after=after)

    def batches_of(self, rows: int) -> Iterator[Batch]:
        """The calibration data up to so many rows: (inputs, target or None). Raises InputError without data."""
        return first(self._calls("second moments"), rows)

    def remark(self, text: str) -> None:
        """Say something that a reader of the report should know about these scores."""
        self.remarks.append(text)

    # ---- how -----------------------------------------------------------------------------------------------

    @cached_property
    def _weights(self) -> tuple[Weight, ...]:
        labels = self.groups.labels
        mixed = {name for name, _ in labels.produced} | {name for name, _ in labels.consumed}
        axes: dict[str, dict[int, Tensor]] = {}
        for (name, axis), groups in labels.axes.items():
            axes.setdefault(name, {})[axis] = groups
        used = (self.graph.fqn(arg) for node in self.graph.nodes for arg in node.all_input_nodes)
        return tuple(
            Weight(name, tensor.detach(), axes[name])
            for name in dict.fromkeys(used)
            if name in axes
            for tensor in (self.graph.tensors[name],)
            if isinstance(tensor, nn.Parameter) or name in mixed
        )

    @cached_property
    def _gradients(self) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            state, leaves = differentiable(self.graph, (weight.name for weight in self._weights))
            total = {
                name: torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
                for name, leaf in leaves.items()
            }
            rows = 0
            for number, (call, target) in enumerate(self._calls("gradients")):
                loss = self._loss_of(state, call, target, number)
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for name, gradient in zip(leaves, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient * (call.batch or 1)
                rows += call.batch or 1
            return {name: gradient / rows for name, gradient in total.items()}

    def _loss_of(self, state: Mapping[str, Tensor], call: Any, target: Any, number: int) -> Tensor:
        if target is None and self.loss is None:
            raise InputError(
                "gradients need a loss, and the calibration data holds no targets; pass batches of "
                "(inputs, target), or loss=function of the output."
            )
        return loss_of(self.loss, output_of(self.graph, state, call, number), target, number)

    @cached_property
    def _curvature(self) -> Curvature:
        names = [weight.name for weight in self._weights]
        return curvature(self.groups.labels, names, self._calls("squared gradients"), self.loss, self.seed)

    @cached_property
    def _activations(self) -> tuple[Statistics, ...]:
        meter = _Meter(self.groups.labels)
        for number, (call, _) in enumerate(self._calls("activations")):
            with torch.no_grad():
                run(self.graph, self.graph.tensors, call, number, after=meter)
        return meter.result()

    def _calls(self, what: str) -> Iterator[Batch]:
        if self.batches is None:
            raise InputError(
                f"{what} need calibration data and none was given; pass some batches that the model "
                "accepts (batches=loader, or calibrate=loader of prunekern.compress)."
            )
        return calls(self.graph, self.batches)


Criterion = Callable[[Evidence], Iterable[Contribution]]


C = TypeVar("C", bound=Callable[..., Any])


def brings(**settings: str) -> Callable[[C], C]:
    """Settings of ``score`` (normalisation, reduction, direction) that a criterion is meant to have: they hold where a
    caller leaves them out. A decorator."""

    def decorate(criterion: C) -> C:
        criterion.__dict__["settings"] = settings
        return criterion

    return decorate


PASSED = frozenset(
    aten(
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "mean.dim",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "view.default",
        "reshape",
        "flatten.using_ints",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose.int",
        "contiguous",
        "clone",
        "pad",
        "constant_pad_nd",
    )
)
"""What may lie between an activation function and the layer that reads it. Averages and padding would hide
zeros or add some, so the measurement is taken before them."""


def _measured(labels: Labels) -> dict[fx.Node, None]:
    """The activations that layers read channels from, each followed back to where it was computed."""
    found: dict[fx.Node, None] = {}
    for args in labels.masked.values():
        for node in args:
            while node.target in PASSED and labels.live.get(node.all_input_nodes[0]):
                node = node.all_input_nodes[0]
            if labels.live.get(node) and node.op == "call_function":
                found[node] = None
    return found


class _Meter:
    """A hook for ``evaluate`` that sums up activations along their axes with channels."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.sums: dict[tuple[fx.Node, int], Tensor] = {
            (node, axis): torch.zeros(3, len(groups), dtype=torch.float64)
            for node in _measured(labels)
            for axis, groups in labels.live[node]
        }
        self.count = dict.fromkeys(self.sums, 0)
        self.axes: dict[fx.Node, list[int]] = {}
        for node, axis in self.sums:
            self.axes.setdefault(node, []).append(axis)

    def __call__(self, node: fx.Node, value: Any) -> None:
        for axis in self.axes.get(node, ()):
            others = [a for a in range(value.dim()) if a != axis]
            parts = (value.abs(), value, (value == 0))
            self.sums[node, axis] += torch.stack(
                [part.sum(others, dtype=torch.float64) if others else part.double() for part in parts]
            ).cpu()
            self.count[node, axis] += value.numel() // value.shape[axis]

    def result(self) -> tuple[Statistics, ...]:
        order = {node: i for i, node in enumerate(self.labels.graph.nodes)}
        return tuple(
            Statistics(node.name, axis, dict(self.labels.live[node])[axis], *(sums / self.count[node, axis]))
            for (node, axis), sums in sorted(
                self.sums.items(), key=lambda item: (order[item[0][0]], item[0][1])
            )
        )
