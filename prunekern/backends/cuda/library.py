"""The C API of csrc/api/prunekern.h, as Python sees it: through ctypes, so that the same code drives the extension and
a library of the kernels compiled for the host (tests)."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekern.core.graph import Shape
from prunekern.errors import LoweringError

_Addresses = ctypes.POINTER(ctypes.c_void_p)


class Library:
    """A shared library that offers the C API. Raises OSError where it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = c = ctypes.CDLL(str(path))
        text, handle, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64
        for name, result, arguments in (
                ("unavailable", text, [text]), ("error", text, []),
                ("make_weights", handle, [text, ctypes.c_int, ctypes.POINTER(text), ctypes.POINTER(text),
                                          ctypes.POINTER(ctypes.c_int), ctypes.POINTER(number), _Addresses]),
                ("free_weights", None, [handle]), ("build", handle, [text, handle, text]), ("close", None, [handle]),
                ("describe", text, [handle]), ("run", ctypes.c_int, [handle, _Addresses, _Addresses, handle]),
                ("run_ops", ctypes.c_int, [handle, number, number, _Addresses, _Addresses, handle])):
            function = getattr(c, f"prunekern_{name}")
            function.restype, function.argtypes = result, arguments

    def unavailable(self, device: str = "cuda") -> str | None:
        """Why a device cannot be used, or None."""
        return self.c.prunekern_unavailable(device.encode()).decode() or None

    def error(self) -> str:
        """What went wrong in this thread's last call."""
        return str(self.c.prunekern_error().decode(errors="replace"))


@lru_cache
def extension() -> Library | None:
    """The extension's own library; None where it is not built, or was built before there was a C API."""
    spec = importlib.util.find_spec("prunekern._C")
    if spec is None or spec.origin is None:
        return None
    try:
        return Library(Path(spec.origin))
    except (OSError, AttributeError):
        return None


class Weights:
    """A Program's weights, and on the device whatever networks of it have packed of them."""

    def __init__(self, library: Library, weights: Mapping[str, Tensor], device: str) -> None:
        self.library, self.device = library, device
        self._keep = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        tensors = list(self._keep.values())
        count, sizes = len(tensors), [size for tensor in tensors for size in tensor.shape]
        self.handle = library.c.prunekern_make_weights(
            device.encode(), count, (ctypes.c_char_p * count)(*[name.encode() for name in self._keep]),
            (ctypes.c_char_p * count)(*[str(tensor.dtype).removeprefix("torch.").encode() for tensor in tensors]),
            (ctypes.c_int * count)(*[tensor.dim() for tensor in tensors]),
            (ctypes.c_int64 * len(sizes))(*sizes), addresses(tensors))
        if not self.handle:
            raise LoweringError(f"the weights cannot be put on {device}: {library.error()}")
        weakref.finalize(self, library.c.prunekern_free_weights, self.handle)


@dataclass(frozen=True)
class Spot:
    """Where a slot's value is when its step has run: base 0 is the arena, then inputs and outputs (offset in bytes), -1
    is an address of its own; shape and strides in elements."""

    base: int
    offset: int
    shape: Shape
    stride: Shape
    bytes: int


@dataclass(eq=False)
class Native:
    """A network of the library.

    refusals: step -> why it cannot run; where there are any, it does not run at all. algorithms: step -> how it runs.
    spans: step -> its ops [first, end). way: how the whole of it runs.
    """

    weights: Weights
    handle: int
    refusals: Mapping[str, str]
    algorithms: Mapping[str, str]
    spans: Mapping[str, tuple[int, int]]
    places: Mapping[str, Spot]
    arena: int
    arena_address: int
    way: str

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int) -> None:
        """All of it, on a stream. Raises LoweringError naming the step that failed."""
        self._check(self.weights.library.c.prunekern_run(self.handle, addresses(inputs), addresses(outputs), stream))

    def run_ops(self, first: int, end: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int) -> None:
        """Some ops, one by one."""
        self._check(self.weights.library.c.prunekern_run_ops(self.handle, first, end, addresses(inputs),
                                                             addresses(outputs), stream))

    def _check(self, code: int) -> None:
        if code:
            raise LoweringError(f"the network failed on the GPU: {self.weights.library.error()}. Run it again with "
                                "PRUNEKERN_CUDA_SYNC=1 to be sure which step it was, and report it.")


def build(weights: Weights, program: str, options: Mapping[str, Any]) -> Native:
    """A network from a Program's JSON (``core/storage.to_json``). Raises LoweringError."""
    library = weights.library
    handle = library.c.prunekern_build(program.encode(), weights.handle, json.dumps(options).encode())
    if not handle:
        raise LoweringError(f"the network cannot be placed on {weights.device}: {library.error()}. Use another "
                            "backend, and report the network.")
    about = json.loads(library.c.prunekern_describe(handle).decode())
    places = {name: Spot(base, offset, tuple(shape), tuple(stride), size)
              for name, (base, offset, shape, stride, size) in about["places"].items()}
    native = Native(weights, handle, about["refusals"], about["algorithms"],
                    {name: (first, end) for name, (first, end) in about["spans"].items()}, places, about["arena"],
                    about["arena_address"], about["way"])
    weakref.finalize(native, library.c.prunekern_close, handle)
    return native


def addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * max(1, len(tensors)))(*[tensor.data_ptr() for tensor in tensors])


def memory(address: int, size: int, device: torch.device) -> Tensor:
    """Bytes that somebody else keeps, as a tensor."""
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    about = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None}
    return torch.as_tensor(type("Memory", (), {"__cuda_array_interface__": about})(), device=device)
