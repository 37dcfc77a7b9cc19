"""How much accuracy each layer's single weights carry: one layer at a time sparser and sparser, and what to make of it.

The unstructured sibling of ``analysis/sensitivity.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.analysis.sensitivity import labelled_batches
from prunekern.core.files import write_bytes, write_text
from prunekern.errors import ArtefactError, InputError, ModelError, TargetError
from prunekern.graph.parts import Parts, copied
from prunekern.prune.sparse import Masks, imposed, magnitude, prunable
from prunekern.report import Curve, Figure, Report, Table

FORMAT, VERSION = "prunekern-sparsity-scan", 1
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
LINES = 6               # layers in one chart
ROUNDS = 8              # of bisection, each way
Measure = Callable[[nn.Module], float]


@dataclass(frozen=True)
class SparsePoint:
    """Accuracy with ``removed`` of ``weights`` weights of one layer gone, nothing else touched."""

    layer: str
    sparsity: float
    removed: int
    weights: int
    accuracy: float


@dataclass(frozen=True)
class SparsityScan:
    """All points, and the accuracy of the untouched network."""

    dense: float
    points: tuple[SparsePoint, ...]

    def curves(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """Layer -> (sparsity, accuracy), from the untouched network on."""
        found: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            found.setdefault(point.layer, [(0.0, self.dense)]).append((point.sparsity, point.accuracy))
        return {layer: tuple(sorted(points)) for layer, points in found.items()}

    def within(self, points: float) -> dict[str, float]:
        """Layer -> the largest sparsity at which that layer alone costs at most so many points of accuracy.

        Between what was measured the accuracy runs in straight lines; beyond it nothing is known, so the largest
        sparsity that was measured is the most. What all layers together cost is another question: see ``choose``.
        """
        floor = self.dense - points / 100
        return {layer: _reach(curve, floor) for layer, curve in self.curves().items()}

    def tolerated(self, at: float) -> dict[str, float]:
        """Layer -> sparsity. at: up to 1/2 a share of what costs nothing, then tolerances up to the worst that was
        measured at 1, finer where they are small."""
        worst = max([0.0, *(self.dense - point.accuracy for point in self.points)])
        found = self.within(100 * worst * max(0.0, 2 * at - 1) ** 3)
        return {layer: min(2 * at, 1.0) * share for layer, share in found.items()}

    def cheapest(self, at: float) -> dict[str, float]:
        """Layer -> sparsity, with the share ``at`` of all zeros that were measured at most: those that cost the least
        accuracy each, along the lower convex hull of every layer's drops."""
        weights = {point.layer: point.weights for point in self.points}
        steps = sorted(((cost, layer, length) for layer, curve in self.curves().items()
                        for cost, length in _hull([(weights[layer] * s, self.dense - a) for s, a in curve])),
                       key=lambda step: step[0])
        left = at * sum(length for _, _, length in steps)
        found = dict.fromkeys(weights, 0.0)
        for _, layer, length in steps:
            taken = min(length, left)
            left -= taken
            found[layer] += taken / weights[layer]
        return {layer: min(share, max(p.sparsity for p in self.points if p.layer == layer))
                for layer, share in found.items()}

    def report(self, title: str = "Sensitivity to sparsity", samples: str = "") -> Report:
        """Charts of some layers each and a table; ``.save(folder)`` writes HTML, JSON and PNG."""
        curves, names = self.curves(), list(self.curves())
        charts = tuple(Curve(f"Layers {first + 1} to {min(first + LINES, len(names))} of {len(names)}", "sparsity",
                             "accuracy", {name: curves[name] for name in names[first:first + LINES]}, percent=True)
                       for first in range(0, len(names), LINES))
        shares = sorted({point.sparsity for point in self.points})
        weights = {point.layer: point.weights for point in self.points}
        rows = tuple((name, weights[name], *(f"{dict(curves[name])[s]:.2%}" if s in dict(curves[name]) else None
                                             for s in shares)) for name in names)
        table = Table("Layers", ("layer", "weights", *(f"{s:.4g}" for s in shares)), rows)
        return Report(title=title, subtitle=f"accuracy{samples} with the smallest weights of one layer at zero",
                      headline=(Figure("accuracy, untouched", self.dense, "fraction"), Figure("layers", len(names))),
                      curves=charts, tables=(table,))

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """The charts as one PNG at ``path``. Needs matplotlib."""
        from prunekern.report import plots

        try:
            return write_bytes(path, plots.render(self.report())["curves.png"])
        except ImportError as error:
            raise InputError("SparsityScan.plot needs matplotlib: pip install 'prunekern[report]'.") from error

    def to_json(self) -> dict[str, Any]:
        return {"dense": self.dense, "points": [asdict(point) for point in self.points]}

    def __str__(self) -> str:
        shares = sorted({p.sparsity for p in self.points})
        rows = [f"{'layer':<32} {'weights':>10} " + " ".join(f"{s:>7.4g}" for s in shares)
                + f"   accuracy at that sparsity; untouched {self.dense:.2%}"]
        weights = {point.layer: point.weights for point in self.points}
        for name, curve in self.curves().items():
            mine = dict(curve)
            rows.append(f"{name:<32} {weights[name]:>10} " + " ".join(
                f"{mine[s]:>7.2%}" if s in mine else f"{'-':>7}" for s in shares))
        return "\n".join(rows)


def _reach(curve: Sequence[tuple[float, float]], floor: float) -> float:
    reached = 0.0
    for (start, high), (end, low) in pairwise(curve):
        if low < floor:                 # the first time: what recovers later by luck does not count
            return start + (end - start) * (high - floor) / (high - low) if high > floor else start
        reached = end
    return reached


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(drop per zero, zeros) of each edge of the lower convex hull of drops over zeros; ever steeper."""
    worst, hull = 0.0, [(0.0, 0.0)]
    for zeros, drop in points[1:]:
        worst = max(worst, drop)
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (zeros - hull[-1][0]) >= \
                (worst - hull[-1][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((zeros, worst))
    return [((b - a) / (end - start), end - start) for (start, a), (end, b) in pairwise(hull)]


def sparsity_scan(model: nn.Module, data: Any, *, sparsities: Sequence[float] = SPARSITIES,
                  layers: Sequence[str] | str = ("*",), ignore: Sequence[str] | str = (),
                  checkpoint: str | os.PathLike[str] | None = None,
                  tell: Callable[[str], None] = lambda _: None) -> SparsityScan:
    """Set the smallest weights of one layer after the other to zero, and measure top-1 accuracy each time.

    data: (inputs, labels [N]) tensors, batches of them, or a function of the model that returns an accuracy.
    sparsities: shares of a layer's weights. layers, ignore: globs of parameters or of what owns them. It takes one pass
    over the data for every layer and sparsity. checkpoint: a file that every accuracy is written to; the same call goes
    on from it after a kill, and one with more layers or sparsities adds to it. tell: called with each layer's name.
    The model is copied, not modified.

    Raises InputError (no data, or of another form), TargetError (a share outside (0, 1); a glob that matches nothing),
    ModelError, ArtefactError (checkpoint damaged, or of another model or other data).
    Source: Han et al., Learning both Weights and Connections (NeurIPS 2015), figure 6.
    """
    for share in sparsities:
        if not 0 < share < 1:
            raise TargetError(f"sparsities={share!r} is not a share in (0, 1) of a layer's weights.")
    names = list(prunable(model, layers, ignore))
    with _measured(model, data) as (made, measure, seen):
        store = _Store(Path(checkpoint) if checkpoint is not None else None, _identity(made, seen))
        dense = store.get("", 0.0, lambda: measure(made))
        points: list[SparsePoint] = []
        for number, name in enumerate(names, 1):
            tell(f"{name} ({number}/{len(names)})")
            for share in sparsities:
                masks = magnitude(made, share, layers=name)

                def sparser(masks: Masks = masks) -> float:
                    with imposed(made, masks):
                        return measure(made)
                points.append(SparsePoint(name, float(share), masks.zeros, masks.weights,
                                          store.get(name, float(share), sparser)))
    return SparsityScan(dense, tuple(points))


@dataclass(frozen=True)
class ChosenSparsities:
    """Sparsities for all layers together. tried: (share of all weights that was gone, accuracy) of each attempt."""

    sparsities: Mapping[str, float]
    masks: Masks
    accuracy: float
    dense: float
    tried: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return (f"{self.masks.sparsity:.2%} of the weights gone, accuracy {self.accuracy:.2%} "
                f"(untouched {self.dense:.2%})\n{self.masks}")


def choose(model: nn.Module, scan: SparsityScan, data: Any, max_drop: float, *,
           tell: Callable[[str], None] = lambda _: None) -> ChosenSparsities:
    """The sparsest network along the scan that loses at most ``max_drop`` points of accuracy on ``data``, measured.

    The scan says what a layer costs alone; what all of them cost together is measured, for two ways to share out zeros,
    each bisected: what every layer bears at one common tolerance (``SparsityScan.within``; scaled down, where even
    layers that lose nothing alone lose too much together), and the zeros that cost least accuracy each, whichever
    layer they are of (``SparsityScan.cheapest``). The sparser network of all that were good enough is taken.
    data: as for ``sparsity_scan``; pass validation data. No training happens in between, so with fine-tuning to follow
    a larger drop is in order. Raises InputError, TargetError for a ``max_drop`` below 0, ModelError.
    """
    if not 0 <= max_drop < math.inf:
        raise TargetError(f"max_drop={max_drop!r}: pass the points of accuracy that may be lost, 0 or more.")
    tried: list[tuple[float, float]] = []
    with _measured(model, data) as (made, measure, _):
        dense = measure(made)
        none = dict.fromkeys(scan.curves(), 0.0)
        best = none, magnitude(made, none), dense

        def attempt(shares: dict[str, float]) -> bool:
            nonlocal best
            masks = magnitude(made, shares)
            with imposed(made, masks):
                accuracy = measure(made)
            tell(f"{masks.sparsity:.1%} of the weights gone: {accuracy:.2%}")
            tried.append((masks.sparsity, accuracy))
            if accuracy < dense - max_drop / 100 - 1e-12:
                return False
            best = max(best, (shares, masks, accuracy), key=lambda item: item[1].zeros)
            return True
        if not attempt(scan.cheapest(1.0)):
            for allot in (scan.tolerated, scan.cheapest):
                low, high = 0.0, 1.0
                for _round in range(ROUNDS):
                    middle = (low + high) / 2
                    low, high = (middle, high) if attempt(allot(middle)) else (low, middle)
    shares, masks, accuracy = best
    return ChosenSparsities(shares, masks, accuracy, dense, tuple(tried))


# ---- measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def _measured(model: nn.Module, data: Any) -> Iterator[tuple[nn.Module, Measure, list[Any] | None]]:
    """(a copy in eval mode, what measures it, the batches)."""
    made = copied(model, {})
    if isinstance(made, Parts):
        raise ModelError(f"{made.why}; a scan works on a copy. Make the model copyable (copy.deepcopy).")
    made.eval()
    if callable(data) and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        yield made, lambda module: _checked(data(module)), None
        return
    if data is None:
        raise InputError("a sparsity scan needs data, (inputs, labels) tensors or batches of them, or a function of "
                         "the model, to measure accuracy with.")
    batches = labelled_batches(data)
    yield made, lambda module: _accuracy(module, batches), batches


def _checked(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"the evaluator returned {value!r}, expected an accuracy from 0 to 1.")
    return float(value)


def _accuracy(model: nn.Module, batches: Sequence[Any]) -> float:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right = count = 0
    with torch.no_grad():
        for inputs, target in batches:
            value = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs)
            output = model(**value) if isinstance(value, dict) else \
                model(*value) if isinstance(value, (tuple, list)) else model(value)
            found = getattr(output, "logits", output)
            scores: Tensor = found[0] if isinstance(found, (tuple, list)) else found
            right += int((scores.argmax(1) == target.to(device)).sum())
            count += target.numel()
    return right / max(count, 1)


# ---- resuming --------------------------------------------------------------------------------------------------------


def _identity(model: nn.Module, batches: list[Any] | None) -> dict[str, str]:
    """What accuracies depend on: the weights, and the data where they are not hidden in a function."""
    data = "a function" if batches is None else _digest(enumerate(batches))
    return {"model": _digest(model.state_dict().items()), "data": data}


def _digest(pairs: Any) -> str:
    digest = hashlib.sha256()
    for name, value in pairs:
        for leaf in torch.utils._pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                digest.update(f"{name}|{tuple(leaf.shape)}|{leaf.dtype}".encode())
                flat = leaf.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


class _Store:
    """Accuracies by layer and sparsity, each on disk as soon as it is known."""

    def __init__(self, path: Path | None, identity: Mapping[str, str]) -> None:
        self.path, self.identity = path, dict(identity)
        self.known: dict[str, float] = {}
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            kind, own = (found["format"], found["version"]), found["identity"]
            known = {str(key): float(value) for key, value in found["accuracies"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"scan checkpoint {path} is damaged ({type(error).__name__}: {error}). Delete it to "
                                "start from the beginning.") from error
        if kind != (FORMAT, VERSION):
            raise ArtefactError(f"{path} is no scan checkpoint of this version ({kind}); name another file.")
        wrong = [key for key, value in self.identity.items() if own.get(key) != value]
        if wrong:
            raise ArtefactError(f"scan checkpoint {path} was made with another {' and other '.join(wrong)}; pass the "
                                "same, or delete the file.")
        self.known = known

    def get(self, layer: str, share: float, make: Callable[[], float]) -> float:
        key = f"{layer}@{share!r}"
        if key not in self.known:
            self.known[key] = make()
            if self.path is not None:
                write_text(self.path, json.dumps({"format": FORMAT, "version": VERSION, "identity": self.identity,
                                                  "accuracies": self.known}, indent=1))
        return self.known[key]
