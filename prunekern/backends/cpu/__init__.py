"""The `cpu` backend: a whole Program in one native call of the C++ engine (csrc/cpu/)."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunekern.backends.base import Placement, Signature, check_options
from prunekern.backends.cpu import bf16
from prunekern.backends.cpu.builder import Key
from prunekern.backends.cpu.convs import Conv
from prunekern.backends.cpu.layout import Compiler, Settings
from prunekern.backends.cpu.linear import Linear
from prunekern.backends.cpu.moves import Cat, Constant, Move
from prunekern.backends.cpu.native import isa
from prunekern.backends.cpu.options import Options
from prunekern.backends.cpu.parted import PartedPlacement
from prunekern.backends.cpu.placement import CpuPlacement
from prunekern.backends.cpu.recurrent import Recurrent
from prunekern.backends.cpu.simple import SIMPLE
from prunekern.backends.cpu.transposed import ConvTranspose
from prunekern.backends.cpu.tuner import Job, parts, tune
from prunekern.backends.reference.slices import resized
from prunekern.core.program import Program
from prunekern.errors import BackendUnavailable
from prunekern.kernels import unavailable

COMPILERS: dict[str, Compiler] = {"conv": Conv(), "conv_transpose": ConvTranspose(), "linear": Linear(),
                                  "move": Move(), "cat": Cat(), "constant": Constant(), "recurrent": Recurrent(),
                                  **SIMPLE}


class CpuBackend:
    """See ``backends.base.Backend``; ``options`` say what is up to the user."""

    name = "cpu"
    devices = ("cpu",)

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self._packs: dict[int, dict[Key, Tensor]] = {}

    def unavailable(self) -> str | None:
        return unavailable()

    def configured(self, **options: Any) -> CpuBackend:
        check_options(self.name, options, Options.names())
        if not options:
            return self
        chosen = Options(**options)
        if chosen.dtype == "bf16" and (reason := self.unavailable() or bf16.unavailable()) is not None:
            raise BackendUnavailable(f'dtype="bf16" cannot run here: {reason}. Leave it out: fp32 runs everywhere.')
        return CpuBackend(chosen)

    def place(self, program: Program, signature: Signature, hasty: bool = False) -> Placement:
        threads = self.options.num_threads or torch.get_num_threads()
        settings = Settings(isa(), threads, dict(self.options.algorithms), self.options.weights,
                            self.options.dtype)
        mode = "off" if hasty else self.options.tuning

        whole = Job(program, signature, settings, COMPILERS, self._packs_of(program))

        def part(batch: int) -> CpuPlacement:
            job = whole if batch == signature.batch else replace(whole, signature=resized(program, signature, batch))
            tuning = tune(job, mode)
            return job.at(tuning.choices, tuning.slices)
        placements = [part(batch) for batch in parts(whole)]
        return placements[0] if len(placements) == 1 else PartedPlacement(program, signature, placements)

    def _packs_of(self, program: Program) -> dict[Key, Tensor]:
        """Packed weights are shared by all placements of a Program, and go with it."""
        key = id(program)
        if key not in self._packs:
            self._packs[key] = {}
            weakref.finalize(program, self._packs.pop, key, None)
        return self._packs[key]


__all__ = ["CpuBackend", "CpuPlacement"]
