"""Reports: plain data in; terminal tables, one offline HTML page, JSON, CSV and PNGs out."""

from __future__ import annotations

from prunekern.report.model import (
    DENSE,
    Check,
    Curve,
    Figure,
    LatencyRow,
    LayerRow,
    ParetoPoint,
    Proof,
    Report,
    Table,
    Triplet,
    WeightRow,
)
from prunekern.report.pareto import on_front, pareto_front
from prunekern.report.save import Saved, save
from prunekern.report.terminal import show

__all__ = [
    "DENSE",
    "Check",
    "Curve",
    "Figure",
    "LatencyRow",
    "LayerRow",
    "ParetoPoint",
    "Proof",
    "Report",
    "Saved",
    "Table",
    "Triplet",
    "WeightRow",
    "on_front",
    "pareto_front",
    "save",
    "show",
]
