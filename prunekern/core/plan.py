"""The plan: which indices of which axes are kept. Plain data, JSON in and out, editable by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunekern.core.files import write_text
from prunekern.errors import PlanError

VERSION = 1
Kept = Mapping[str, Mapping[int, list[Any]]]


@dataclass(frozen=True)
class Plan:
    """What is kept of a network, with every predicted shape.

    graph:  fingerprint of the graph it belongs to; applying it to another one is refused.
    kept:   kept[parameter][axis] = the kept indices; one list per row of axis 0's groups where rows differ.
            Axes that stay whole are not listed.
    shapes: predicted shape of every activation that changes, e.g. {"conv2d": ["N", "27", "14", "14"]}.
    costs:  {"macs": [before, after], "params": [...], "bytes": [...]} for a batch of one.
    target: what was asked, and notes on how it was met.
    policy: which kinds of channels were candidates, where that was not the default (``prunekern.core.policy``).
    outputs: features of the outputs that are kept, where some left: {"0": {1: [kept indices of axis 1]}} for the first
            tensor of the (flattened) output.
    """

    graph: str
    kept: Kept
    shapes: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    outputs: Kept = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {
            "format": "prunekern-plan", "version": VERSION, "graph": self.graph,
            "kept": {name: {str(axis): rows for axis, rows in axes.items()} for name, axes in self.kept.items()},
            "shapes": dict(self.shapes), "costs": {k: list(v) for k, v in self.costs.items()},
            "target": dict(self.target), "notes": list(self.notes), "policy": dict(self.policy),
            "outputs": {leaf: {str(axis): kept for axis, kept in axes.items()} for leaf, axes in self.outputs.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Raises PlanError where the data is not a plan of this version."""
        if not isinstance(data, dict) or data.get("format") != "prunekern-plan":
            raise PlanError("this is not a prunekern plan (its 'format' is not 'prunekern-plan').")
        if data.get("version") != VERSION:
            raise PlanError(f"the plan has version {data.get('version')!r}; this prunekern reads version {VERSION}.")
        try:
            return cls(
                graph=str(data["graph"]),
                kept={str(name): {int(axis): list(rows) for axis, rows in axes.items()}
                      for name, axes in data["kept"].items()},
                shapes=data.get("shapes", {}), costs={k: (v[0], v[1]) for k, v in data.get("costs", {}).items()},
                target=data.get("target", {}), notes=tuple(data.get("notes", ())), policy=data.get("policy", {}),
                outputs={str(leaf): {int(axis): list(kept) for axis, kept in axes.items()}
                         for leaf, axes in data.get("outputs", {}).items()})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PlanError(f"the plan is damaged ({type(error).__name__}: {error}); make it again.") from error

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Raises PlanError where the file is not readable JSON or not a plan."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {error}.") from error

    def edited(self, **changes: Any) -> Plan:
        """A copy with fields replaced (``kept=...``); shapes are predicted again when it is applied."""
        return replace(self, **changes)

    def diff(self, other: Plan) -> dict[str, dict[int, dict[str, list[Any]]]]:
        """What ``other`` keeps more ('added') and less ('removed') than this plan, per parameter and axis.

        Rows of tables are compared as ``[row, index]`` pairs. An axis that only one plan lists is compared
        with None standing for 'whole'.
        """
        found: dict[str, dict[int, dict[str, list[Any]]]] = {}
        for name in sorted({*self.kept, *other.kept}):
            axes = {*self.kept.get(name, {}), *other.kept.get(name, {})}
            for axis in sorted(axes):
                mine, theirs = self.kept.get(name, {}).get(axis), other.kept.get(name, {}).get(axis)
                if mine == theirs:
                    continue
                a, b = _entries(mine), _entries(theirs)
                found.setdefault(name, {})[axis] = {
                    "added": [None] if theirs is None else [list(e) if isinstance(e, tuple) else e
                                                            for e in b or [] if a is None or e not in a],
                    "removed": [None] if mine is None else [list(e) if isinstance(e, tuple) else e
                                                            for e in a or [] if b is None or e not in b]}
        return found

    def __str__(self) -> str:
        rows = [f"plan for graph {self.graph}"]
        rows += [f"  {what}: {before:,} -> {after:,} ({after / before:.3f})"
                 for what, (before, after) in self.costs.items() if before]
        for name, axes in self.kept.items():
            rows += [f"  {name}[{axis}]: keeps {_count(kept)}" for axis, kept in axes.items()]
        return "\n".join(rows)


def _entries(kept: list[Any] | None) -> list[Any] | None:
    if kept is None or not kept or not isinstance(kept[0], list):
        return kept
    return [(row, index) for row, indices in enumerate(kept) for index in indices]


def _count(kept: list[Any]) -> str:
    return f"{len(kept[0])} of each of {len(kept)} rows" if kept and isinstance(kept[0], list) else str(len(kept))
