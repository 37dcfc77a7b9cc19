"""A result is held to fp64 before its time counts."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from prunekern.lower.tolerance import error, limit


def hold(out: Tensor, own: Tensor, exact: Tensor) -> None:
    """``out`` against fp64, next to torch's own result in the same dtype; by ``prunekern.lower.tolerance``."""
    found, torch_error = error(out, exact), error(own, exact)
    allowed = limit(torch_error, out.dtype)
    assert found <= allowed, f"error {found:.1e} of max|output| is above {allowed:.1e} (torch's own: {torch_error:.1e})"


@torch.no_grad()
def hold_to_model(out: Tensor, model: nn.Module, x: Tensor) -> None:
    """A network's output against the model's, in fp64 terms."""
    hold(out, model(x), copy.deepcopy(model).double()(x.double()))
