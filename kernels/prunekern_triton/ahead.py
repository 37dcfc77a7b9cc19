"""Compiles a launch for a chip that is not there, and reads what came of it out of the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekern_triton.launch import LIMIT, TYPES, Launch

# Matrix units: of Blackwell, Hopper, Ampere; plain multiply-adds; copies: tensor, asynchronous; local memory: spilled
# registers.
COUNTED = ("UTCHMMA", "HGMMA", "HMMA", "FFMA", "FFMA2", "UTMALDG", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one architecture. shared: bytes a block. stack: bytes a thread. counts: machine
    instructions by kind (``COUNTED``)."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    counts: dict[str, int]

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.counts["LDL"] or self.counts["STL"])


def specialised(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """signature, constants and attributes, as Triton's launcher would find them for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    given = {**launch.args, **launch.constants}
    for index, name in enumerate(launch.kernel.arg_names):
        value, aligned = given[name], False
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], aligned = f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name], aligned = "i32" if abs(value) < LIMIT else "i64", value % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:                                       # a tensor descriptor
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_ahead(launch: Launch, arch: int) -> Compiled:
    """Builds machine code (sm_80, 86, 89, 90, 100); needs no GPU. Raises what Triton's compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialised(launch)
    built = triton.compile(ASTSource(launch.kernel, signature, constants, attributes),
                           target=GPUTarget("cuda", arch, 32),
                           options={"num_warps": launch.warps, "num_stages": launch.stages})
    usage, code = _usage(built.asm["cubin"]), built.asm["sass"]
    counts = {kind: len(re.findall(rf"\b{kind}\b", code)) for kind in COUNTED}
    return Compiled(launch.name, arch, usage["REG"], usage["STACK"], int(built.metadata.shared), counts)


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack of the one kernel in a binary, by the toolkit's own reader."""
    from triton import knobs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)], capture_output=True,
                              text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"\b(REG|STACK):(\d+)", told)}
