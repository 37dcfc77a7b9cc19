"""The C++ engine (csrc/cpu/) as Python sees it: what it can run here, and how a network of its ops is described."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from prunekern.core.program import Activation
from prunekern.errors import InputError, LoweringError
from prunekern.kernels import unavailable

Field = int | float | list[int]

# The numbers of ``Act`` in csrc/cpu/op.h.
ACTIVATIONS = {kind: number for number, kind in enumerate((
    "none", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid",
    "tanh", "softplus", "softsign", "log_sigmoid", "clamp", "clamp_min", "clamp_max", "threshold", "hardshrink",
    "softshrink", "exp", "log", "log1p", "sqrt", "rsqrt", "square", "abs", "neg", "sin", "cos", "erf", "sign", "round",
    "floor", "ceil", "reciprocal", "pow"))}


def extension() -> Any:
    """The module ``prunekern._C``; call only where ``unavailable()`` is None."""
    return importlib.import_module("prunekern._C")


@dataclass(frozen=True)
class Isa:
    """An instruction set: floats in a register, and most registers in a panel of packed weights."""

    name: str
    lanes: int
    panel: int

    def padded(self, count: int) -> int:
        return -(-count // self.lanes) * self.lanes

    def panels(self, columns: int) -> list[int]:
        """Registers in each panel of that many columns: as even as can be (``Gemm`` in csrc/cpu/kernels/gemm.cpp)."""
        vectors = -(-columns // self.lanes)
        count = -(-vectors // self.panel)
        return [(i + 1) * vectors // count - i * vectors // count for i in range(count)]


def isa() -> Isa:
    """The best instruction set of this machine, or the one that PRUNEKERN_ISA names. Raises InputError."""
    return _isa(os.environ.get("PRUNEKERN_ISA", ""))


@lru_cache
def _isa(wanted: str) -> Isa:
    known: list[str] = extension().instruction_sets()
    name = wanted or known[0]
    if name not in known:
        raise InputError(f"PRUNEKERN_ISA={wanted!r}: this machine and build have {', '.join(known)}; use one of them.")
    return Isa(name, extension().lanes(name), extension().panel_vectors(name))


def instruction_sets() -> list[str]:
    """What this machine can run, best first; empty without the extension."""
    return [] if unavailable() is not None else list(extension().instruction_sets())


def activation_fields(activation: Activation | None) -> dict[str, Field]:
    """The fields of ``Epilogue::of`` (csrc/cpu/epilogue.h) that an Activation becomes."""
    if activation is None:
        return {}
    found: dict[str, Field] = {"act": ACTIVATIONS[activation.kind]}
    found.update({f"act{i}": float(constant) for i, constant in enumerate(activation.constants)})
    return found


@dataclass(frozen=True)
class NativeOp:
    """One op of the engine: its name in csrc/cpu/ops.def, the Step it belongs to, and its fields."""

    op: str
    step: str
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class Recipe:
    """A network to build. slice_bytes: per input, output and constant, from one slice of the batch to the next.

    groups: ops that run as chains, each on one thread from end to end: the first op of every chain and the end of
    the last one. local: bytes of a thread's own memory for what flows through a chain.
    """

    isa: str
    threads: int
    arena: int
    ops: tuple[NativeOp, ...]
    slices: int = 1
    slice_bytes: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    local: int = 0


@dataclass
class Network:
    """A built Recipe. ``keep``: whatever its addresses point into (weights, tables) lives as long as it does."""

    recipe: Recipe
    keep: Sequence[Any]
    handle: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        recipe = self.recipe
        try:
            self.handle = extension().build({
                "isa": recipe.isa, "threads": recipe.threads, "arena": recipe.arena, "slices": recipe.slices,
                "keep": list(self.keep),
                "slice_bytes": list(recipe.slice_bytes), "local": recipe.local,
                "groups": [list(group) for group in recipe.groups],
                "ops": [{"op": op.op, "step": op.step, "fields": dict(op.fields)} for op in recipe.ops]})
        except ValueError as error:
            raise LoweringError(f"{error}; this is a bug of the CPU backend: report the network, and use "
                                "backend=\"reference\" meanwhile.") from error
        self.run = extension().run
        self.times = extension().times


def advise_huge(memory: Tensor) -> None:
    """Large pages for a tensor's memory, where the system has them."""
    extension().advise_huge(memory.data_ptr(), memory.numel() * memory.element_size())
