"""Checkpoints of a training run: one safetensors file, tensors inside, everything else as JSON in its header.

One file, replaced atomically, so a run killed at any moment finds a whole checkpoint or none. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from prunekern.core.files import write_atomically
from prunekern.errors import ArtefactError

FORMAT = "prunekern-training-1"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy, on the model's devices, of every parameter and persistent buffer."""
    return {name: value.detach().clone() for name, value in _tensors(model).items()}


def put_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the model's own tensors: identities, layouts and devices stay."""
    with torch.no_grad():
        for name, value in _tensors(model).items():
            value.copy_(state[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and values of the model's state."""
    digest = hashlib.sha256()
    for name, value in _tensors(model).items():
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `index/name` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": value
        for index, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def put_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; learning rates and other settings stay the optimizer's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(path: str | os.PathLike[str], run: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write `parts` (section -> name -> tensor) and `run` (JSON) to `path`, atomically.

    Raises `ArtefactError` if the disk will not have it.
    """
    tensors = {
        f"{section}:{name}": value.detach().cpu().contiguous().clone()
        for section, entries in parts.items()
        for name, value in entries.items()
    }
    content = to_safetensors(tensors, {"format": FORMAT, "run": json.dumps(run)})
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise ArtefactError(
            f"checkpoint {path} cannot be written ({error}). Free some space or choose another place."
        ) from error


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """What `save` wrote, on the CPU, or None if there is no file. Raises `ArtefactError` if it is damaged."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ArtefactError(
                    f"checkpoint {path}: format {header.get('format')!r}, expected {FORMAT!r}. "
                    "Name another file, or delete it."
                )
            parts: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                section, name = key.split(":", 1)
                parts.setdefault(section, {})[name] = file.get_tensor(key)
            return json.loads(header["run"]), parts
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtefactError(
            f"checkpoint {path} is damaged ({error}). Delete it to start from the beginning."
        ) from error
