"""What is returned can be trained, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def trainable(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: under ``torch.inference_mode`` the function runs without gradients, but outside of that mode, since
    tensors that are made in it can never be trained."""
    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)
    return outside
