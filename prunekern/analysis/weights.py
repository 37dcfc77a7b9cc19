"""What a network's weights are like: how many are where, how large they are, and what pruning left of them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.core.files import write_bytes
from prunekern.errors import InputError, ModelError
from prunekern.prune.sparse import Masks, masked, prunable
from prunekern.report import Figure, Report, Table, WeightRow

QUANTILES = (0.5, 0.9, 0.99)
BINS = 81
MOST = 1 << 24          # values that a quantile is taken over; of more, evenly spaced ones


@dataclass(frozen=True)
class LayerWeights:
    """One weight tensor as it is (``after``) and, where two networks were given, as it was (``before``).

    share: of all weights of the network. zeros_before, zeros: values that are exactly zero. mean, std, smallest,
    largest, magnitudes (the ``QUANTILES`` of the absolute values): over what is not zero; 0 where nothing is left.
    edges [bins + 1], counts_before, counts [bins]: histograms over one range, zeros left out.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    share: float
    zeros_before: int
    zeros: int
    mean: float
    std: float
    smallest: float
    largest: float
    magnitudes: tuple[float, ...]
    edges: tuple[float, ...]
    counts_before: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def sparsity(self) -> float:
        """The share of zeros, 0..1."""
        return self.zeros / self.weights


@dataclass(frozen=True)
class Weights:
    """Every weight tensor of a network. others: parameters that are not among them (biases, norms)."""

    layers: tuple[LayerWeights, ...]
    others: int
    compared: bool

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    def report(self, title: str = "Weights") -> Report:
        """Histograms and bars by layer, and a table; ``.save(folder)`` writes HTML, JSON and PNG."""
        names = ("layer", "shape", "weights", "of all", "zeros", "mean", "std", "smallest", "largest",
                 *(f"|w| {q:.0%}" for q in QUANTILES))
        rows: tuple[tuple[str | int | float | None, ...], ...] = tuple((
            layer.name, "×".join(map(str, layer.shape)), layer.weights, f"{layer.share:.1%}",
            f"{layer.sparsity:.2%}", layer.mean, layer.std, layer.smallest, layer.largest, *layer.magnitudes)
            for layer in self.layers)
        figures = (Figure("weights", self.weights, "params", f"in {len(self.layers)} tensors"),
                   Figure("zeros among them", self.zeros / self.weights, "fraction", f"{self.zeros:,}"),
                   Figure("other parameters", self.others, "params", "biases, norms"))
        return Report(title=title, headline=figures, weights=tuple(self.rows()),
                      tables=(Table("Values that are not zero", names, rows),))

    def rows(self) -> list[WeightRow]:
        """What the report draws."""
        return [WeightRow(layer.name, layer.weights, layer.zeros_before, layer.zeros, layer.edges, layer.counts_before,
                          layer.counts) for layer in self.layers]

    def plot(self, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
        """``weights.png`` (how many where) and ``histograms.png`` in ``folder``. Needs matplotlib."""
        from prunekern.report import plots

        try:
            files = plots.render(Report("Weights", weights=tuple(self.rows())))
        except ImportError as error:
            raise InputError("Weights.plot needs matplotlib: pip install 'prunekern[report]'.") from error
        return tuple(write_bytes(Path(folder) / name, content) for name, content in files.items())

    def to_json(self) -> dict[str, Any]:
        return {"others": self.others, "compared": self.compared, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        rows = [f"{layer.name:<{width}} {layer.weights:>12,} {layer.share:>7.1%} {layer.sparsity:>8.2%} "
                f"{layer.std:>9.3g} {layer.magnitudes[0]:>9.3g}" for layer in self.layers]
        head = f"{'layer':<{width}} {'weights':>12} {'of all':>7} {'zeros':>8} {'std':>9} {'|w| 50%':>9}"
        return "\n".join([head, *rows,
                          f"{'total':<{width}} {self.weights:>12,} {'':>7} {self.zeros / self.weights:>8.2%}"])


def weights_of(model: nn.Module, after: nn.Module | Masks | None = None, *, bins: int | None = None,
               layers: Sequence[str] | str = ("*",), ignore: Sequence[str] | str = ()) -> Weights:
    """Where a network's weights are and what values they have; with ``after``, also what became of them.

    after: the same network pruned or trained on, or masks for it. bins: of the histograms, which span the values of
    both; by default as many as so many weights give sense to, ``BINS`` at most. layers, ignore: globs of parameters or
    of what owns them.
    Raises ModelError (no weights, not finite ones, ``after`` of other shapes), TargetError, InputError (bins < 1).
    """
    if bins is not None and bins < 1:
        raise InputError(f"bins={bins}: pass at least 1.")
    found = prunable(model, layers, ignore)
    other = masked(model, after) if isinstance(after, Masks) else after
    later = prunable(other, layers, ignore) if other is not None else found
    for name, parameter in found.items():
        if name not in later or later[name].shape != parameter.shape:
            raise ModelError(f"{name} {tuple(parameter.shape)} is not in the second network, or of another shape; "
                             "compare networks of one structure (what slicing did is in the report of compress).")
    total = sum(parameter.numel() for parameter in found.values())
    rows = tuple(_layer(name, parameter.detach(), later[name].detach(), total, bins)
                 for name, parameter in found.items())
    everything = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return Weights(rows, sum(everything.values()) - total, other is not None)


def _layer(name: str, before: Tensor, after: Tensor, total: int, bins: int | None) -> LayerWeights:
    first, last = (_values(tensor) for tensor in (before, after))
    reach = max([float(part.abs().max()) for part in (first, last) if part.numel()], default=0.0) or 1.0
    some = bins or min(BINS, 2 * (math.isqrt(before.numel()) // 2) + 1)     # odd: one is around zero
    edges = torch.linspace(-reach, reach, some + 1, dtype=torch.float64)
    spread = (float(last.mean()), float(last.std(correction=0)), float(last.min()), float(last.max())) if last.numel() \
        else (0.0, 0.0, 0.0, 0.0)
    return LayerWeights(name, tuple(after.shape), after.numel(), after.numel() / total, before.numel() - first.numel(),
                        after.numel() - last.numel(), *spread, _quantiles(last.abs()), tuple(edges.tolist()),
                        _counts(first, edges), _counts(last, edges))


def _values(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).to("cpu", torch.float64)
    return flat[flat != 0]


def _counts(values: Tensor, edges: Tensor) -> tuple[int, ...]:
    found = torch.histc(values, len(edges) - 1, float(edges[0]), float(edges[-1])) if values.numel() \
        else torch.zeros(len(edges) - 1)
    return tuple(int(count) for count in found.tolist())


def _quantiles(values: Tensor) -> tuple[float, ...]:
    if not values.numel():
        return (0.0,) * len(QUANTILES)
    some = values[:: -(-values.numel() // MOST)]
    return tuple(float(q) for q in torch.quantile(some, torch.tensor(QUANTILES, dtype=some.dtype)))
