"""Random numbers: seeding everything, and training without disturbing anybody else's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python's, numpy's and torch's global generators (all CUDA devices too).

    `deterministic` also makes torch choose deterministic algorithms, warning where there is none.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


@contextmanager
def forked_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators (CPU, and `device` if CUDA) seeded inside, and afterwards as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would reseed every CUDA device, also those that are not forked.
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def rng_states(device: torch.device, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Everything that decides the random numbers still to come, as uint8 tensors."""
    states = {"cpu": torch.get_rng_state(), "order": generator.get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(device: torch.device, generator: torch.Generator, states: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_states` gave."""
    torch.set_rng_state(states["cpu"])
    generator.set_state(states["order"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
