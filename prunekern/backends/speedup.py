"""What pruning was to gain, layer by layer, beside what it gained; and where the two differ, why.

A layer with half the multiply-accumulates should take half the time. Where it takes another share, one of a few facts
is to blame, and all of them can be read off the two explanations: what was measured, and the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prunekern.backends.explain import WITHIN, Explanation, Row
from prunekern.backends.lowered import Lowered
from prunekern.backends.roofline import Roof
from prunekern.errors import InputError

SAME = 0.15             # realised may differ from predicted by this share without there being a cause to look for
OVERHEAD = 3            # times the quickest step of the network: what takes no longer is not bound by its arithmetic
BRIEF = 3e-6            # seconds; no step above is called brief
BOUND = 0.5             # share of a step's time that reading and writing its bytes must take to be what holds it up
FULL = 0.9              # share of what the wider layer had of its registers filled; below, width is to blame
SHARED = 48_000         # MACs below which two threads are not worth it (kTaskMacs in csrc/cpu/kernels/gemm.cpp)
WIDTH = 22              # of a layer's name in print

TableRow = tuple[str, float | None, float, float, float, str]
"""layer, predicted, realised, us before, us after, cause"""
Pair = tuple[Row, Row]


@dataclass(frozen=True)
class LayerSpeedup:
    """One layer, or several that are done as one. predicted: MACs before over MACs after; realised: seconds before over
    seconds after. cause: why they differ; '' where they do not."""

    name: str
    before: Row
    after: Row
    cause: str

    @property
    def predicted(self) -> float:
        return _ratio(self.before.macs, self.after.macs)

    @property
    def realised(self) -> float:
        return _ratio(self.before.seconds or 0.0, self.after.seconds or 0.0)


@dataclass(frozen=True)
class Speedup:
    """Two measured explanations of a network before and after pruning, layer by layer. Prints as a table.

    layers: steps with multiply-accumulates that both have. others: seconds before and after in all other steps.
    call: seconds of a whole call before and after.
    """

    layers: tuple[LayerSpeedup, ...]
    others: tuple[float, float]
    macs: tuple[int, int]
    call: tuple[float, float]
    batch: int
    threads: int
    backends: tuple[str, str]

    @property
    def predicted(self) -> float:
        return _ratio(*self.macs)

    @property
    def realised(self) -> float:
        return _ratio(*self.call)

    def table(self) -> list[TableRow]:
        """Every layer, what all other steps take together, and the whole call."""
        rows: list[TableRow] = [
            (layer.name, layer.predicted, layer.realised, _micro(layer.before.seconds), _micro(layer.after.seconds),
             layer.cause) for layer in self.layers]
        before, after = self.others
        rows.append(("other steps", None, _ratio(before, after), _micro(before), _micro(after), ""))
        steps = sum(row[4] for row in rows)
        why = f"{steps:.1f} us in steps" if steps < (1 - SAME) * _micro(self.call[1]) else ""
        rows.append(("a call", self.predicted, self.realised, _micro(self.call[0]), _micro(self.call[1]), why))
        return rows

    def to_json(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in ("predicted", "realised", "macs", "call", "others", "batch",
                                                       "threads", "backends")},
                "layers": [{"name": layer.name, "predicted": layer.predicted, "realised": layer.realised,
                            "cause": layer.cause, "before": asdict(layer.before), "after": asdict(layer.after)}
                           for layer in self.layers]}

    def __str__(self) -> str:
        lines = [("layer", "MACs", "time", "us before", "us after", "cause of the difference")]
        for name, predicted, realised, before, after, cause in self.table():
            short = name if len(name) <= WIDTH else "..." + name[3 - WIDTH:]
            lines.append((short, "" if predicted is None else f"{predicted:.2f}x", f"{realised:.2f}x",
                          f"{before:.1f}", f"{after:.1f}", cause))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.rjust(width) if 0 < i < 5 else cell.ljust(width)
                          for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
        how = f"batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}, "
        who = " and ".join(dict.fromkeys(self.backends))
        return "\n".join((*text, f"speed-up predicted by MACs, realised in time; {how}{who}"))


def explain_speedup(dense: Lowered, pruned: Lowered, *args: Any, rounds: int = 2, **kwargs: Any) -> Speedup:
    """Measure two lowered networks on the same inputs (as for ``Lowered.explain``), in turns, and compare them.

    Every time is the least of ``rounds`` explanations. Raises InputError where one of them does not take the inputs.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: measure at least once.")
    found: tuple[list[Explanation], list[Explanation]] = ([], [])
    for _ in range(rounds):
        for each, network in zip(found, (dense, pruned), strict=True):
            each.append(network.explain(*args, time=True, **kwargs))
    return compare(*map(quickest, found))


def quickest(found: Sequence[Explanation]) -> Explanation:
    """Explanations of one network as one, with the least time of everything."""
    first, rows = found[0], list[Row]()
    for same in zip(*(each.rows for each in found), strict=True):
        rows.append(min(same, key=lambda row: row.seconds if row.seconds is not None else math.inf))
    return replace(first, rows=tuple(rows), call=min(each.call or 0.0 for each in found))


def compare(dense: Explanation, pruned: Explanation) -> Speedup:
    """Two measured explanations at one batch size. Raises InputError where they are not that."""
    if dense.roof is None or pruned.roof is None or dense.batch != pruned.batch:
        raise InputError("compare two explanations that were measured (time=True) at the same batch size.")
    brief = min((row.seconds for each in (dense, pruned) for row in each.rows if row.seconds and row.macs),
                default=0.0)
    facts = _Facts(pruned.roof, min(OVERHEAD * brief, BRIEF), pruned.threads, _lanes(pruned.backend))
    layers = tuple(_layer(group, facts) for group in _together(list(_pairs(dense.rows, pruned.rows))))
    others = tuple(sum(row.seconds or 0.0 for row in each.rows) - sum(getattr(layer, side).seconds or 0.0
                                                                      for layer in layers)
                   for each, side in ((dense, "before"), (pruned, "after")))
    return Speedup(layers, (others[0], others[1]), (dense.macs, pruned.macs), (dense.call or 0.0, pruned.call or 0.0),
                   pruned.batch, pruned.threads, (dense.backend, pruned.backend))


def _pairs(dense: Sequence[Row], pruned: Sequence[Row]) -> Iterator[Pair]:
    """Steps that do the same: of one name, else the same call (first, second, ...) of the same module."""
    by_name = {row.step: row for row in dense if row.macs}
    by_call = dict(_calls(dense))
    for (source, number), row in _calls(pruned):
        named = by_name.get(row.step)
        other = named if named is not None and named.source == row.source else \
            by_call.get((source, number)) if source else None
        if other is not None and other.op == row.op:
            yield other, row


def _together(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs in groups: a step that one of the networks does within another one goes with it."""
    group_of: dict[str, list[Pair]] = {}
    groups: list[list[Pair]] = []
    for pair in pairs:
        hosts = [host for row in pair if (host := row.algorithm.removeprefix(WITHIN)) != row.algorithm]
        group = next((group_of[host] for host in hosts if host in group_of), None)
        if group is None:
            groups.append(group := [])
        group.append(pair)
        group_of.update({row.step: group for row in pair})
    return groups


def _layer(group: Sequence[Pair], facts: _Facts) -> LayerSpeedup:
    before, after = (_sum([pair[side] for pair in group], facts.roof) for side in (0, 1))
    names = [after.source or after.step for _, after in group]
    return LayerSpeedup(names[0] + (f" +{len(names) - 1}" if len(names) > 1 else ""), before, after,
                        facts.cause(before, after))


def _sum(rows: Sequence[Row], roof: Roof) -> Row:
    """Several steps as one: the first one, with the work and the time of all."""
    first, *rest = rows
    if not rest:
        return first
    macs, touched = sum(row.macs for row in rows), sum(row.bytes for row in rows)
    seconds = sum(row.seconds or 0.0 for row in rows)
    names = dict.fromkeys(row.algorithm for row in rows if not row.algorithm.startswith(WITHIN))
    return replace(first, macs=macs, bytes=touched, seconds=seconds, algorithm=", ".join(names), K=0,
                   roofline=roof.seconds(macs, touched) / seconds if seconds else None)


def _calls(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, int], Row]]:
    count: dict[str, int] = {}
    for row in rows:
        if row.macs:
            number = count[row.source] = count.get(row.source, 0) + 1
            yield (row.source, number), row


@dataclass(frozen=True)
class _Facts:
    """What causes are judged by. brief: seconds that a step takes however small it is; lanes: floats in a register
    that output channels share (0: unknown)."""

    roof: Roof
    brief: float
    threads: int
    lanes: int

    def cause(self, before: Row, after: Row) -> str:
        """Why a layer's realised speed-up is not the predicted one; the most telling fact only."""
        if not before.seconds or not after.seconds:
            return "not measured"
        gain = _ratio(before.seconds, after.seconds) / _ratio(before.macs, after.macs)
        if abs(gain - 1) <= SAME:
            return ""
        found = [self._algorithm(before, after)]
        if gain < 1:
            found += [self._overhead(after), self._bandwidth(after), self._width(before, after),
                      self._transforms(after), self._threads(before, after)]
        else:
            found += [self._cache(before, after), self._bandwidth(before), self._width(after, before)]
        return next(filter(None, found), "") or self._efficiency(before, after)

    def _algorithm(self, before: Row, after: Row) -> str:
        return "" if before.algorithm == after.algorithm else f"{before.algorithm} -> {after.algorithm}"

    def _overhead(self, row: Row) -> str:
        return f"overhead: {_micro(row.seconds):.2g} us in all" if (row.seconds or 0) <= self.brief else ""

    def _bandwidth(self, row: Row) -> str:
        least = self.roof.seconds(0, row.bytes)
        if not row.seconds or least < BOUND * row.seconds or least < self.roof.seconds(row.macs, 0):
            return ""
        return f"bandwidth: {_bytes(row.bytes)} at {row.bytes / row.seconds / 1e9:.0f} GB/s"

    def _cache(self, before: Row, after: Row) -> str:
        """Bytes that fit a nearer cache than before."""
        far, near = (sum(row.bytes > size for size, _ in self.roof.bandwidth) for row in (before, after))
        return f"a nearer cache: {_bytes(after.bytes)}, before {_bytes(before.bytes)}" if near < far else ""

    def _width(self, wide: Row, narrow: Row) -> str:
        """Registers that are not full. Planar algorithms have pixels in them, which pruning does not change."""
        if not self.lanes or not narrow.K or narrow.algorithm.startswith("planar"):
            return ""
        if self._filled(narrow) >= FULL * self._filled(wide):
            return ""
        columns, registers = _columns(narrow), -(-_columns(narrow) // self.lanes)
        if registers == 1:
            return f"narrow GEMM: {columns} of {self.lanes} lanes in use"
        return f"tail: {columns} columns in {registers} registers of {self.lanes}"

    def _filled(self, row: Row) -> float:
        columns = _columns(row)
        return columns / (-(-columns // self.lanes) * self.lanes) if columns else 1.0

    def _transforms(self, row: Row) -> str:
        return "Winograd's transforms shrink less" if row.algorithm.startswith("winograd") else ""

    def _threads(self, before: Row, after: Row) -> str:
        few = self.threads > 1 and after.macs < SHARED <= before.macs
        return f"too little work for {self.threads} threads" if few else ""

    def _efficiency(self, before: Row, after: Row) -> str:
        return f"{after.roofline or 0:.0%} of its roof, before {before.roofline or 0:.0%}"


def _columns(row: Row) -> int:
    """Output channels that lie next to each other."""
    return row.groups if row.groups > 1 and row.N == 1 else row.N


def _lanes(backend: str) -> int:
    if backend != "cpu":
        return 0
    from prunekern.backends.cpu.native import isa
    return isa().lanes


def _ratio(before: float, after: float) -> float:
    return before / after if after else math.inf if before else 1.0


def _micro(seconds: float | None) -> float:
    return (seconds or 0.0) * 1e6


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
