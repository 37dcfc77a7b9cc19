"""A report as the full study makes it, one with hostile names, and strict readers for pages and PNGs."""

from __future__ import annotations

import dataclasses
import random
import struct
import zlib
from html.parser import HTMLParser
from typing import Any

from prunekern.report import (
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
    units,
)

HOSTILE = (
    """<script>alert('x')</script>"><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}</style>$\\frac$_[red]é"""
)


def network_macs(conv1: int, conv2: int, hidden: int) -> int:
    """The MACs of conv-conv-FC-FC on a 28 x 28 image without padding, pooled once by two."""
    return 26 * 26 * 9 * conv1 + 24 * 24 * 9 * conv1 * conv2 + 144 * conv2 * hidden + 10 * hidden


def sample_triplets(seed: int = 7) -> list[Triplet]:
    """About 150 steps over four layers with a plausible decline and an undone step at each layer's end."""
    draw = random.Random(seed)
    widths, reached, best, steps = {"conv1": 16, "conv2": 16, "fc1": 150}, 0.912, 0.912, []
    for layer, count, budget in (
        ("conv1", 16, 9),
        ("conv2", 16, 10),
        ("fc1", 150, 70),
        ("fc2 inputs", 81, 61),
    ):
        for done in range(1, budget + 1):
            strain = (done / count) ** 3
            undone = done == budget
            after = best - 0.004 - 0.02 * strain - (0.016 if undone else 0) + draw.gauss(0, 0.0014)
            widths["fc1" if "fc" in layer else layer] -= 1
            step = Triplet(
                step=len(steps) + 1,
                layer=layer,
                channels_left=count - done,
                before=best,
                after_pruning=max(0.12, reached - abs(draw.gauss(0.01, 0.02)) - 0.25 * strain),
                after_retraining=after,
                incremental_drop=100 * (reached - after),
                macs=network_macs(*widths.values()),
                accepted=not undone,
                test_accuracy=after - 0.003 + draw.gauss(0, 0.001),
                detail=f"channel {draw.randrange(count)}",
            )
            steps.append(step)
            if undone:
                widths["fc1" if "fc" in layer else layer] += 1
            else:
                reached = after
        best -= 0.004
    return steps


def sample(**changes: object) -> Report:
    """A report of the full study, every section filled."""
    triplets = sample_triplets()
    dense = network_macs(16, 16, 150)
    points = [ParetoPoint("original", dense, 0.9093, DENSE)]
    points += [
        ParetoPoint(f"{t.layer} {t.channels_left}", t.macs, t.test_accuracy or 0.0, t.layer, detail=t.detail)
        for t in triplets
    ]
    enough = [p for p in points if p.accuracy > 0.87]
    chosen = min(enough, key=lambda p: p.macs)
    points = [ParetoPoint(p.name, p.macs, p.accuracy, p.stage, p is chosen, p.detail) for p in points]
    contenders = {
        "eager, original": 1.0,
        "eager, pruned": 1.6,
        "lowered, original": 1.9,
        "lowered, pruned": 3.4,
    }
    latency = []
    for batch, base in ((1, 182.0), (64, 9120.0), (1024, 161_000.0)):
        for name, factor in contenders.items():
            p50 = base / factor
            row = LatencyRow(name, batch, 0.96 * p50, p50, 1.09 * p50, factor, "eager, original", "")
            latency.append(row)
    draw = random.Random(3)
    loss = {
        "training": tuple((e, 0.9 / e**0.6 + draw.gauss(0, 0.004)) for e in range(1, 21)),
        "validation": tuple((e, 0.85 / e**0.5 + 0.06 + draw.gauss(0, 0.01)) for e in range(1, 21)),
    }
    accuracy = {name: tuple((e, 0.99 - v / 3) for e, v in points_) for name, points_ in loss.items()}
    remains = f"{100 * chosen.macs / dense:.1f} % of the original"
    content: dict[str, object] = {
        "title": "Fashion-MNIST, pruned and lowered",
        "subtitle": "Two convolutions and two linear layers, one channel at a time.",
        "headline": (
            Figure("MACs of the chosen network", chosen.macs, "MACs", remains),
            Figure("Test accuracy", chosen.accuracy, "fraction", "original 90.93 %"),
            Figure("Parameters", 123456, "params", "of 231,446"),
            Figure("Latency at batch 1", 53.5, "µs", "median, lowered network"),
            Figure("Speed-up at batch 64", 3.4, "×", "against eager PyTorch"),
            Figure("Steps", 150, "", "4 of them undone"),
        ),
        "layers": (
            LayerRow("conv1", "conv2d", 16, 8, 97344, 48672, 160, 80),
            LayerRow("conv2", "conv2d", 16, 7, 1327104, 290304, 2320, 511),
            LayerRow("fc1", "linear", 100, 31, 230400, 31248, 230500, 31279),
            LayerRow("fc2", "linear", 10, 10, 1000, 310, 1010, 320),
        ),
        "pareto": points,
        "triplets": triplets,
        "curves": (
            Curve("Loss of the original network", "epoch", "cross-entropy", loss),
            Curve("Accuracy of the original network", "epoch", "accuracy", accuracy, percent=True),
        ),
        "proof": Proof(
            {
                "Sliced = masked, randomised twin": Check(
                    3.1e-15, 1e-10, "Largest relative error in fp64.", "<="
                ),
                "Teeth": Check(
                    0.183, 1e-4, "Dropping one more channel changes the output by this much.", ">="
                ),
                "Shapes found as predicted": Check(14, 14, "", "=="),
                "Lowered against fp64": Check(
                    2.4e-7, 5e-7, "Largest error relative to max|out|, whole test set."
                ),
                "Same predictions on the test set": Check(
                    1.0, 1.0, "Share of 10,000 images.", "==", "fraction"
                ),
                "PyTorch's own error": Check(2.6e-7, None, "For comparison."),
            }
        ),
        "latency": latency,
        "tables": (
            Table(
                "Lowered steps",
                ("step", "op", "M×N×K", "algorithm", "MACs", "time µs"),
                (
                    ("0", "conv2d", "676×8×9", "im2col", 48672, 11.25),
                    ("1", "conv2d", "576×7×72", "im2col", 290304, None),
                ),
                "One row per kernel call.",
            ),
        ),
        "notes": (
            "One epoch of retraining per step; the full study takes five.",
            "The validation split of 6,000 images decides; the 10,000 test images give the reported figures.",
        ),
        "environment": {
            "python": "3.13.1",
            "torch": "2.13.0+cpu",
            "processor": "Xeon, 2 threads",
            "seed": "0",
        },
        "accuracy_label": "test accuracy",
        "accuracy_floor": 0.87,
        "drop_limit": 1.0,
        "created": "2025-01-31T12:00:00+00:00",
        "command": "prunekern run fashion-mnist",
    }
    return Report(**(content | changes))  # type: ignore[arg-type]


VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; collects text, tags and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.pieces: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append((self.open[-1] if self.open else "", data))

    def inside(self, tag: str) -> list[str]:
        """All text directly inside elements of this kind."""
        return [data for kind, data in self.pieces if kind == tag]

    @property
    def text(self) -> str:
        """All text a reader sees, with plain spaces."""
        seen = (data for tag, data in self.pieces if tag not in ("script", "style"))
        return " ".join(" ".join(seen).replace(units.NBSP, " ").split())


def hostile(value: Any) -> Any:
    """The same data with every text replaced by one that tries to break out of HTML, JS, CSS and Jinja."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        keep = {"relation": getattr(value, "relation", None), "unit": getattr(value, "unit", None)}
        return dataclasses.replace(
            value, **{name: keep.get(name) or hostile(getattr(value, name)) for name in names}
        )
    if isinstance(value, tuple):
        return tuple(hostile(item) for item in value)
    if isinstance(value, dict):
        return {f"{HOSTILE}{index}": hostile(item) for index, item in enumerate(value.values())}
    return HOSTILE if isinstance(value, str) else value


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has the right checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kinds.append(data[at + 4 : at + 8])
        chunk = data[at + 4 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(chunk)
        at += 12 + length
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height
