"""What of a network can be pruned, what cannot, and why: the facts behind ``prunekern doctor``."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunekern.core.graph import owner, place, source, target_name
from prunekern.core.labels import FIXED, Frozen, Plane, Planes, Tape, compact
from prunekern.errors import PrunekernError
from prunekern.graph.bake import labelled
from prunekern.graph.groups import Groups, find_groups
from prunekern.graph.labels import label
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.prune.oneshot import prune
from prunekern.prune.target import SHARES, Meter, Target
from prunekern.prune.units import make_units
from prunekern.report import Figure, Report, Table

TRIAL = 0.5     # share of every family's channels that the trial plan keeps


@dataclass(frozen=True)
class Layer:
    """One contraction. channels: those it issues; free: how many of them can go. macs, params: its shares of
    the network, in 0..1. families: those its channels belong to. why: what holds the others, '' where none is."""

    name: str
    op: str
    channels: int
    free: int
    macs: float
    params: float
    families: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class FamilyRow:
    """Channels that leave together, one from each member. modules: the members in short. macs: share of the
    layers that issue them."""

    name: str
    channels: int
    layers: tuple[str, ...]
    members: tuple[str, ...]
    modules: tuple[str, ...]
    macs: float


@dataclass(frozen=True)
class Blocker:
    """An operator that holds channels back. source: file and line of the user's code, '' where unknown."""

    module: str
    op: str
    reason: str
    source: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Channels that come in rows. kind: 'balanced' (as many must leave each row), 'heads' (a row leaves as a
    whole), 'attention' (heads of an attention operator). free: how many rows or, where balanced, channels of
    a row can go."""

    kind: str
    where: str
    rows: int
    size: int
    free: int

    def __str__(self) -> str:
        shape = f"{self.where}: {self.rows} rows of {self.size}"
        if self.kind == "attention":
            shape = f"{self.where}: {self.rows} heads of width {self.size}"
        if not self.free:
            return f"{shape}, all stay"
        rule = "as many from each row" if self.kind == "balanced" else "whole rows only"
        return f"{shape}, {rule}"


@dataclass(frozen=True)
class Trial:
    """A plan that keeps half of every family, carried out and proven. form: what would be returned, 'class' or
    'graph'; '' where it failed. why: the reason for another form than the class, or for the failure."""

    form: str
    why: tuple[str, ...]
    costs: Mapping[str, tuple[int, int]]
    proof: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``prunekern doctor`` says. minimum: the shares left with one unit in every family."""

    model: str
    layers: tuple[Layer, ...]
    families: tuple[FamilyRow, ...]
    blockers: tuple[Blocker, ...]
    rows: tuple[Rows, ...]
    minimum: Mapping[str, float]
    trial: Trial | None
    notes: tuple[str, ...]

    @property
    def free(self) -> float:
        """The share of MACs in layers whose own channels can go, wholly or in part."""
        return sum(layer.macs for layer in self.layers if layer.free)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; shares are in 0..1."""
        return {"format": "prunekern-diagnosis", "version": 1, **asdict(self), "free": self.free}

    def __str__(self) -> str:
        text = io.StringIO()
        self.show(file=text)
        return text.getvalue().rstrip("\n")

    def show(self, *, file: TextIO | None = None) -> None:
        """Print as tables, with rich where it is installed."""
        self.report().show(full=True, file=file)

    def report(self) -> Report:
        """The same as a report, which can be shown and saved (HTML, JSON)."""
        layers = tuple((r.name, r.op, r.channels or None, r.free if r.channels else None, f"{r.macs:6.1%}",
                        f"{r.params:6.1%}", r.why) for r in self.layers)
        families = tuple((f.name, f.channels, f"{f.macs:6.1%}", _listed(f.modules, 8)) for f in self.families)
        blockers = tuple((b.module, b.op.removeprefix("aten."), _short(b.source), b.reason, _listed(b.layers))
                         for b in self.blockers)
        tables = [Table("Layers", ("layer", "operator", "channels", "can go", "MACs", "params", "what stays, and why"),
                        layers),
                  Table("Families: a channel leaves every module at once",
                        ("family", "channels", "MACs", "modules"), families),
                  Table("Blockers", ("where", "operator", "source", "reason", "layers held back"), blockers),
                  Table("Rows and heads", ("what",), tuple((str(row),) for row in self.rows))]
        return Report(title=f"{self.model}: what can be pruned", subtitle=self._verdict(),
                      headline=tuple(self._headline()), tables=tuple(t for t in tables if t.rows), notes=self.notes)

    def _verdict(self) -> str:
        if not self.families:
            return "nothing can be pruned; see what stays, and why"
        return f"{len(self.families)} families of channels, {sum(f.channels for f in self.families)} channels in all"

    def _headline(self) -> Iterator[Figure]:
        yield Figure("layers that can shrink", self.free, "fraction", "of the MACs")
        if self.minimum:
            least = ", ".join(f"{_UNITS[name]} {share:.2%}" for name, share in self.minimum.items())
            yield Figure("smallest reachable", "one channel each", detail=f"{least} left")
        if self.trial is None:
            return
        if not self.trial.form:
            yield Figure("trial: half of each family", "FAILED", detail="; ".join(self.trial.why))
            return
        left = ", ".join(f"{_UNITS[name]} {after / before:.1%}"
                         for name, (before, after) in self.trial.costs.items() if before)
        form = "your own class" if self.trial.form == "class" else "rewritten graph"
        yield Figure("trial: half of each family", form, detail="; ".join((f"{left} left", *self.trial.why)))


_UNITS = {"macs": "MACs", "params": "parameters", "bytes": "bytes"}


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- finding out -------------------------------------------------------------------------------------------


def diagnose(model: nn.Module, example_inputs: Any = None, *, trial: bool = True, seed: int = 0) -> Diagnosis:
    """What of a model can be pruned and what cannot, each blocker with its source line. The model is only read.

    example_inputs: one batch as a tensor, tuple or dict. trial: also cut half of every family on a copy and
    prove it, to tell which form (the user's class or a rewritten graph module) would come back and why.
    Raises what ``trace`` raises; a failing trial is part of the diagnosis.
    """
    graph = labelled(trace(model, example_inputs), REGISTRY).graph
    witness = _Witness(graph)
    labels = label(graph, REGISTRY, tape=witness)
    groups = find_groups(labels)
    scene = _Scene(groups, witness)
    blockers = tuple(scene.blockers())
    families = tuple(_family(family, scene) for family in groups)
    minimum: dict[str, float] = {}
    if groups.families:
        meter = Meter(groups)
        units = make_units(groups, torch.zeros(labels.groups, dtype=torch.float64))
        least = meter.of(~units.removed(~units.last))
        minimum = {name: least[name] / meter.whole[name] for name in SHARES if meter.whole[name]}
    return Diagnosis(type(model).__name__, scene.layers, families, blockers, tuple(scene.rows()), minimum,
                     _trial(model, groups, seed) if trial and groups.families else None, graph.notes)


def _family(family: Any, scene: _Scene) -> FamilyRow:
    return FamilyRow(family.name, family.channels, family.layers, tuple(map(str, family.members)), family.modules,
                     sum(layer.macs for layer in scene.layers if family.name in layer.families))


def _trial(model: nn.Module, groups: Groups, seed: int) -> Trial:
    try:
        found = prune(model, None, Target(layers={"*": TRIAL}), groups=groups, seed=seed)
    except PrunekernError as error:
        return Trial("", (f"{type(error).__name__}: {error}",), {})
    proof = found.proof
    why = proof.notes or (() if proof.form == "class" else ("no copy of the class could be sliced",))
    return Trial(proof.form, why, dict(found.plan.costs), str(proof))


class _Witness(Tape):
    """A tape that remembers every freeze, natural ones too, and the nodes at which channels form rows."""

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        self.freezes: list[Frozen] = []
        self.meets: list[tuple[fx.Node, Tensor]] = []

    def freeze(self, node: fx.Node, labels: Tensor, reason: str = "") -> None:
        super().freeze(node, labels, reason)
        self.freezes.append(Frozen(node, reason, compact(labels).reshape(-1).unique()))

    def settle(self, node: fx.Node, planes: Iterable[Plane]) -> Planes:
        before = len(self.joint)
        kept = super().settle(node, planes)
        self.meets += [(node, table) for table in self.joint[before:]]
        return kept


class _Scene:
    """The labelled graph, and the tape it was labelled on, brought together."""

    def __init__(self, groups: Groups, tape: _Witness) -> None:
        self.groups, self.labels, self.graph, self.tape = groups, groups.labels, groups.graph, tape
        pairs = torch.cat([edges.reshape(2, -1) for edges in tape.edges], 1) if tape.edges else torch.zeros(2, 0).long()
        self.component = _components(pairs, tape.count)
        # Without the edges to what stays: what would leave together if nothing held it.
        self.loose = _components(pairs[:, (pairs != FIXED).all(0)], tape.count)
        self.family_of = np.full(self.labels.groups, -1)
        for number, family in enumerate(groups):
            self.family_of[family.groups.numpy()] = number
        self.outputs = self._loose_of(node for node in pytree.tree_leaves(list(self.graph.output.args)))
        self._held: dict[tuple[str, str], np.ndarray] = {}
        self.layers = tuple(self._layers())

    def _layers(self) -> Iterator[Layer]:
        batch = 1 if self.graph.free_batch else self.graph.batch
        shape = self.graph.shapes(batch)
        calls: dict[tuple[str, str], list[fx.Node]] = {}
        macs: dict[fx.Node, int] = {}
        for node in self.graph.nodes:
            rule = REGISTRY.find(node.target) if node.op == "call_function" else None
            if rule is not None and (found := _macs(rule, node, shape)):
                macs[node] = found
                name = owner(node)[0] or self._weight(node) or node.name
                calls.setdefault((name, target_name(node)), []).append(node)
        all_macs = sum(macs.values()) or 1
        state: set[str | None] = {name for name, t in self.graph.tensors.items() if isinstance(t, nn.Parameter)}
        sizes = {name: tensor.numel() for name, tensor in self.graph.tensors.items() if name in state}
        all_params = sum(sizes.values()) or 1
        seen: set[str | None] = set()
        for (name, op), nodes in calls.items():
            read = {self.graph.fqn(arg) for node in nodes for arg in node.all_input_nodes}
            own = (read & state) - seen
            seen |= own
            raw = self._channels(nodes[0])
            fixed = self.component[raw] == self.component[FIXED]
            held = np.unique(self.loose[raw[fixed]])
            self._held[name, op] = held
            names = self._families_of(nodes[0])
            yield Layer(name, op.removeprefix("aten."), len(raw), int((~fixed).sum()),
                        sum(macs[node] for node in nodes) / all_macs,
                        sum(sizes[name] for name in own if name) / all_params, names,
                        self._why(held) if len(raw) else "has no channels of its own")

    def _weight(self, node: fx.Node) -> str:
        return next((name for arg in node.all_input_nodes if (name := self.graph.fqn(arg))), "")

    def _channels(self, node: fx.Node) -> np.ndarray:
        """The labels of the channels that a contraction issues."""
        planes = self.tape.memory.get(node, ())
        flat = [compact(p).reshape(-1) for p in (itertools.chain.from_iterable(planes) if isinstance(planes, list)
                                                 else planes)]
        return torch.cat(flat).unique().numpy() if flat else np.zeros(0, dtype=np.int64)

    def _families_of(self, node: fx.Node) -> tuple[str, ...]:
        numbers: set[int] = set()
        live = self.labels.live.get(node, ())
        for _, groups in itertools.chain.from_iterable(live) if isinstance(live, list) else live:
            numbers |= set(np.unique(self.family_of[groups.numpy()]).tolist())
        return tuple(self.groups.families[n].name for n in sorted(numbers - {-1}))

    def _loose_of(self, nodes: Iterable[Any]) -> np.ndarray:
        raw = [self._channels(node) for node in nodes if isinstance(node, fx.Node)]
        return np.unique(self.loose[np.concatenate([*raw, np.zeros(0, dtype=np.int64)])])

    def _why(self, held: np.ndarray) -> str:
        """Why channels stay: blockers, else the network's output, else sizes that are given."""
        if not len(held):
            return ""
        hits = [f for f in self.tape.freezes if np.isin(self.loose[f.labels.numpy()], held).any()]
        found = [f"{target_name(f.node).removeprefix('aten.')} at {_at(f.node)}" for f in hits if f.reason]
        if np.isin(held, self.outputs).any():
            found.append("output of the network")
        if not found:
            found = [f"its size is given at {_at(f.node)}" for f in hits]
        found = list(dict.fromkeys(found))
        return found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")

    def blockers(self) -> Iterator[Blocker]:
        grouped: dict[tuple[str, str, str, str], list[np.ndarray]] = {}
        for freeze in self.tape.freezes:
            if freeze.reason:
                node = freeze.node
                key = owner(node)[0] or node.name, target_name(node), freeze.reason, source(node)
                grouped.setdefault(key, []).append(self.loose[freeze.labels.numpy()])
        for (module, op, reason, line), parts in grouped.items():
            held = np.concatenate(parts)
            layers = tuple(dict.fromkeys(name for (name, _), mine in self._held.items() if np.isin(mine, held).any()))
            yield Blocker(module, op, reason, line, layers)

    def rows(self) -> Iterator[Rows]:
        """Balanced rows of grouped convolutions, rows that leave as a whole, and heads of attention operators."""
        for key, table in self.labels.axes.items():
            if table.dim() == 2 and key in {*self.labels.produced, *self.labels.consumed}:
                free = int((table != FIXED).any(0).sum())
                where = f"{key[0].rpartition('.')[0] or key[0]} (grouped)"
                yield Rows("balanced", where, table.shape[0], table.shape[1], free)
        told: set[bytes] = set()
        for node, table in self.tape.meets:
            group = self.component[table.numpy()]
            if group.ndim == 2 and (seen := np.unique(group).tobytes()) not in told:
                told.add(seen)
                loose = int((group != self.component[FIXED]).all(1).sum())
                if loose and all(len(np.unique(row)) == 1 for row in group) and len(np.unique(group)) > 1:
                    yield Rows("heads", place(node), group.shape[0], group.shape[1], loose)
        for node in self.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                query: Any = node.args[0]
                shape, live = self.graph.shape(query), self.labels.live.get(query, ())
                axis = len(shape) - 3
                free = max((int((g != FIXED).sum()) for a, g in live if a == axis), default=0)
                yield Rows("attention", place(node), shape[-3] if axis >= 0 else 1, shape[-1], free)


def _at(node: fx.Node) -> str:
    """The line of the user's code behind a node, short; where the trace does not know it, the module."""
    return source(node).rpartition("/")[2] or repr(owner(node)[0] or node.name)


def _short(line: str) -> str:
    here = os.getcwd() + os.sep
    return line.removeprefix(here)


def _macs(rule: Any, node: fx.Node, shape: Any) -> int:
    try:
        return int(rule.macs(node, shape))
    except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
        return 0            # the profile names it as uncounted


def _components(pairs: Tensor, count: int) -> np.ndarray:
    left, right = pairs.numpy()
    matrix = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    return np.asarray(connected_components(matrix, directed=False)[1])
