"""Every numeric limit of the test suite.

An error is measured against the same computation in fp64, relative to the largest reference value; limits are multiples
of torch's own error (the same network in the same dtype) plus a floor of a few roundings of the result's own dtype,
since torch's error can be zero by luck.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PROOF = 1e-9
"""Sliced against masked, both in fp64: only the order of summation differs (measured: 5e-15)."""

TEETH = 1e-6
"""The least change that dropping one channel too many must make: far above `PROOF`, below any real one."""

FOLDED = 1e-10
"""Batch norm folded into weights and other exact rewrites, both in fp64."""


class Limit(NamedTuple):
    """`error <= factor * torch's own error + floor`."""

    factor: float
    floor: float


LIMITS: dict[str, dict[str, Limit]] = {
    "direct": {
        "fp64": Limit(2, 1e-14),
        "fp32": Limit(2, 5e-7),
        "tf32": Limit(2, 2e-3),
        "fp16": Limit(2, 2e-3),
        "bf16": Limit(2, 1.6e-2),
    },
    # Lavin & Gray 2015: the transforms add and scale before multiplying. F(2x2) was measured at 5e-7 of
    # max|out| per layer, F(4x4) at 5 to 26 times torch's error and 4e-6 to 2e-5.
    "winograd_f2": {"fp64": Limit(4, 1e-13), "fp32": Limit(4, 2e-6), "tf32": Limit(4, 4e-3)},
    "winograd_f4": {"fp64": Limit(30, 1e-12), "fp32": Limit(30, 2e-5)},
}
"""Algorithm and arithmetic -> limit. Accumulation is in fp32 for everything narrower."""

_ARITHMETIC = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def limit(algorithm: str = "direct", arithmetic: str | torch.dtype = "fp32") -> Limit:
    """The row for an algorithm and an arithmetic (a dtype, or a name such as "tf32"); KeyError if none."""
    name = _ARITHMETIC[arithmetic] if isinstance(arithmetic, torch.dtype) else arithmetic
    return LIMITS[algorithm][name]


def max_err(out: Any, ref64: Any) -> float:
    """`max|out - ref64| / max|ref64|` over a tensor, or the largest over a nest of them.

    Shapes and structure must agree. Anything not finite on one side alone gives infinity; where the
    reference is zero throughout, the absolute error is returned.
    """
    outs, refs = _tensors(out), _tensors(ref64)
    assert len(outs) == len(refs), f"{len(outs)} tensors against {len(refs)} in the reference"
    return max((_error(o, r) for o, r in zip(outs, refs, strict=True)), default=0.0)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _error(out: Tensor, ref: Tensor) -> float:
    assert out.shape == ref.shape, f"shape {tuple(out.shape)} against {tuple(ref.shape)} in the reference"
    if not out.numel():
        return 0.0
    out, ref = out.detach().to("cpu", torch.float64), ref.detach().to("cpu", torch.float64)
    odd = ~(out.isfinite() & ref.isfinite())
    if not torch.equal(out[odd].nan_to_num(nan=0.5), ref[odd].nan_to_num(nan=0.5)):
        return math.inf
    out, ref = out[~odd], ref[~odd]
    if not out.numel():
        return 0.0
    scale = ref.abs().max().item()
    return (out - ref).abs().max().item() / (scale or 1.0)


def assert_close_to_fp64(
    out: Any,
    torch_out: Any,
    ref64: Any,
    *,
    algorithm: str = "direct",
    arithmetic: str | torch.dtype | None = None,
) -> None:
    """Hold `out` to the limit for its algorithm and arithmetic, next to what torch makes of the same.

    `torch_out` is PyTorch's result in the same dtype, `ref64` the result in fp64. The arithmetic is that of
    `out`'s dtype unless named ("tf32" works on fp32 tensors).
    """
    refs = _tensors(ref64)
    assert all(r.dtype == torch.float64 for r in refs if r.is_floating_point()), (
        "the reference is not in fp64"
    )
    if arithmetic is None:
        arithmetic = next(t.dtype for t in _tensors(out) if t.is_floating_point())
    row = limit(algorithm, arithmetic)
    error, own = max_err(out, ref64), max_err(torch_out, ref64)
    bound = row.factor * own + row.floor
    assert error <= bound, (
        f"error {error:.2e} of max|out| is above {bound:.2e} = {row.factor:g} x torch's own {own:.2e} + "
        f"{row.floor:.0e} ({algorithm}, {arithmetic})"
    )


def assert_equal_fp64(out: Any, ref: Any, bound: float = PROOF) -> None:
    """Two fp64 computations of the same thing, as in a proof."""
    for tensor in _tensors(out) + _tensors(ref):
        assert not tensor.is_floating_point() or tensor.dtype == torch.float64, f"{tensor.dtype}, not fp64"
    error = max_err(out, ref)
    assert error <= bound, f"fp64 results differ by {error:.2e} of max|out|, more than {bound:.0e}"
