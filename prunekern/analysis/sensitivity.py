"""How much accuracy each layer's channels carry: prune one family at a time and measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.data import batches as batches_of
from prunekern.errors import InputError, TargetError
from prunekern.graph.evaluate import evaluate
from prunekern.graph.groups import Family, Groups
from prunekern.graph.inputs import Call
from prunekern.prune.importance import Criterion, score
from prunekern.prune.oneshot import groups_of
from prunekern.prune.reference import masking
from prunekern.prune.units import make_units


@dataclass(frozen=True)
class Point:
    """Accuracy with ``removed`` of ``channels`` channels of one family gone, nothing else touched."""

    family: str
    ratio: float
    removed: int
    channels: int
    accuracy: float


@dataclass(frozen=True)
class Sensitivity:
    """All points, and the accuracy of the untouched network."""

    dense: float
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        return {"dense": self.dense, "points": [asdict(point) for point in self.points]}

    def __str__(self) -> str:
        ratios = sorted({p.ratio for p in self.points})
        rows = [f"{'family':<32} {'channels':>8} " + " ".join(f"{r:>7.0%}" for r in ratios) + "   accuracy with that "
                f"share removed; untouched {self.dense:.2%}"]
        for name in dict.fromkeys(p.family for p in self.points):
            mine = {p.ratio: p for p in self.points if p.family == name}
            channels = next(iter(mine.values())).channels
            rows.append(f"{name:<32} {channels:>8} " + " ".join(
                f"{mine[r].accuracy:>7.2%}" if r in mine else f"{'-':>7}" for r in ratios))
        return "\n".join(rows)


def sensitivity(model: nn.Module, data: Any, *, example_inputs: Any = None,
                ratios: Sequence[float] = (0.1, 0.25, 0.5, 0.75), criterion: str | Criterion = "l2",
                families: Sequence[str] = ("*",), groups: Groups | None = None, calibrate: Any = None,
                seed: int = 0, tell: Callable[[str], None] = lambda _: None) -> Sensitivity:
    """Remove the least important share of each family in turn, and measure top-1 accuracy on ``data``.

    data: (inputs, labels [N]) tensors, or batches of them. ratios: shares of a family's channels removed.
    families: globs of families or layers. tell: called with each family's name.
    Raises InputError (no data, or of another form), TargetError (a ratio outside (0, 1); a glob that matches
    nothing), and what ``trace`` raises.

    The network itself is run with channels masked, which the proof of slicing makes the same thing, so nothing
    is copied or cut. Source: Li et al., Pruning Filters for Efficient ConvNets (2017).
    """
    if data is None:
        raise InputError("sensitivity needs data, (inputs, labels) tensors or batches of them, to measure accuracy on.")
    batches = labelled_batches(data)
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise TargetError(f"ratios={ratio!r} is not a share in (0, 1) of a family's channels.")
    groups = groups or groups_of(model, batches[0][0] if example_inputs is None else example_inputs)
    scores = score(groups, criterion, batches=batches if calibrate is None else calibrate, seed=seed)
    units = make_units(groups, scores.values)
    for pattern in families:
        if not groups.find(pattern):
            raise TargetError(f"families={pattern!r} matches nothing; there are: {', '.join(f.name for f in groups)}.")
    wanted = [f for f in groups if any(f.matches(p) for p in families)]
    dense = _accuracy(groups, groups.everything(), batches)
    points = []
    for family in wanted:
        tell(family.name)
        for ratio in ratios:
            keep = _without(groups, family, units, ratio)
            removed = int((~keep[family.groups]).sum())
            points.append(Point(family.name, ratio, removed, family.channels, _accuracy(groups, keep, batches)))
    return Sensitivity(dense, tuple(points))


def labelled_batches(data: Any) -> list[Any]:
    """Data as a list of (inputs, labels) batches. Raises InputError where there are no labels, or is no batch."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        data = batches_of(data[0], data[1], batch_size=256)
    found = list(data)
    for batch in found[:1] or [None]:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
            raise InputError("sensitivity needs data with labels: pass (inputs, labels) tensors, or batches of them"
                             + ("." if found else "; there is no batch."))
    return found


def _without(groups: Groups, family: Family, units: Any, ratio: float) -> Tensor:
    number = groups.families.index(family)
    mine = ((units.family == number) & ~units.last).nonzero()[:, 0]
    chosen = torch.zeros(len(units), dtype=torch.bool)
    gone = 0
    for unit in mine.tolist():
        size = int((units.of == unit).sum())
        if gone + size > ratio * family.channels + 1e-9:
            break
        chosen[unit], gone = True, gone + size
    return torch.as_tensor(~units.removed(chosen))


def _call(inputs: Any) -> Call:
    if isinstance(inputs, dict):
        return Call((), inputs)
    return Call(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def _accuracy(groups: Groups, keep: Tensor, batches: Sequence[Any]) -> float:
    tensors = {name: tensor.detach() for name, tensor in groups.graph.tensors.items()}
    hook, right, count = masking(groups.labels, keep), 0, 0
    for inputs, target in batches:
        call = _call(inputs)
        with torch.no_grad():
            outputs = evaluate(groups.graph, tensors, call.args, call.kwargs, before=hook)
        right += int((outputs[0].argmax(-1) == target).sum())
        count += target.numel()
    return right / max(count, 1)
