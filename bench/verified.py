"""A result is held to fp64 before its time counts."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunekern.backends import Lowered
from prunekern.backends.base import Signature
from prunekern.lower.tolerance import error, limit


def error_rows(lowered: Lowered, x: Tensor) -> set[str]:
    """The rows of ``lower/tolerance.py`` that its steps fall under on such an input, where not "direct"."""
    return set(lowered.placement(Signature((tuple(x.shape),), len(x), x.device)).rows.values())


def allowed(torch_error: float, dtype: torch.dtype, rows: Iterable[str] = ()) -> float:
    """The largest error that passes. rows: of the tolerance table, beside "direct"; the loosest one counts."""
    return max(limit(torch_error, dtype, row) for row in ("direct", *rows))


def hold(out: Tensor, own: Tensor, exact: Tensor, rows: Iterable[str] = ()) -> None:
    """``out`` against fp64, next to torch's own result in the same dtype; by ``prunekern.lower.tolerance``."""
    found, torch_error = error(out, exact), error(own, exact)
    most = allowed(torch_error, out.dtype, rows)
    assert found <= most, f"error {found:.1e} of max|output| is above {most:.1e} (torch's own: {torch_error:.1e})"


@torch.no_grad()
def hold_to_model(out: Tensor, model: nn.Module, x: Tensor, rows: Iterable[str] = ()) -> None:
    """A network's output against the model's, in fp64 terms."""
    hold(out, model(x), copy.deepcopy(model).double()(x.double()), rows)
