"""The reference backend: plain torch, the oracle for all others; runs wherever torch does."""

from __future__ import annotations

from prunekern.backends.base import Signature
from prunekern.backends.reference.engine import Kernels, ReferencePlacement
from prunekern.backends.reference.gemm import GEMM_COMPILERS
from prunekern.backends.reference.simple import SIMPLE_COMPILERS, VIEWS, placed
from prunekern.core.program import Program

KERNELS = Kernels({**GEMM_COMPILERS, **SIMPLE_COMPILERS}, placed, VIEWS)


class ReferenceBackend:
    """See ``backends.base.Backend``."""

    name = "reference"
    devices = ("cpu", "cuda")

    def unavailable(self) -> str | None:
        return None

    def place(self, program: Program, signature: Signature) -> ReferencePlacement:
        return ReferencePlacement(program, signature, KERNELS)


__all__ = ["ReferenceBackend", "ReferencePlacement"]
