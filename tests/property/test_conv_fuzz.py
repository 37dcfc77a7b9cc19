"""Convolutions of every kind at random, by every algorithm and instruction set of the C++ engine, against fp64.

Programs are built directly: one to five layers, so that values also flow between algorithms, forms and halos. Each runs
twice in the same memory, first on inputs that are all NaN: whatever it then reads that is not its input shows. Inputs
lie between NaNs and outputs between marks, neither aligned.

PRUNEKERN_FUZZ=20 draws twenty times as many (0.1: a tenth), PRUNEKERN_FUZZ_SEED=7 others.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunekern.backends.base import Signature
from prunekern.backends.cpu import COMPILERS, CpuPlacement, bands
from prunekern.backends.cpu.builder import Settings
from prunekern.backends.cpu.convs import algorithms
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.native import instruction_sets, isa
from prunekern.core.activations import apply
from prunekern.core.graph import Dim
from prunekern.core.program import Activation, Epilogue, Program, Slot, Step
from prunekern.lower.tolerance import error, limit, loosest

if not instruction_sets():
    pytest.skip("the extension is not built", allow_module_level=True)

CASES, BLOCKS = max(1, round(50 * float(os.environ.get("PRUNEKERN_FUZZ", "1")))), 20
SEED = int(os.environ.get("PRUNEKERN_FUZZ_SEED", "0"))
ACTIVATIONS = [None, None, Activation("relu"), Activation("clamp", (-2.0, 3.0)), Activation("leaky_relu", (0.1,)),
               Activation("silu"), Activation("hardswish"), Activation("clamp_max", (2.5,)), Activation("gelu")]
MARK = 12345.0


class Draw(random.Random):
    """Sizes that networks have, and those on the edges of registers and tiles."""

    def channels(self, most: int = 40) -> int:
        return self.choice((1, 2, 3, self.randint(4, 17), self.randint(1, most)))

    def each(self, rank: int, choices: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.choice(choices) for _ in range(rank))


@dataclass
class Network:
    """A Program as it is drawn: all shapes but the batch are known."""

    draw: Draw
    rank: int
    weights: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    inputs: list[Slot] = field(default_factory=list)

    def slot(self, channels: int, sizes: Sequence[int], given: bool = False) -> Slot:
        number = len(self.steps) + len(self.inputs)
        found = Slot(f"v{number}{'i' if given else ''}", (Dim(1, 0), *(Dim(0, n) for n in (channels, *sizes))),
                     torch.float32)
        if given:
            self.inputs.append(found)
        return found

    def add(self, x: Slot, outputs: int, sizes: Sequence[int], op: str, weight: Sequence[int],
            **attributes: Any) -> Slot:
        """A layer with an epilogue at random."""
        draw, name = self.draw, f"s{len(self.steps)}"
        y = self.slot(outputs, sizes)
        self.weights[name] = torch.randn(*weight) * (torch.Size(weight).numel() / weight[0]) ** -0.5
        bias = f"{name}.bias" if draw.random() < 0.6 else None
        if bias:
            self.weights[bias] = torch.randn(outputs)
        same = [slot for slot in self.inputs if slot.shape == y.shape] or [self.slot(outputs, sizes, True)] \
            if draw.random() < 0.4 else []
        epilogue = Epilogue(bias, draw.choice(ACTIVATIONS), same[0] if same else None, draw.random() < 0.5 if same else
                            False)
        self.steps.append(Step(op, name, (x,), (y,), attributes, {"weight": name}, epilogue))
        return y

    def conv(self, x: Slot, **given: Any) -> Slot | None:
        """A convolution at random, but for what is given; None where the window does not fit."""
        draw, rank, channels = self.draw, self.rank, x.shape[1].offset
        usual = draw.random() < 0.4                              # what Winograd takes
        groups = 1 if usual else draw.choice([1, 1, *[g for g in (2, 3, channels) if channels % g == 0]])
        at = {"kernel": (3,) * rank if usual else draw.each(rank, (1, 1, 2, 3, 3, 4, 5, 7)),
              "stride": (1,) * rank if usual else draw.each(rank, (1, 1, 1, 2, 3)),
              "dilation": (1,) * rank if usual else draw.each(rank, (1, 1, 1, 2, 3)),
              "padding": tuple((draw.randint(0, 2), draw.randint(0, 3)) for _ in range(rank)), "groups": groups,
              **given}
        groups, outputs = at["groups"], at.pop("outputs", None)
        outputs = outputs or groups * draw.channels(max(1, 40 // groups))
        sizes = [(n.offset + sum(pad) - d * (k - 1) - 1) // s + 1 for n, pad, d, k, s in
                 zip(x.shape[2:], at["padding"], at["dilation"], at["kernel"], at["stride"], strict=True)]
        if min(sizes) < 1:
            return None
        return self.add(x, outputs, sizes, "conv", (outputs, channels // groups, *at["kernel"]), **at)

    def transposed(self, x: Slot) -> Slot | None:
        draw, rank, channels = self.draw, self.rank, x.shape[1].offset
        groups = draw.choice([1, 1, *[g for g in (2, 3, channels) if channels % g == 0]])
        kernel, stride, dilation = (draw.each(rank, choices) for choices in ((1, 2, 3, 4, 5), (1, 2, 2, 3), (1, 1, 2)))
        pads = draw.each(rank, (0, 0, 1, 2))
        more = tuple(draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
        sizes = [(n.offset - 1) * s - 2 * p + d * (k - 1) + 1 + m for n, s, p, d, k, m in
                 zip(x.shape[2:], stride, pads, dilation, kernel, more, strict=True)]
        if min(sizes) < 1:
            return None
        outputs = groups * draw.channels(max(1, 24 // groups))
        return self.add(x, outputs, sizes, "conv_transpose", (channels, outputs // groups, *kernel), kernel=kernel,
                        stride=stride, dilation=dilation, padding=tuple((p, p) for p in pads), groups=groups,
                        output_padding=more)

    def inverted(self, x: Slot) -> Slot | None:
        """Expand, depthwise, project."""
        one = {"kernel": (1, 1), "stride": (1, 1), "dilation": (1, 1), "padding": ((0, 0), (0, 0)), "groups": 1}
        wide = x.shape[1].offset * 2 + self.draw.randint(0, 9)
        first = self.conv(x, **one, outputs=wide)
        stride = self.draw.each(2, (1, 1, 2))
        second = first and self.conv(first, kernel=(3, 3), stride=stride, dilation=(1, 1), groups=wide, outputs=wide)
        return second and self.conv(second, **one)


    def pool(self, x: Slot) -> Slot | None:
        draw, sizes = self.draw, [n.offset for n in x.shape[2:]]
        usual = draw.random() < 0.5                              # what planar kernels take
        kernel = (2,) * self.rank if usual else draw.each(self.rank, (1, 2, 2, 3))
        stride = kernel if usual else draw.each(self.rank, (1, 2, 3))
        pads = (0,) * self.rank if usual else tuple(draw.randint(0, k // 2) for k in kernel)
        out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(sizes, pads, kernel, stride, strict=True)]
        if any(n < k for n, k in zip(sizes, kernel, strict=True)):       # torch refuses some of these
            return None
        y = self.slot(x.shape[1].offset, out)
        at = {"kind": draw.choice(("max", "avg")), "kernel": kernel, "stride": stride, "dilation": (1,) * self.rank,
              "padding": tuple((p, p) for p in pads), "ceil": False, "count_include_pad": draw.random() < 0.5,
              "divisor": None}
        self.steps.append(Step("pool", f"s{len(self.steps)}", (x,), (y,), at))
        return y


def drawn(seed: int) -> tuple[Program, int]:
    """A Program and a batch size."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    rank = draw.choice((1, 2, 2, 2, 2, 3))
    network = Network(draw, rank)
    sizes = draw.each(rank, (1, 2, 3, 5, 8, 13, 17) if rank < 3 else (1, 2, 4, 7))
    x = network.slot(draw.channels(), sizes, True)
    makes = [network.conv] * 5 + [network.transposed] + ([network.inverted] * 2 if rank == 2 else [])
    y: Slot | None = draw.choice(makes)(x)
    if y is not None and draw.random() < 0.25:
        y = network.pool(y)
    if y is not None and draw.random() < 0.4:
        y = network.conv(y)
    if y is None:
        return drawn(seed + 1_000_003)
    program = Program(tuple(network.steps), network.weights, tuple(network.inputs), (y,), None, None)
    program.check()
    return program, draw.choice((1, 1, 1, 2, 3, 8, 9, 17))


def defined(program: Program, inputs: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every value of the Program, by torch."""
    values = {slot.name: x.to(dtype) for slot, x in zip(program.input_slots, inputs, strict=True)}
    weights = {name: weight.to(dtype) for name, weight in program.weights.items()}
    for step in program.steps:
        at, e, rank = step.attributes, step.epilogue, len(step.output.shape) - 2
        x, weight, bias = values[step.inputs[0].name], weights.get(step.name), weights[e.bias] if e.bias else None
        if step.op == "pool":
            y = pooled(x, at)
        elif step.op == "conv":
            x = F.pad(x, [n for pair in reversed(at["padding"]) for n in pair])
            conv: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
            y = conv(x, weight, bias, at["stride"], 0, at["dilation"], at["groups"])
        else:
            conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
            y = conv(x, weight, bias, at["stride"], [low for low, _ in at["padding"]], at["output_padding"],
                     at["groups"], at["dilation"])
        residual = values[e.residual.name] if e.residual else torch.zeros((), dtype=dtype)
        y = y if e.residual_last else y + residual
        y = apply(e.activation.kind, e.activation.constants, y) if e.activation else y
        values[step.output.name] = y + residual if e.residual_last else y
    return values


def pooled(x: Tensor, at: Mapping[str, Any]) -> Tensor:
    rank, pads = x.dim() - 2, [low for low, _ in at["padding"]]
    if at["kind"] == "max":
        largest: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        return largest(x, at["kernel"], at["stride"], pads)  # type: ignore[no-any-return]
    mean: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    return mean(x, at["kernel"], at["stride"], pads, False, at["count_include_pad"])  # type: ignore[no-any-return]


def mixtures(program: Program, batch: int, seed: int) -> Iterator[dict[str, str]]:
    """Algorithms for all steps; every one that the steps take is in one of them."""
    builder = CpuPlacement(program, signature(program, batch), Settings(isa(), 1), COMPILERS, {}).builder
    takes = {step.name: [a.name for a in algorithms().values() if a.takes(Geometry.of(builder, step)) is None]
             for step in program.steps if step.op == "conv"}
    draw = random.Random(seed)
    for names in takes.values():
        draw.shuffle(names)
    for number in range(max(map(len, takes.values()), default=1)):
        yield {step: names[number % len(names)] for step, names in takes.items()}


def signature(program: Program, batch: int) -> Signature:
    return Signature(tuple(slot.at(batch) for slot in program.input_slots), batch, torch.device("cpu"))


def amid(value: Tensor, around: float, offset: int) -> tuple[Tensor, Tensor]:
    """A buffer filled with a number, and the value in the middle of it."""
    whole = torch.full((value.numel() + 64,), around)
    return whole, whole[offset:offset + value.numel()].view(value.shape).copy_(value)


def check(seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many placements were held to fp64."""
    program, batch = drawn(seed)
    torch.manual_seed(seed)
    inputs = [amid(torch.randn(slot.at(batch)), torch.nan, 17 + seed % 16)[1] for slot in program.input_slots]
    nothing = [torch.full_like(x, torch.nan) for x in inputs]
    out = program.output_slots[0].name
    exact, own = defined(program, inputs, torch.float64), defined(program, inputs, torch.float32)
    handed_on = max((error(own[name], exact[name]) for name in exact if name != out), default=0.0)
    spread = defined(program, nothing, torch.float32)[out].isnan()
    count = 0
    for choices in mixtures(program, batch, seed):
        for name in instruction_sets():
            monkeypatch.setenv("PRUNEKERN_ISA", name)
            settings = Settings(isa(), 1 + seed % 3, choices)
            what = f"seed {seed}, batch {batch}, {name}, {choices}:\n{program}"
            placement = CpuPlacement(program, signature(program, batch), settings, COMPILERS, {})
            assert all(placement.algorithms[step] in (asked, "1x1 GEMM") or "within" in placement.algorithms[step]
                       for step, asked in choices.items() if asked != "in bands"), what
            whole, y = amid(torch.zeros(program.output_slots[0].at(batch)), MARK, 13 + seed % 7)
            placement.run_into(nothing, [y])
            assert bool(y.isnan()[spread].all()), f"NaN is lost: {what}"
            placement.run_into(inputs, [y])
            row = "direct"
            for each in placement.rows.values():
                row = loosest(row, each)
            allowed = limit(error(own[out], exact[out]), torch.float32, row, handed_on)
            assert error(y, exact[out]) <= allowed, f"{error(y, exact[out])} > {allowed}: {what}"
            assert int((whole == MARK).sum()) == 64 + int((y == MARK).sum()), f"it wrote beside its output: {what}"
            count += 1
    return count


@pytest.mark.parametrize("block", range(BLOCKS))
def test_convolutions(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BYTES", 2048)           # several bands of small images too
    start = SEED * 1_000_000 + block * CASES
    assert sum(check(seed, monkeypatch) for seed in range(start, start + CASES)) >= 3 * CASES


def test_placements_of_no_samples() -> None:
    """Nothing is computed, nothing is touched."""
    for seed in range(20):
        program, _ = drawn(seed)
        placement = CpuPlacement(program, signature(program, 0), Settings(isa(), 2), COMPILERS, {})
        (y,) = placement.run([torch.zeros(slot.at(0)) for slot in program.input_slots])
        assert y.shape == program.output_slots[0].at(0)


def test_every_kind_is_drawn() -> None:
    """What this file is for is among what it draws."""
    seen: set[Any] = set()
    for seed in range(300):
        program, batch = drawn(seed)
        for step in program.steps:
            at, e = step.attributes, step.epilogue
            seen.update((step.op, f"rank {len(at['kernel'])}", f"batch {batch}", *(
                word for word, there in (
                    ("stride", max(at["stride"]) > 1), ("dilation", max(at["dilation"]) > 1),
                    ("groups", at.get("groups", 1) > 1),
                    ("one channel", step.inputs[0].shape[1].offset == 1), ("bias", e.bias), ("residual", e.residual),
                    ("late residual", e.residual_last), ("asymmetric", any(a != b for a, b in at["padding"])),
                    ("output padding", any(at.get("output_padding", ()))), ("two layers", len(program.steps) > 1),
                    ("one row", step.output.shape[2].offset == 1)) if there)))
    assert seen >= {"conv", "conv_transpose", "pool", "rank 1", "rank 2", "rank 3", "batch 1", "batch 17", "stride",
                    "dilation", "groups", "one channel", "bias", "residual", "late residual", "asymmetric",
                    "output padding", "two layers", "one row"}
