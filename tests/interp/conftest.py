"""Runs the GPU kernels in Triton's interpreter, on CPU tensors, in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/interp

Whether a kernel is interpreted is settled when it is imported, so elsewhere these tests are left out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
OFF = os.environ.get("TRITON_INTERPRET") != "1"


def _missing() -> str | None:
    """Why nothing can be interpreted here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import numpy
    import triton
    if triton.__version__.startswith("3.6") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        return f"triton {triton.__version__}'s interpreter does not work with numpy {numpy.__version__}"
    return None


collect_ignore_glob = ["test_*.py"] if OFF or _missing() is not None else []
if str(KERNELS) not in sys.path:
    sys.path.insert(0, str(KERNELS))


@pytest.fixture(autouse=True, scope="session")
def _bf16_products() -> Iterator[None]:
    """The interpreter keeps bf16 as bit patterns, and would multiply these; a GPU multiplies what they stand for."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def wide(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return plain(self, wide(a), wide(b), *rest)

    InterpreterBuilder.create_dot = create_dot
    yield
    InterpreterBuilder.create_dot = plain
