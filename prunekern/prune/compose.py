"""Plans in a row, as one plan of the original network: what iterative schedules and ``load`` need."""

from __future__ import annotations

from typing import Any

from prunekern.core.plan import Plan
from prunekern.errors import PlanError
from prunekern.graph.groups import Groups


def compose(groups: Groups, first: Plan, second: Plan) -> Plan:
    """The plan of the original (``groups``) that does what ``first`` and then ``second``, a plan of its result, do.

    Raises PlanError where the second does not fit what the first leaves.
    """
    kept: dict[str, dict[int, list[Any]]] = {name: dict(axes) for name, axes in first.kept.items()}
    for name, axes in second.kept.items():
        for axis, inner in axes.items():
            outer = kept.get(name, {}).get(axis)
            if outer is None:
                outer = _whole(groups, name, axis)
            kept.setdefault(name, {})[axis] = _through(outer, inner, f"{name}[{axis}]")
    outputs: dict[str, dict[int, list[Any]]] = {leaf: dict(axes) for leaf, axes in first.outputs.items()}
    for leaf, axes in second.outputs.items():
        for axis, inner in axes.items():
            outer = outputs.get(leaf, {}).get(axis)
            outputs.setdefault(leaf, {})[axis] = inner if outer is None else _through(outer, inner, f"outputs {leaf}")
    costs = {what: (first.costs.get(what, ends)[0], ends[1]) for what, ends in second.costs.items()}
    return Plan(first.graph, kept, {}, costs, second.target, tuple(dict.fromkeys((*first.notes, *second.notes))),
                first.policy, outputs)


def _whole(groups: Groups, name: str, axis: int) -> list[Any]:
    index = groups.labels.axes.get((name, axis))
    if index is None:
        raise PlanError(f"{name!r} axis {axis} has no channels in the original graph.")
    if index.dim() == 1:
        return list(range(len(index)))
    return [list(range(index.shape[1])) for _ in range(len(index))]


def _through(outer: list[Any], inner: list[Any], where: str) -> list[Any]:
    """Indices of indices; of a table, row by row over the rows that are left."""
    try:
        if outer and isinstance(outer[0], list):
            rows = iter(inner)
            return [[row[i] for i in next(rows)] if row else [] for row in outer]
        return [outer[i] for i in inner]
    except (IndexError, StopIteration, TypeError) as error:
        raise PlanError(f"plan.kept[{where}] does not fit what the plan before it leaves ({error}).") from error


