"""What a user may choose about the CPU backend, beside the network itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from prunekern.errors import InputError, unknown

TUNE = ("off", "quick", "full")
WEIGHTS = ("fp32", "fp16")
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Options:
    """``lower(model, x, backend="cpu", num_threads=..., ...)``.

    num_threads: of one call; as many as torch uses where it is None.
    tune: which algorithms run is measured on this machine and kept on disk: not at all ("off": sound guesses),
        "quick" (about a second for a large network), or "full". None: what PRUNEKERN_TUNE says, else "quick".
    weights: "fp16" stores them in half the bytes; arithmetic stays fp32. Rounds each weight by up to 2^-11 of itself.
    dtype: "bf16" rounds what convolutions and linear layers multiply to 8 bits, where that is faster; sums,
        all other steps, inputs and outputs stay fp32. Needs AVX512-BF16; not together with weights="fp16".
    algorithms: step name -> algorithm, to force one; steps and names as ``explain()`` shows them.
    """

    num_threads: int | None = None
    tune: str | None = None
    weights: str = "fp32"
    dtype: str = "fp32"
    algorithms: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise InputError(f"num_threads={self.num_threads}: a network needs at least one thread.")
        for name, value, known in (("tune", self.tuning, TUNE), ("weights", self.weights, WEIGHTS),
                                   ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise unknown(name, value, known)
        if self.dtype == "bf16" and self.weights != "fp32":
            raise InputError('dtype="bf16" stores weights as bf16 already: leave weights="fp16" out.')

    @property
    def tuning(self) -> str:
        return self.tune or os.environ.get("PRUNEKERN_TUNE") or "quick"

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(each.name for each in fields(cls))
