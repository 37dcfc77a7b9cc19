"""Chooses algorithms and the slice of the batch by measuring them in place: in the whole network, op by op, with the
caches as they are there.

Every algorithm gets a variant of the network in which all convolutions that it takes run by it; each convolution keeps
the one that was fastest for it. Forms of values are a choice for neighbours together, so the best mixture of all and
the best with channels last only are then measured whole. Results are kept on disk, by the shapes of the network, the
machine, its instruction set and the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekern.backends.base import Signature
from prunekern.backends.cpu.builder import Key
from prunekern.backends.cpu.convs import GEMM, algorithms
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.layout import Compiler, Settings
from prunekern.backends.cpu.native import extension
from prunekern.backends.cpu.place import Form
from prunekern.backends.cpu.placement import CpuPlacement
from prunekern.backends.reference.slices import independent, resized
from prunekern.core.files import cache_folder, write_text
from prunekern.core.program import Program
from prunekern.errors import PrunekernError
from prunekern.lower.tolerance import error

log = logging.getLogger("prunekern")

VERSION = 1                                   # of what is on disk; kernels that change much are a new one
SECONDS = {"quick": 0.06, "full": 0.6}        # of measuring, for each variant
ROUNDS = {"quick": 3, "full": 10}             # at least
SAME = 2e-2                                   # of max|output|: above what rounding does in any network, below any bug
ROUNDED_SAME = 4.0                            # ... and so many times as far as rounding the weights brings it
GAIN = 0.97                                   # another form of values must be this much faster to be worth it
LAST_CACHE = 8 << 20                          # bytes of the last cache that a core may count on
LANES, MOST = 16, 4                           # images that fill registers, and how many registers of them to try
SLICE_BYTES = 1 << 20                         # of arena that a slice should take: a core's second cache


@dataclass(frozen=True)
class Tuning:
    """choices: step name (on disk: which convolution it is) -> algorithm. slices: of the batch."""

    choices: Mapping[str, str] = field(default_factory=dict)
    slices: int = 1


@dataclass(frozen=True)
class Job:
    """All that a placement is made of, but for what is tuned."""

    program: Program
    signature: Signature
    settings: Settings
    compilers: Mapping[str, Compiler]
    packs: dict[Key, Tensor]

    def at(self, choices: Mapping[str, str], slices: int = 1, batch: int | None = None) -> CpuPlacement:
        """batch: of one slice alone, which runs on one thread as it will beside others."""
        settings = replace(self.settings, choices={**choices, **self.settings.choices})
        if batch is None or batch == self.signature.batch:
            return CpuPlacement(self.program, self.signature, settings, self.compilers, self.packs, slices)
        signature = resized(self.program, self.signature, batch)
        return CpuPlacement(self.program, signature, replace(settings, threads=1), self.compilers, self.packs)

    @cached_property
    def sample_bytes(self) -> int | None:
        """Bytes of the arena of one sample, where the batch may be cut: samples do not meet, and all steps are the
        engine's. None where it stays whole."""
        if self.signature.batch == 1 or not independent(self.program):
            return None
        one = self.at({}, batch=1)
        return None if one.builder.foreign else max(1, one.arena.size)


def tune(job: Job, mode: str) -> Tuning:
    """What to build. mode: "off", "quick" or "full"; see ``Options``."""
    guess = Tuning(slices=_guess_slices(job))
    if mode == "off":
        return guess
    cache = Cache()
    key = _key(job, mode)
    found = cache.get(key)
    if found is None:
        start = time.perf_counter()
        found = Tuner(job, mode).run(guess)
        log.info("tuned %d convolutions in %.1f s", len(found.choices), time.perf_counter() - start)
        cache.put(key, found)
    names = [step.name for step in job.program.steps if step.op == "conv"]
    tuning = replace(found, choices={names[int(number)]: name for number, name in found.choices.items()})
    if agrees(job, tuning):
        return tuning
    log.warning("what the tuner chose for batch %d does not give the network's output on this machine; running the "
                "guesses instead. Please report it.", job.signature.batch)
    return guess


def agrees(job: Job, tuning: Tuning) -> bool:
    """Whether a slice of random inputs gives what it gives by plain matrix products: a safeguard for shapes that
    nobody has verified, not a measure of accuracy. Where less than fp32 was asked for, it may be a few times as far
    from them as rounding the weights alone brings them."""
    batch, settings = job.signature.batch // tuning.slices, job.settings

    def outputs(job: Job, choices: Mapping[str, str]) -> list[Tensor]:
        found, run = _call(job.at(choices, batch=batch))
        run()
        return [each for each in found if each.is_floating_point()]
    exact = replace(job, settings=replace(settings, dtype="fp32", weights="fp32"), packs={})    # nobody keeps those
    direct = {step.name: GEMM.name for step in job.program.steps if step.op == "conv"}
    ours, plain = outputs(job, tuning.choices), outputs(exact, direct)
    moved = [0.0] * len(plain)
    if exact.settings != settings:
        narrow = torch.bfloat16 if settings.dtype == "bf16" else torch.float16
        weights = {name: weight.to(narrow).to(weight) if weight.dim() > 1 else weight
                   for name, weight in job.program.weights.items()}
        rounded = outputs(replace(exact, program=replace(job.program, weights=weights), packs={}), direct)
        moved = [error(x, y) for x, y in zip(rounded, plain, strict=True)]
    return all(error(x, y) <= SAME + ROUNDED_SAME * most for x, y, most in zip(ours, plain, moved, strict=True))


def _tunable(job: Job, batch: int) -> dict[str, list[str]]:
    """Convolutions, and the algorithms that take them in slices of this size."""
    builder, known = job.at({}, batch=batch).builder, algorithms(job.settings.dtype).values()
    found = {}
    for step in job.program.steps:
        if step.op == "conv" and step.name not in builder.foreign:
            geometry = Geometry.of(builder, step)
            found[step.name] = [a.name for a in known if a.takes(geometry) is None]
    return found


# ---- slices of the batch -----------------------------------------------------------------------------------------


def divisors(batch: int) -> list[int]:
    return [n for n in range(1, batch + 1) if batch % n == 0]


def _wanted(job: Job, arena: int = SLICE_BYTES) -> int:
    """Samples whose arena takes so many bytes, and a slice for each thread at least; all, if the batch stays whole."""
    each, batch = job.sample_bytes, job.signature.batch
    return batch if each is None else max(1, min(arena // each, batch // job.settings.threads))


def _guess_slices(job: Job) -> int:
    wanted, batch = _wanted(job, _weighty(job)), job.signature.batch
    return batch // max(n for n in divisors(batch) if n <= wanted)


def _weighty(job: Job) -> int:
    """Bytes of a slice's arena where weights are read once for each slice: as many as there are of them, but what the
    last cache holds at most."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in job.program.weights.values())
    return min(max(weights, SLICE_BYTES), LAST_CACHE)


def parts(job: Job) -> list[int]:
    """The batch, or where its divisors are far from a good slice: most of it in good slices, and the rest."""
    wanted, batch = _wanted(job), job.signature.batch
    if 2 * max(n for n in divisors(batch) if n <= wanted) >= wanted:
        return [batch]
    unit = min(1 << (wanted.bit_length() - 1), LANES) * job.settings.threads
    return [batch - batch % unit, batch % unit] if unit < batch and batch % unit else [batch]


# ---- measuring ---------------------------------------------------------------------------------------------------


class Tuner:
    """Measures variants of one placement."""

    def __init__(self, job: Job, mode: str) -> None:
        self.job, self.mode = job, mode
        self.forms = {name: each.form for name, each in algorithms(job.settings.dtype).items()}

    def run(self, guess: Tuning) -> Tuning:
        kept, batch = dict(self.job.packs), self.job.signature.batch
        small = max(n for n in divisors(batch) if n <= _wanted(self.job))
        sizes = {batch // guess.slices, small}
        whole = [n for n in divisors(batch) if n % LANES == 0 and n <= MOST * LANES]
        if whole and self.job.sample_bytes is not None:
            sizes.add(whole[0])                      # images fill the registers
        found = {size: self._algorithms(size) for size in sizes}
        threads = self.job.settings.threads          # slices run side by side
        size = min(found, key=lambda n: found[n][1] / (threads if n < batch else 1))
        choices = found[size][0]
        if self.job.sample_bytes is not None:
            size = self._size(choices, size)
        self.job.packs.clear()                       # of variants that nobody runs
        self.job.packs.update(kept)
        numbers = {step.name: str(i) for i, step in enumerate(s for s in self.job.program.steps if s.op == "conv")}
        return Tuning({numbers[step]: name for step, name in choices.items()}, batch // size)

    def _algorithms(self, batch: int) -> tuple[dict[str, str], float]:
        """The fastest algorithm of every convolution in slices of this size, and the seconds per sample then."""
        seconds = self._variants(batch)
        forms = [form for form in Form if any(form is self.forms[name] for times in seconds.values() for name in times)]
        mixtures = {form.value: {step: self._fastest(times, form) for step, times in seconds.items()} for form in forms}
        mixtures["any"] = {step: self._fastest(times) for step, times in seconds.items()}
        totals = self._totals({key: self.job.at(choices, batch=batch) for key, choices in mixtures.items()})
        best = min(totals, key=totals.__getitem__)
        last = Form.LAST.value
        if last in totals and totals[best] > GAIN * totals[last]:
            best = last
        return mixtures[best], totals[best]

    def _variants(self, batch: int) -> dict[str, dict[str, float]]:
        """Convolution -> algorithm -> least seconds, each algorithm wherever it can."""
        steps = _tunable(self.job, batch)
        seconds: dict[str, dict[str, float]] = {}
        alone: dict[str, float] = {}                 # least time of steps that no other one does
        absorbed: list[tuple[str, str, str]] = []    # (step, algorithm, another step that it does too)
        for name in dict.fromkeys(name for names in steps.values() for name in names):
            variant = {step: name for step, names in steps.items() if name in names}
            placement = self.job.at(variant, batch=batch)
            done = placement.builder.absorbed
            for step, time_ in self._per_step(placement).items():
                if step in variant and step not in done:
                    seconds.setdefault(step, {})[name] = time_
                if step not in done:
                    alone[step] = min(time_, alone.get(step, float("inf")))
            absorbed += [(by, name, step) for step, by in done.items() if by in variant]
        for step, name, other in absorbed:           # its time is for both
            seconds[step][name] -= alone.get(other, 0.0)
        return seconds

    def _fastest(self, times: Mapping[str, float], form: Form | None = None) -> str:
        fitting = {name: t for name, t in times.items() if form in (None, self.forms[name])} or times
        return min(fitting, key=fitting.__getitem__)

    def _per_step(self, placement: CpuPlacement) -> dict[str, float]:
        """Least nanoseconds of every step, run in place."""
        return placement.least(SECONDS[self.mode], ROUNDS[self.mode])

    def _totals(self, placements: Mapping[Any, CpuPlacement]) -> dict[Any, float]:
        """Least seconds of whole runs per sample, taking turns."""
        calls = {key: _call(placement)[1] for key, placement in placements.items()}
        for call in calls.values():
            call()
        least = dict.fromkeys(calls, float("inf"))
        deadline, rounds = time.perf_counter() + SECONDS[self.mode] * len(calls), 0
        while rounds < ROUNDS[self.mode] or time.perf_counter() < deadline:
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                least[key] = min(least[key], time.perf_counter() - start)
            rounds += 1
        return {key: each / placements[key].signature.batch for key, each in least.items()}

    def _size(self, choices: Mapping[str, str], size: int) -> int:
        """The size of a slice that takes least time per sample: the given one or a neighbour, or any."""
        threads, batch = self.job.settings.threads, self.job.signature.batch
        sizes = [n for n in divisors(batch) if n == batch or batch // n >= threads]
        at = sizes.index(size) if size in sizes else 0
        near = sizes[max(0, at - 1):at + 2] if self.mode == "quick" else sizes
        near = [n for n in near if size % LANES or n % LANES == 0]
        totals = self._totals({n: self.job.at(choices, batch=n) for n in near})
        # Slices run side by side; the whole batch has all threads already.
        return int(min(totals, key=lambda n: totals[n] / (threads if n < batch else 1)))


def _call(placement: CpuPlacement) -> tuple[list[Tensor], Callable[[], object]]:
    """Outputs, and what computes them from random inputs."""
    generator = torch.Generator().manual_seed(0)
    batch = placement.signature.batch
    inputs = [torch.randn(slot.at(batch), generator=generator) if slot.dtype.is_floating_point
              else torch.zeros(slot.at(batch), dtype=slot.dtype) for slot in placement.program.input_slots]
    outputs = [torch.empty(slot.at(batch), dtype=slot.dtype) for slot in placement.program.output_slots]
    return outputs, lambda: placement.run_into(inputs, outputs)


# ---- on disk -----------------------------------------------------------------------------------------------------


def _key(job: Job, mode: str) -> str:
    """Names what was measured: all shapes, the machine, the engine, and how thoroughly."""
    steps = [[step.op, [slot.at(job.signature.batch) for slot in (*step.reads, *step.outputs)],
              {k: v for k, v in step.attributes.items() if k != "args"}, bool(step.epilogue.bias),
              str(step.epilogue.activation)] for step in job.program.steps]
    extension_file = Path(extension().__file__)
    told = json.dumps([VERSION, steps, job.settings.isa.name, job.settings.threads, job.settings.weights,
                       job.settings.dtype,
                       sorted(job.settings.choices.items()), mode, processor(), extension_file.stat().st_size],
                      default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Cache:
    """Tunings by key, one small file each; what cannot be read or written is measured again."""

    def __init__(self) -> None:
        self.folder = cache_folder("tune")

    def get(self, key: str) -> Tuning | None:
        try:
            return Tuning(**json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def put(self, key: str, tuning: Tuning) -> None:
        try:
            write_text(self.folder / f"{key}.json", json.dumps(asdict(tuning), indent=1) + "\n")
        except (OSError, PrunekernError) as error:
            log.info("the tuning is not kept: %s", error)
