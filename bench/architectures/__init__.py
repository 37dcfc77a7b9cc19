"""The networks of the zoo benchmark: for each library, what is built, and example inputs that its forward takes.

Weights are as initialised: nothing is downloaded. Inputs are the smallest that the network allows, so that a case
takes seconds; the batch is 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

PACKAGES = {"pytorchcv": "pytorchcv", "torchvision": "torchvision", "timm": "timm", "transformers": "transformers",
            "pyg": "torch_geometric"}
ZOOS = tuple(PACKAGES)
OWN = "own"             # the test-suite's hand-built networks: no library is needed
BATCH = 2
Inputs = Any            # a tensor, a tuple of positional or a dict of keyword arguments
Builder = Callable[[], tuple[nn.Module, Inputs]]


@dataclass(frozen=True)
class Architecture:
    """build(): (a network, example inputs); the caller sets the seed and the mode."""

    zoo: str
    name: str
    build: Builder = field(repr=False)

    def make(self) -> tuple[nn.Module, Inputs]:
        """The network in eval mode, and its inputs; the same at every call."""
        torch.manual_seed(0)
        model, inputs = self.build()
        return model.eval(), inputs

    def __str__(self) -> str:
        return f"{self.zoo}/{self.name}"


def architectures(zoo: str) -> Mapping[str, Architecture]:
    """All networks of a zoo by name. Raises ImportError where its library is not installed."""
    return _loaded(zoo)


@cache
def _loaded(zoo: str) -> dict[str, Architecture]:
    builders = import_module(f"bench.architectures.{zoo}").BUILDERS
    return {name: Architecture(zoo, name, build) for name, build in builders.items()}


def _torchvision_operators() -> torch.library.Library | None:
    """Declare two operators without which torchvision, and what imports it, does not load where its binary is for
    another build of torch (CPU, nightly). Few networks of the zoo call them. They are there as long as what is given
    back."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_OPERATORS = _torchvision_operators()           # before any module of this package imports its library


def image(side: int, channels: int = 3, width: int | None = None) -> torch.Tensor:
    """A batch of images."""
    return torch.randn(BATCH, channels, side, width or side)
