"""How much each layer's channels carry: prune one family at a time, and measure accuracy and divergence."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.core.notebook import Notebook
from prunekern.data import batches as batches_of
from prunekern.errors import InputError, TargetError
from prunekern.graph.evaluate import evaluate
from prunekern.graph.groups import Family, Groups
from prunekern.graph.inputs import Call
from prunekern.prune.importance import Criterion, score
from prunekern.prune.oneshot import groups_of
from prunekern.prune.reference import masking
from prunekern.prune.schedule import model_digest
from prunekern.prune.units import make_units


@dataclass(frozen=True)
class Point:
    """Accuracy (NaN without labels) with ``removed`` of ``channels`` channels of one family gone, nothing else touched.

    divergence: from the untouched network's outputs (``Scorer``), 0 where nothing changed."""

    family: str
    ratio: float
    removed: int
    channels: int
    accuracy: float
    divergence: float = math.nan


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
                labelled: bool = True, checkpoint: str | os.PathLike[str] | None = None, seed: int = 0,
                tell: Callable[[str], None] = lambda _: None) -> Sensitivity:
    """Remove the least important share of each family in turn, and measure top-1 accuracy on ``data``.

    data: (inputs, labels [N]) tensors, or batches of them. ratios: shares of a family's channels removed.
    families: globs of families or layers. tell: called with each family's name. labelled: False takes batches of inputs
    without labels (a tensor is cut into some): divergences are measured, accuracies are NaN. checkpoint: a file that
    every figure is written to; the same call goes on from it after a kill.
    Raises InputError (no data, or of another form), TargetError (a ratio outside (0, 1); a glob that matches
    nothing), and what ``trace`` raises.

    The network itself is run with channels masked, which the proof of slicing makes the same thing, so nothing
    is copied or cut. Source: Li et al., Pruning Filters for Efficient ConvNets (2017).
    """
    if data is None:
        raise InputError("sensitivity needs data, (inputs, labels) tensors or batches of them, to measure accuracy on.")
    batches = labelled_batches(data) if labelled else [(inputs, None) for inputs in unlabelled_batches(data)]
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise TargetError(f"ratios={ratio!r} is not a share in (0, 1) of a family's channels.")
    groups = groups or groups_of(model, batches[0][0] if example_inputs is None else example_inputs)
    own = batches if labelled else [inputs for inputs, _ in batches]
    scores = score(groups, criterion, batches=own if calibrate is None else calibrate, seed=seed)
    units = make_units(groups, scores.values)
    for pattern in families:
        if not groups.find(pattern):
            raise TargetError(f"families={pattern!r} matches nothing; there are: {', '.join(f.name for f in groups)}.")
    wanted = [f for f in groups if any(f.matches(p) for p in families)]
    scorer = Scorer(groups, batches)
    identity = {"model": model_digest(model), "graph": groups.fingerprint(), "criterion": str(criterion),
                "samples": scorer.samples, "labelled": labelled} if checkpoint is not None else {}
    notebook = Notebook(Path(checkpoint) if checkpoint is not None else None, "sensitivity", identity)
    points = []
    for family in wanted:
        tell(family.name)
        for ratio in ratios:
            keep = _without(groups, family, units, ratio)
            removed = int((~keep[family.groups]).sum())
            found = notebook.get(f"{family.name}@{ratio!r}", partial(scorer.score, keep))
            points.append(Point(family.name, ratio, removed, family.channels, *found))
    return Sensitivity(scorer.dense, tuple(points))


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


def unlabelled_batches(data: Any) -> list[Any]:
    """Inputs as a list of batches; one tensor is cut into some. Raises InputError where there is none."""
    found = list(data.split(256)) if isinstance(data, Tensor) else list(data)
    if not found:
        raise InputError("sensitivity needs data; there is no batch.")
    return found


class Scorer:
    """Accuracy and divergence of choices of groups, by running the network with channels masked.

    batches: (inputs, labels or None). The divergence of outputs [N, C] is the mean over rows of KL(p || q), of the
    untouched network's distribution p = softmax(outputs) from the masked one's, in nats (Kullback and Leibler, 1951);
    of other outputs it is the sum of squared differences over that of squares.
    """

    def __init__(self, groups: Groups, batches: Sequence[Any]) -> None:
        self.groups, self.batches = groups, batches
        self.tensors = {name: tensor.detach() for name, tensor in groups.graph.tensors.items()}
        self.original = [self._outputs(inputs, None) for inputs, _ in batches]
        self.samples = sum(len(outputs) for outputs in self.original)
        pairs = [(each, target) for each, (_, target) in zip(self.original, batches, strict=True) if target is not None]
        self.dense = sum(_right(*pair) for pair in pairs) / sum(target.numel() for _, target in pairs) if pairs \
            else math.nan

    def running(self, keep: Tensor) -> Iterator[tuple[int, float, float]]:
        """(samples, accuracy, divergence) so far, after each batch."""
        hook = masking(self.groups.labels, keep)
        count, diverged, right, labels = 0, 0.0, 0, 0
        for (inputs, target), original in zip(self.batches, self.original, strict=True):
            outputs = self._outputs(inputs, hook)
            diverged += divergence(original, outputs) * len(outputs)
            count += len(outputs)
            if target is not None:
                right, labels = right + _right(outputs, target), labels + target.numel()
            yield count, right / labels if labels else math.nan, diverged / count

    def score(self, keep: Tensor) -> tuple[float, float]:
        """(accuracy, divergence) on everything; accuracy is NaN without labels."""
        *_, (_, accuracy, diverged) = self.running(keep)
        return accuracy, diverged

    def _outputs(self, inputs: Any, hook: Any) -> Tensor:
        call = _call(inputs)
        with torch.no_grad():
            outputs = evaluate(self.groups.graph, self.tensors, call.args, call.kwargs, before=hook)
        return next(value for value in outputs if isinstance(value, Tensor))


def _right(outputs: Tensor, target: Tensor) -> int:
    return int((outputs.argmax(-1) == target).sum())


def divergence(original: Tensor, outputs: Tensor) -> float:
    """How far outputs are from the original ones; see ``Scorer``."""
    before, after = original.double(), outputs.double()
    if before.dim() == 2 and before.shape[1] > 1:
        p, q = before.log_softmax(1), after.log_softmax(1)
        return max(float((p.exp() * (p - q)).sum(1).mean()), 0.0)
    return float((after - before).square().sum() / before.square().sum().clamp(min=1e-30))


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
