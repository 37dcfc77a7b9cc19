"""What a run of ``latency.py`` is made of: cases, each with entries; how they are stored and printed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.contenders import Checked, Contender
from bench.machine import load_average
from bench.networks import Network, wanted
from prunekern.analysis.latency import Row
from prunekern.core.files import write_text

SCHEMA = 2


@dataclass(frozen=True)
class Entry:
    """What became of one contender on one network: times, or the reason why there are none."""

    contender: Contender
    network: str
    state: str = "timed"                # or 'failed', 'skipped'
    reason: str = ""
    checked: Checked | None = None
    row: Row | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"contender": self.contender.name, "network": self.network,
                                 "precision": self.contender.precision, "league": self.contender.league,
                                 "ours": self.contender.ours, "state": self.state}
        if self.reason:
            found["reason"] = self.reason
        if self.checked is not None:
            found.update({key: value for key, value in asdict(self.checked).items() if key != "seconds"})
        if self.row is not None:
            found.update({f"{key}_us": round(getattr(self.row, key), 3) for key in ("p20", "p50", "p80", "min")})
            found.update(rounds=self.row.count, calls_per_round=self.row.inner)
        return found


@dataclass(frozen=True)
class Ratio:
    """This library's fastest result over the fastest peer's, medians in µs; ``target`` is the most it may be."""

    ours: str
    peer: str
    ours_us: float
    peer_us: float
    target: float | None = None

    @property
    def value(self) -> float:
        return self.ours_us / self.peer_us

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": round(self.value, 4)}

    def __str__(self) -> str:
        target = "" if self.target is None else f", wanted {self.target:.2f}" + " MISSED" * (self.value > self.target)
        return f"{self.value:.2f} of {self.peer}{target}"


@dataclass(frozen=True)
class Case:
    """One model at one batch size with one number of threads. peak: fp32 GFLOP/s of that many, where measured."""

    model: str
    batch: int
    threads: int
    networks: tuple[Network, ...]
    entries: tuple[Entry, ...]
    peak: float | None = None
    load: tuple[float, ...] = field(default_factory=load_average)

    def ratio(self, network: str, league: str = "fp32") -> Ratio | None:
        """None where nobody of ours, or no peer, was timed in that league."""
        ours, peers = ([e for e in self.entries if e.network == network and e.contender.league == league
                        and e.contender.ours == side and e.row is not None] for side in (True, False))
        if not ours or not peers:
            return None
        first, peer = (min(side, key=lambda entry: entry.row.p50) for side in (ours, peers))     # type: ignore[union-attr]
        row = wanted(self.model, network) if league == "fp32" else None
        return Ratio(first.contender.name, peer.contender.name, first.row.p50, peer.row.p50,     # type: ignore[union-attr]
                     None if row is None else row.limit(self.batch, self.threads))

    def share(self, entry: Entry) -> float | None:
        """Of the machine's fp32 peak, if all multiply-accumulates were done; above 1 where Winograd does fewer."""
        macs = next(n.macs for n in self.networks if n.name == entry.network)
        if self.peak is None or entry.row is None:
            return None
        return 2e-9 * macs * self.batch / (entry.row.p50 * 1e-6) / self.peak

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "batch": self.batch, "threads": self.threads, "load_average": self.load,
                "networks": {n.name: {"macs": n.macs, "params": n.params, **self._ratios(n.name)}
                             for n in self.networks},
                "entries": [entry.to_json() | ({} if self.share(entry) is None else
                                               {"share_of_peak": round(self.share(entry) or 0, 4)})
                            for entry in self.entries]}

    def _ratios(self, network: str) -> dict[str, Any]:
        leagues = dict.fromkeys(entry.contender.league for entry in self.entries)
        found = {league: self.ratio(network, league) for league in leagues}
        return {"ratios": {league: ratio.to_json() for league, ratio in found.items() if ratio is not None}}

    def __str__(self) -> str:
        by = {(e.contender.name, e.network): e for e in self.entries}
        base = by["eager", "dense"].row
        lines = [["", *(cell for n in self.networks for cell in (f"{n.name}, {n.macs / 1e6:.3g} M MACs", "x", "peak"))]]
        for name in dict.fromkeys(e.contender.name for e in self.entries):
            line = [name]
            for network in self.networks:
                entry = by[name, network.name]
                share = self.share(entry)
                line += [_times(entry), f"{base.p50 / entry.row.p50:.2f}" if base and entry.row else "",
                         "" if share is None else f"{share:.0%}"]
            lines.append(line)
        head = (f"{self.model}, batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}: µs a call, p50 "
                "(p20 - p80); x: times as fast as eager on the dense network; peak: share of the machine's")
        found = {(n.name, league): self.ratio(n.name, league) for n in self.networks
                 for league in dict.fromkeys(e.contender.league for e in self.entries)}
        ratios = [f"  {name}, {league}: {ratio}" for (name, league), ratio in found.items() if ratio is not None]
        reasons = [f"  {e.contender.name} ({e.network}) {e.state}: {e.reason}" for e in self.entries if e.reason]
        return "\n".join((head, *aligned(lines), *ratios, *reasons))


def aligned(lines: list[list[str]]) -> list[str]:
    """Columns side by side, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["   ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in
                       enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]


def _times(entry: Entry) -> str:
    row = entry.row
    if row is None:
        return entry.state
    p20, p50, p80 = (f"{value:.0f}" if row.p50 >= 1000 else f"{value:.1f}" for value in (row.p20, row.p50, row.p80))
    return f"{p50} ({p20} - {p80})"


class Results:
    """The file of a run, written whole after every case.

    What it holds of an earlier run that was stopped is kept where that was the same run: same settings, machine,
    versions and sources.
    """

    SAME = ("schema", "sources", "extension", "device", "cpus", "versions", "settings")

    def __init__(self, path: Path, facts: Mapping[str, Any], resume: bool = False) -> None:
        """Raises ValueError, naming what differs, where another run's file was to be resumed."""
        self.path, self.facts = path, dict(facts)
        self.cases: dict[tuple[str, int, int], dict[str, Any]] = {}
        if not resume or not path.is_file():
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(self.facts))
        other = [key for key in self.SAME if before.get(key) != now.get(key)]
        if other:
            raise ValueError(f"{path} was measured with another {' and '.join(other)}; leave out --resume to measure "
                             "again, or name another file with --out.")
        self.facts = {key: value for key, value in before.items() if key != "cases"}
        self.cases = {(case["model"], case["batch"], case["threads"]): case for case in before["cases"]}

    def __contains__(self, key: tuple[str, int, int]) -> bool:
        return key in self.cases

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.cases.values())

    def add(self, case: Case) -> None:
        self.cases[case.model, case.batch, case.threads] = case.to_json()
        write_text(self.path, json.dumps({**self.facts, "cases": list(self)}, indent=1) + "\n")
