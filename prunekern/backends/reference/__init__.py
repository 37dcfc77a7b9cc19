"""The reference backend: plain torch, the oracle for all others; runs wherever torch does."""

from __future__ import annotations

from typing import Any

from prunekern.backends.base import Placement, Signature, check_options
from prunekern.backends.reference.engine import Kernels, ReferencePlacement, arena_of
from prunekern.backends.reference.gemm import GEMM_COMPILERS
from prunekern.backends.reference.recurrent import recurrent
from prunekern.backends.reference.simple import SIMPLE_COMPILERS, VIEWS, placed
from prunekern.backends.reference.slices import SlicedPlacement, slice_size
from prunekern.core.program import Program

KERNELS = Kernels({**GEMM_COMPILERS, **SIMPLE_COMPILERS, "recurrent": recurrent}, placed, VIEWS)


class ReferenceBackend:
    """See ``backends.base.Backend``."""

    name = "reference"
    devices = ("cpu", "cuda")

    def unavailable(self) -> str | None:
        return None

    def configured(self, **options: Any) -> ReferenceBackend:
        check_options(self.name, options, ())
        return self

    def place(self, program: Program, signature: Signature, hasty: bool = False) -> Placement:
        size = slice_size(program, signature, arena_of(program, signature.batch, KERNELS))
        if size < signature.batch:
            return SlicedPlacement(program, signature, KERNELS, size)
        return ReferencePlacement(program, signature, KERNELS)


__all__ = ["ReferenceBackend", "ReferencePlacement", "SlicedPlacement"]
