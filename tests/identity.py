"""Everything about a model that must be as it was after a call that promises not to modify it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (int, float, str, bool, tuple, list, dict, type(None), torch.dtype, torch.device)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Module objects, classes, modes, plain attributes, hooks, and every tensor: object, flags, gradient, bits."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        plain = {name: repr(value) for name, value in own.items()
                 if isinstance(value, PLAIN) and not name.startswith("_")}
        hooks = {name: [id(hook) for hook in value.values()] for name, value in own.items()
                 if "hooks" in name and isinstance(value, dict)}
        found[path] = id(module), type(module), module.training, plain, hooks, sorted(own)
        for kind in ("_parameters", "_buffers"):
            for name, tensor in own[kind].items():
                found[f"{path}.{name}"] = kind, None if tensor is None else _tensor(tensor)
    return found


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    grad = None if tensor.grad is None else _bits(tensor.grad)
    return (id(tensor), type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(),
            tensor.requires_grad, tensor.is_leaf, grad, _bits(tensor))


def _bits(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()
