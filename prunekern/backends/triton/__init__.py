"""The `triton` backend: Programs on NVIDIA GPUs, by the kernels of ``kernels/prunekern_triton``.

Nothing here imports triton before a network is placed. With ``TRITON_INTERPRET=1`` in the environment the same kernels
run on CPU tensors, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekern.backends.base import Placement, Signature, check_options
from prunekern.backends.triton.options import Options
from prunekern.core.program import Program

OLDEST = (8, 0)         # compute capability: asynchronous copies, bf16 and tf32
CHECKOUT = Path(__file__).parents[3] / "kernels"


def interpreted() -> bool:
    """Whether kernels are interpreted on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unavailable() -> str | None:
    """Why no kernel can run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; torch for CUDA brings it along, and elsewhere `pip install triton` does"
    if not find_kernels():
        return "the package prunekern_triton is not installed; install prunekern again"
    if interpreted():
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one that is"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: there is no NVIDIA GPU, or no driver for one"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return (f"the GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need "
                f"{OLDEST[0]}.{OLDEST[1]} (Ampere) or newer")
    return None


def find_kernels() -> bool:
    """Makes `prunekern_triton` importable: installed beside this package, or in the checkout that this file is in."""
    if importlib.util.find_spec("prunekern_triton") is not None:
        return True
    if not (CHECKOUT / "prunekern_triton").is_dir():
        return False
    sys.path.append(str(CHECKOUT))
    return True


class TritonBackend:
    """See ``backends.base.Backend``; ``options`` say what is up to the user."""

    name = "triton"

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self._packs: dict[int, dict[Any, Tensor]] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        return ("cuda", "cpu") if interpreted() else ("cuda",)

    def unavailable(self) -> str | None:
        return unavailable()

    def configured(self, **options: Any) -> TritonBackend:
        check_options(self.name, options, Options.names())
        return TritonBackend(Options(**options)) if options else self

    def place(self, program: Program, signature: Signature, hasty: bool = False) -> Placement:
        find_kernels()
        from prunekern.backends.triton.placement import place
        return place(program, signature, self.options, self._packs_of(program), hasty)

    def _packs_of(self, program: Program) -> dict[Any, Tensor]:
        """Packed weights are shared by all placements of a Program, and go with it."""
        key = id(program)
        if key not in self._packs:
            self._packs[key] = {}
            weakref.finalize(program, self._packs.pop, key, None)
        return self._packs[key]


__all__ = ["Options", "TritonBackend"]
