"""The table of zoo networks and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tests.weights import randomise_

T = TypeVar("T", bound=Callable[[], nn.Module])
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Case(NamedTuple):
    """A network in eval mode and one call of it: `model(*args, **kwargs)`."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Factory(Protocol):
    """Builds the case; the weights depend on `seed` alone, the inputs hold `batch` samples."""

    __name__: str
    __doc__: str | None

    def __call__(self, batch: int = 2, seed: int = 0) -> Case: ...


ZOO: dict[str, Factory] = {}


def network(
    name: str, *shapes: tuple[int, ...], inputs: Callable[[int], Inputs] | None = None
) -> Callable[[T], T]:
    """Register a module class (or a function that gives a module), with its docstring, under `name`.

    `shapes` are the inputs' shapes without the batch axis (normally distributed floats); networks with
    other inputs pass `inputs(batch) -> (args, kwargs)` instead.
    """

    def register(build: T) -> T:
        assert build.__doc__, f"{name}: a zoo network says in one line what is tricky about it"
        assert name not in ZOO, f"{name}: registered twice"

        def factory(batch: int = 2, seed: int = 0) -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = randomise_(build()).eval()
                args, kwargs = inputs(batch) if inputs else (_noise(batch, shapes), {})
                return Case(model, args, kwargs)

        factory.__name__, factory.__doc__ = name, build.__doc__
        ZOO[name] = factory
        return build

    return register


def _noise(batch: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, *shape) for shape in shapes)


def tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """Integer ids `[batch, length]`."""
    return torch.randint(0, vocabulary, (batch, length))


def conv_bn_act(inp: int, oup: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """The block that most convolutional networks are made of; keeps the map's size at stride 1."""
    return nn.Sequential(
        nn.Conv2d(inp, oup, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(oup),
        nn.ReLU(inplace=True),
    )
