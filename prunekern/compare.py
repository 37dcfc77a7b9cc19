"""Channels against single weights: structured, unstructured and N:M pruning of one network, measured alike.

What is removed as whole channels makes the network smaller: its MACs vanish, its tensors shrink, it is faster. What is
removed as single weights leaves zeros that are multiplied with all the same; they make the file smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekern import train as training
from prunekern.analysis.latency import measure, synchroniser
from prunekern.backends import Lowered
from prunekern.backends import lower as lower_network
from prunekern.backends.known import select
from prunekern.cost import profile
from prunekern.errors import InputError, LoweringError, PrunekernError, TargetError
from prunekern.graph.inputs import Call, as_call, from_loader, infer
from prunekern.graph.parts import Parts, copied
from prunekern.graph.trace import check_model
from prunekern.prune.oneshot import prune
from prunekern.prune.recalibrate import recalibrate as recalibrate_norms
from prunekern.prune.semi_structured import unavailable
from prunekern.prune.sparse import Masks, Scope, magnitude, masked, nm, prunable
from prunekern.prune.sparse_file import Sizes, sizes
from prunekern.prune.target import Target
from prunekern.report import DENSE, Curve, Figure, LatencyRow, ParetoPoint, Report, Table
from prunekern.summary import environment
from prunekern.train.masks import fine_tune

Tell = Callable[[str], None]
FIT = {"epochs": 1, "lr": 0.01}
STRUCTURED, UNSTRUCTURED, NM = "structured", "unstructured", "N:M"
EXAMPLE_ROWS = 8        # of a loader's first batch
WEIGHED = ("conv", "linear", "addmm", "lstm", "gru", "rnn")       # operators whose multiplications read their weights


@dataclass(frozen=True)
class Contender:
    """One network. Accuracies: validation data right after pruning, then after training, then test data.

    macs: multiply-accumulates of one sample as the network stands; useful_macs: those of them whose weight is not zero.
    lowered_macs: what the lowered network does of them (None where it was not lowered). parameters, nonzero: of all
    parameters. sizes: bytes on disk, three ways. latency: median µs of a call of the lowered network.
    """

    name: str
    kind: str
    pruned_accuracy: float
    accuracy: float
    test_accuracy: float | None
    macs: int
    useful_macs: int
    lowered_macs: int | None
    parameters: int
    nonzero: int
    sizes: Sizes
    latency: float | None = None

    @property
    def run_macs(self) -> int:
        """What is carried out: by the lowered network, where there is one."""
        return self.macs if self.lowered_macs is None else self.lowered_macs

    @property
    def bytes(self) -> int:
        """On disk, in whichever of the three forms is smallest."""
        return min(self.sizes.dense, self.sizes.gzip, self.sizes.sparse)


@dataclass(frozen=True)
class Comparison:
    """All contenders, the original first; latencies were measured taking turns, at batch ``batch``."""

    contenders: tuple[Contender, ...]
    latency: tuple[LatencyRow, ...]
    batch: int
    notes: tuple[str, ...]

    def report(self) -> Report:
        """One report: accuracy against MACs and against bytes, the table, latencies. ``.save(folder)`` writes it."""
        dense = self.contenders[0]
        points = tuple(ParetoPoint(c.name, c.run_macs, c.accuracy, DENSE if c is dense else c.kind,
                                   detail=f"{c.macs - c.useful_macs:,} of {c.macs:,} MACs by zero")
                       for c in self.contenders)
        return Report(title="Channels against single weights", subtitle="pruned, trained and measured alike",
                      headline=self._headline(), pareto=points, curves=(self._curve(),), latency=self.latency,
                      tables=(self._table(),), notes=self.notes, environment=environment(),
                      accuracy_label="validation accuracy")

    def _headline(self) -> tuple[Figure, ...]:
        dense = self.contenders[0]
        found = [Figure("Original", dense.accuracy, "fraction", "validation accuracy")]
        for kind in (STRUCTURED, UNSTRUCTURED, NM):
            mine = [c for c in self.contenders if c.kind == kind]
            if mine:
                small = min(mine, key=lambda c: c.bytes)
                macs = small.run_macs / max(dense.run_macs, 1)
                share = f"{small.bytes / dense.bytes:.1%} of the bytes, {macs:.1%} of the MACs"
                found.append(Figure(f"Smallest {kind}", small.accuracy, "fraction", f"{small.name}: {share}"))
        return tuple(found)

    def _curve(self) -> Curve:
        series = {kind: tuple(sorted((c.bytes / 1000, c.accuracy) for c in self.contenders if c.kind == kind))
                  for kind in dict.fromkeys(c.kind for c in self.contenders)}
        return Curve("Accuracy against size on disk", "kB on disk", "validation accuracy", series, percent=True)

    def _table(self) -> Table:
        timed = any(c.latency is not None for c in self.contenders)
        tested = any(c.test_accuracy is not None for c in self.contenders)
        columns = ("network", "pruned", "trained", *(["test"] if tested else []), "MACs", "of these by zero",
                   "lowered MACs", "parameters", "not zero", "B dense", "B gzip", "B sparse",
                   *(["µs lowered"] if timed else []))
        rows = []
        for c in self.contenders:
            test = "" if c.test_accuracy is None else f"{c.test_accuracy:.2%}"
            rows.append((c.name, f"{c.pruned_accuracy:.2%}", f"{c.accuracy:.2%}", *([test] if tested else []), c.macs,
                         c.macs - c.useful_macs, c.lowered_macs, c.parameters, c.nonzero, c.sizes.dense, c.sizes.gzip,
                         c.sizes.sparse, *([c.latency] if timed else [])))
        return Table("Networks", columns, tuple(rows), "MACs of one sample. Those by zero are carried out like any "
                     "other, but where a whole channel has lost all its weights: lowering leaves it out. B: bytes "
                     "on disk.")

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(c), "bytes": c.bytes, "run_macs": c.run_macs} for c in self.contenders]
        return {"contenders": rows, "batch": self.batch, "latency": [asdict(row) for row in self.latency],
                "notes": list(self.notes)}

    def __str__(self) -> str:
        head = f"{'network':<28} {'accuracy':>9} {'MACs':>14} {'by zero':>14} {'run':>14} {'bytes':>12} {'µs':>9}"
        rows = [f"{c.name:<28} {c.accuracy:>9.2%} {c.macs:>14,} {c.macs - c.useful_macs:>14,} {c.run_macs:>14,} "
                f"{c.bytes:>12,} {'-' if c.latency is None else format(c.latency, '.1f'):>9}" for c in self.contenders]
        return "\n".join([head, *rows, *(f"note: {note}" for note in self.notes)])


def compare(model: nn.Module, example_inputs: Any = None, *, validate: Any, train: Any = None, test: Any = None,
            shares: Sequence[float] = (0.5, 0.25), sparsities: Sequence[float] = (0.5, 0.9),
            patterns: Sequence[tuple[int, int]] = ((2, 4),), scope: Scope = "layer", criterion: str = "l2",
            ignore: Sequence[str] | str = (), fit: Mapping[str, Any] | None = None, recalibrate: bool = False,
            lower: bool = True, backend: str = "auto", batch: int = 1, seconds: float = 1.0,
            checkpoint: str | Path | None = None, seed: int = 0, tell: Tell = lambda _: None) -> Comparison:
    """Prune one network as channels, as single weights, and N of M, and measure all of them in the same way.

    validate, train, test: data as for ``prunekern.train.fit``; every network is trained with the same ``fit`` options
    (default: 1 epoch, lr 0.01) on ``train`` where it is given, or has its batch-norm statistics estimated on it again
    (``recalibrate``), and has its accuracy taken by one function. Compare by ``validate``; ``test`` is reported only.
    shares: of the MACs, for structured pruning (``criterion``). sparsities: of the weights, for unstructured pruning by
    magnitude (``scope``). patterns: (N, M). ignore: globs of layers that the single weights of stay.
    lower: also lower every network, and time them taking turns (``batch``, ``seconds`` each).
    checkpoint: a folder; the same call continues trainings from it after a kill. The model is never modified.

    Raises ModelError, InputError, TraceError, TargetError, UnknownName, BackendUnavailable; a share that is out of
    reach and a network that cannot be lowered are notes.
    """
    check_model(model)
    if validate is None:
        raise InputError("compare needs validate= (data with labels) to measure accuracies on.")
    if recalibrate and train is None:
        raise InputError("recalibrate=True estimates batch-norm statistics on train=; pass it.")
    if lower and backend != "auto":
        select(backend)
    call = as_call(model, _example(model, example_inputs, validate))
    options = {**FIT, "progress": False, "seed": seed, **(fit or {})}
    work = _Work(model, call, validate, train, test, options, recalibrate,
                 Path(checkpoint) if checkpoint is not None else None, lower, backend, tell, [], {})
    found = [work.measured("original", "original", _copy(model), None, tune=False)]
    for share in shares:
        name = f"structured, {share:.4g} of the MACs"
        tell(name)
        try:
            pruned = prune(model, call, Target(macs=share), criterion=criterion, seed=seed,
                           calibrate=None if train is None else training.passes(train, 256))
        except TargetError as error:
            work.notes.append(f"{name}: {error}")
            continue
        found.append(work.measured(name, STRUCTURED, pruned.model, None))
    for share in sparsities:
        name = f"unstructured, {share:.4g} zeros"
        tell(name)
        found.append(work.masked(name, UNSTRUCTURED, magnitude(model, share, scope=scope, ignore=ignore)))
    for n, m in patterns:
        tell(f"{n}:{m}")
        found.append(work.masked(f"{n}:{m}", NM, nm(model, n, m, ignore=ignore)))
    rows = work.timed(batch, seconds)
    median = {row.contender: row.p50 for row in rows}
    timed = tuple(Contender(**{**vars(c), "latency": median.get(c.name)}) for c in found)
    return Comparison(timed, tuple(rows), batch, tuple(work.notes))


@dataclass
class _Work:
    """What all contenders share."""

    model: nn.Module
    call: Call
    validate: Any
    train: Any
    test: Any
    fit: dict[str, Any]
    recalibrate: bool
    checkpoint: Path | None
    lower: bool
    backend: str
    tell: Tell
    notes: list[str]
    lowered: dict[str, Lowered]

    def masked(self, name: str, kind: str, masks: Masks) -> Contender:
        self.notes += [f"{name}: {note}" for note in masks.notes]
        if (kind, name) == (NM, "2:4"):
            why = unavailable(next(self.model.parameters()).device)
            self.notes += [f"2:4 was not run on sparse tensor cores: {why}"] if why is not None else []
        return self.measured(name, kind, masked(self.model, masks), masks)

    def measured(self, name: str, kind: str, model: nn.Module, masks: Masks | None, tune: bool = True) -> Contender:
        """A network of its own, trained where there is data for it, and everything about it but its latency."""
        model.eval()
        if tune and self.recalibrate:
            recalibrate_norms(model, training.passes(self.train, 256))
        pruned = trained = self._accuracy(model, self.validate)
        if tune and self.train is not None and self.fit["epochs"]:
            self.tell(f"{name}: train")
            self._tune(name, model, masks)
            trained = self._accuracy(model, self.validate)
        test = None if self.test is None else self._accuracy(model, self.test)
        macs, useful = _macs(model, self.call)
        lowered = self._lowered(name, model) if self.lower else None
        parameters = list(model.parameters())
        return Contender(name, kind, pruned, trained, test, macs, useful,
                         None if lowered is None else lowered.program.macs(lowered.program.batch or 1),
                         sum(p.numel() for p in parameters), sum(int(torch.count_nonzero(p)) for p in parameters),
                         sizes(model))

    def _accuracy(self, model: nn.Module, data: Any) -> float:
        return training.accuracy(model, data, batch_size=256)

    def _tune(self, name: str, model: nn.Module, masks: Masks | None) -> None:
        options = dict(self.fit)
        if self.checkpoint is not None:
            slug = "".join(c if c.isalnum() else "-" for c in name)
            options["checkpoint"] = self.checkpoint / f"{slug}.ckpt"
        if masks is None:
            training.fit(model, self.train, **options)
        else:
            fine_tune(model, masks, self.train, **options)

    def _lowered(self, name: str, model: nn.Module) -> Lowered | None:
        try:
            self.lowered[name] = lower_network(model, self.call, backend=self.backend)
        except LoweringError as error:
            self.notes.append(f"{name} was not lowered: {error}")
        return self.lowered.get(name)

    def timed(self, batch: int, seconds: float) -> list[LatencyRow]:
        if not self.lowered:
            return []
        self.tell("latencies, taking turns")
        call = self.call.resized(batch)
        try:
            rows = measure({name: _runner(lowered, call) for name, lowered in self.lowered.items()}, seconds=seconds,
                           synchronise=synchroniser(next(self.model.parameters()).device))
        except PrunekernError as error:
            self.notes.append(f"no latencies at batch {batch}: {error}")
            return []
        first = rows[0]
        return [LatencyRow(row.name, batch, row.p20, row.p50, row.p80, first.p50 / row.p50, first.name) for row in rows]


def _runner(lowered: Lowered, call: Call) -> Callable[[], object]:
    return lambda: lowered(*call.args, **call.kwargs)


def _copy(model: nn.Module) -> nn.Module:
    made = copied(model, {})
    return model if isinstance(made, Parts) else made


def _example(model: nn.Module, given: Any, data: Any) -> Any:
    if given is not None:
        return given
    try:
        call = as_call(model, from_loader(training.passes(data, EXAMPLE_ROWS)))
    except InputError:
        return infer(model)
    return call.resized(min(call.batch or 1, EXAMPLE_ROWS))


def _macs(model: nn.Module, call: Call) -> tuple[int, int]:
    """(MACs of one sample, those of them whose weight is not zero)."""
    found = profile(model, call.resized(1))
    owned: dict[str, list[nn.Parameter]] = {}
    for name, parameter in prunable(model, finite=False).items():
        owned.setdefault(name.rpartition(".")[0], []).append(parameter)
    useful = 0.0
    for layer in found.layers:
        mine = owned.get(layer.module, []) if any(word in layer.op for word in WEIGHED) else []
        total = sum(p.numel() for p in mine)
        useful += layer.cost.macs * (sum(int(torch.count_nonzero(p)) for p in mine) / total if total else 1.0)
    return found.macs, round(useful)
