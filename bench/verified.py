"""A result is held to fp64 before its time counts."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunekern.lower.tolerance import FACTOR, error, limit


def allowed(torch_error: float, dtype: torch.dtype, algorithms: Iterable[str] = ()) -> float:
    """The largest error that passes where these algorithms took part: that of the least exact of them."""
    rows = {name if name in FACTOR else "direct" for name in algorithms} or {"direct"}
    return max(limit(torch_error, dtype, row) for row in rows)


def hold(out: Tensor, own: Tensor, exact: Tensor, algorithms: Iterable[str] = ()) -> None:
    """``out`` against fp64, next to torch's own result in the same dtype; by ``prunekern.lower.tolerance``."""
    found, torch_error = error(out, exact), error(own, exact)
    most = allowed(torch_error, out.dtype, algorithms)
    assert found <= most, f"error {found:.1e} of max|output| is above {most:.1e} (torch's own: {torch_error:.1e})"


@torch.no_grad()
def hold_to_model(out: Tensor, model: nn.Module, x: Tensor, algorithms: Iterable[str] = ()) -> None:
    """A network's output against the model's, in fp64 terms."""
    hold(out, model(x), copy.deepcopy(model).double()(x.double()), algorithms)
