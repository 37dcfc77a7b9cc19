"""A compressed network as a Report: headline, per-layer bars, proof, notes, environment."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn

from prunekern.backends import Lowered
from prunekern.backends.speedup import Speedup
from prunekern.core.graph import owner, target_name
from prunekern.core.plan import Plan
from prunekern.graph.groups import Groups
from prunekern.ops import REGISTRY
from prunekern.prune.prove import Proof
from prunekern.prune.schedule import Step
from prunekern.prune.slice import choice_of, predicted
from prunekern.report import Check, Curve, Figure, LayerRow, Report, Table
from prunekern.report import Proof as ProofTable

UNITS = {"macs": "MACs", "params": "params", "bytes": "bytes"}


def environment() -> dict[str, str]:
    """What a figure depends on besides the code."""
    return {"prunekern": version(), "torch": torch.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "processor": _processor(), "threads": str(torch.get_num_threads())}


def version() -> str:
    """The installed version of prunekern; 'not installed' where it runs from a source tree."""
    try:
        return metadata.version("prunekern")
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def layer_rows(groups: Groups, plan: Plan) -> tuple[LayerRow, ...]:
    """One row per contraction: output channels, MACs and parameters before and after, for a batch of one."""
    graph, keep = groups.graph, choice_of(groups, plan)
    batch = 1 if graph.free_batch else graph.batch
    rows = []
    for node in graph.nodes:
        rule = REGISTRY.find(node.target) if node.op == "call_function" else None
        weights = [arg for arg in node.all_input_nodes if graph.fqn(arg) is not None]
        if rule is None or not weights:
            continue
        before = rule.macs(node, graph.shapes(batch))
        if not before:
            continue
        after = rule.macs(node, lambda n: predicted(groups.labels, n, keep, batch))
        axis = 1 if "conv" in str(node.target) else -1
        rows.append(LayerRow(owner(node)[0] or node.name, target_name(node).removeprefix("aten."),
                             graph.shape(node)[axis], predicted(groups.labels, node, keep)[axis], before, after,
                             sum(_numel(graph.shape(w)) for w in weights),
                             sum(_numel(predicted(groups.labels, w, keep)) for w in weights)))
    return tuple(rows)


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def proof_checks(proof: Proof, prefix: str = "") -> dict[str, Check]:
    """The figures of one proof, each with the limit it was held to."""
    return {
        f"{prefix}sliced = masked, randomised weights": Check(
            proof.twin_error, proof.limit, f"max difference / max output, {proof.dtype}, on a twin whose every weight "
            "and statistic is drawn at random"),
        f"{prefix}sliced = masked, real weights": Check(
            proof.real_error, proof.limit, f"the same with the trained weights, {proof.dtype}"),
        f"{prefix}shapes as predicted": Check(proof.shapes, 1, "activations compared one by one", ">="),
        f"{prefix}teeth": Check(proof.teeth, 0.0, "share of the remaining channels whose removal visibly changes the "
                                "twin's output; without it equality would prove nothing", ">", "fraction"),
    }


def speedup_figure(speedup: Speedup) -> Figure:
    """How much faster a call of the lowered network is."""
    return Figure(f"Speed-up, batch {speedup.batch}", speedup.realised, "×",
                  f"lowered, before and after; the MACs say {speedup.predicted:.3g}×")


def speedup_table(speedup: Speedup) -> Table:
    """Layer by layer: what the MACs say, what was measured, why they differ."""
    return Table("Speed-up of every layer", ("layer", "by MACs, ×", "measured, ×", "µs before", "µs after",
                                             "cause of the difference"), tuple(speedup.table()),
                 f"Lowered, batch {speedup.batch}, {speedup.threads} thread{'s' * (speedup.threads > 1)}, backend "
                 f"{' and '.join(dict.fromkeys(speedup.backends))}; the least of many runs of every step")


def summarise(model: nn.Module, groups: Groups, plan: Plan, steps: Sequence[Step], lowered: Lowered | None,
              metrics: Mapping[str, Any], notes: Sequence[str], curves: Sequence[Curve] = (),
              speedup: Speedup | None = None) -> Report:
    """The report of one ``compress`` call."""
    headline = [Figure(f"{UNITS[what]} left", after / before, "fraction", f"{before:,} to {after:,}")
                for what, (before, after) in plan.costs.items() if before]
    headline += [Figure(name, value, "fraction") for name, value in metrics.items()
                 if isinstance(value, float) and "accuracy" in name]
    if "latency, share" in metrics:
        headline.append(Figure("latency left", metrics["latency, share"], "fraction",
                               f"lowered: {metrics['latency, original (µs)']:.4g} to "
                               f"{metrics['latency, compressed (µs)']:.4g} µs"))
    headline += [speedup_figure(speedup)] if speedup is not None else []
    checks = proof_checks(steps[-1].proof) if steps else {}
    tables = [Table("Pruning steps", ("step", "MACs", "params", "measured"), tuple(
        (s.number, s.costs["macs"][1], s.costs["params"][1], ", ".join(
            f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in s.measured.items())) for s in steps))]
    tables += [speedup_table(speedup)] if speedup is not None else []
    if lowered is not None and lowered.verification is not None:
        tables.append(Table("Lowered network", ("what",), tuple(
            (line,) for line in str(lowered.verification).splitlines()[:40])))
    return Report(title=f"{type(model).__name__}, compressed", subtitle="pruned, physically sliced, proven",
                  headline=tuple(headline), layers=layer_rows(groups, plan), proof=ProofTable(checks),
                  curves=tuple(curves), tables=tuple(tables), notes=tuple(notes), environment=environment())
