"""The `cuda` backend: Programs on NVIDIA GPUs by the C++ library of csrc/api and csrc/cuda: no compiler is needed where
they run, and C++ programs run the same networks (docs/cuda.md)."""

from __future__ import annotations

import weakref
from typing import Any

from prunekern.backends.base import Placement, Signature, check_options
from prunekern.backends.cuda.library import Library, Weights, extension
from prunekern.backends.cuda.options import Options
from prunekern.backends.cuda.placement import CudaPlacement
from prunekern.core.program import Program
from prunekern.kernels import unavailable as no_extension

REBUILD = "`PRUNEKERN_BUILD=cuda pip install -e . --no-build-isolation` where nvcc is"


class CudaBackend:
    """See ``backends.base.Backend``; ``options`` say what is up to the user. library: another one than the extension's
    own; one compiled for the host runs on CPU tensors (``devices``)."""

    name = "cuda"

    def __init__(self, options: Options | None = None, library: Library | None = None,
                 devices: tuple[str, ...] = ("cuda",)) -> None:
        self.options, self.devices = options or Options(), devices
        self._library = library
        self._weights: dict[tuple[int, str], Weights] = {}

    def unavailable(self) -> str | None:
        library = self._library or extension()
        if library is None:
            return no_extension() or f"the C++ extension has no C API; build it again: {REBUILD}"
        return library.unavailable()

    def configured(self, **options: Any) -> CudaBackend:
        check_options(self.name, options, Options.names())
        return CudaBackend(Options(**options), self._library, self.devices) if options else self

    def place(self, program: Program, signature: Signature, hasty: bool = False) -> Placement:
        return CudaPlacement(program, signature, self.options, self._weights_of(program, signature), hasty)

    def _weights_of(self, program: Program, signature: Signature) -> Weights:
        """Packed weights are shared by all placements of a Program, and go with it."""
        index = signature.device.index
        device = "cuda" if index is None else f"cuda:{index}"
        key = (id(program), device)
        if key not in self._weights:
            library = self._library or extension()
            assert library is not None, "placed on a backend that is not available"
            self._weights[key] = Weights(library, program.weights, device)
            weakref.finalize(program, self._weights.pop, key, None)
        return self._weights[key]


__all__ = ["CudaBackend", "Options"]
