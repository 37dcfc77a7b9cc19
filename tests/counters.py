"""Two counters that others wrote, made quiet and comparable: the checks for `prunekern.profile`.

Both count multiply-accumulates. fvcore calls them flops; FlopCounterMode counts two operations for each, so
its figures are halved here. Traps that are stepped around:

* PyTorch's fused attention fast path hides its matrix products from both (ViT-B/16: 11.3 G instead of 17.6 G
  multiply-accumulates): it is off while counting, and attention runs through the plain `math` kernel.
* fvcore traces with `torch.jit.trace`, which takes no keyword arguments, numbers or nested outputs: the model
  is called through a wrapper that passes tensors only.
* fvcore's total also holds batch norm, layer norm and pooling: `Count.contractions` is the comparable part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

CONTRACTIONS = frozenset(
    {"conv", "linear", "matmul", "addmm", "mm", "bmm", "baddbmm", "einsum", "convolution", "_convolution"}
)
"""Operators, by either counter's name for them, that multiply activations with weights or each other."""


@dataclass(frozen=True)
class Count:
    """Multiply-accumulates of one call, and what the counter did not know.

    `by_module` and `by_module_and_operator` are keyed by the module's path (the whole model is ""), parents
    include their children. A module called twice counts twice.
    """

    total: int
    by_operator: Mapping[str, int]
    by_module: Mapping[str, int]
    by_module_and_operator: Mapping[str, Mapping[str, int]]
    unsupported: Mapping[str, int] = field(default_factory=dict)

    @property
    def contractions(self) -> int:
        """The part that convolutions, linear layers and matrix products make up."""
        return sum(n for operator, n in self.by_operator.items() if operator in CONTRACTIONS)


def fvcore_count(
    model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None = None
) -> Count:
    """What `fvcore.nn.FlopCountAnalysis` says of `model(*args, **kwargs)`."""
    call = _Call(model, args, kwargs)
    with _plain_attention():
        analysis = _fvcore()(call, call.tensors)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        modules = {_path(name): _integers(n) for name, n in analysis.by_module_and_operator().items()}
        unsupported = _integers(analysis.unsupported_ops())
    return _count(modules, unsupported)


def flopcounter_count(
    model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None = None
) -> Count:
    """What `torch.utils.flop_counter.FlopCounterMode` says of `model(*args, **kwargs)`, halved.

    It cannot tell which operators it skips (recurrent cells, elementwise work): `unsupported` stays empty.
    """
    from torch.utils.flop_counter import FlopCounterMode

    call = _Call(model, args, kwargs)
    counter = FlopCounterMode(display=False)
    with _plain_attention(), counter:
        call(*call.tensors)
    modules = {name: {} for name, _ in model.named_modules(remove_duplicate=False)}
    for name, flops in counter.get_flop_counts().items():
        if name == "Global":
            continue
        modules[_path(name.removeprefix(_Call.__name__).removeprefix("."))] = {
            str(operator).removeprefix("aten."): n // 2 for operator, n in flops.items()
        }
    return _count(modules, {})


def _count(modules: dict[str, dict[str, int]], unsupported: dict[str, int]) -> Count:
    everything = modules.get("", {})
    by_module = {name: sum(operators.values()) for name, operators in modules.items()}
    return Count(sum(everything.values()), everything, by_module, modules, unsupported)


class _Call(nn.Module):
    """`model(*args, **kwargs)` as a function from the tensors among the inputs to those among the outputs."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        args = (args,) if isinstance(args, Tensor) else tuple(args)
        self._leaves, self._structure = tree_flatten((args, dict(kwargs or {})))
        self.tensors = tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return tuple(leaf for leaf in tree_leaves(self.model(*args, **kwargs)) if isinstance(leaf, Tensor))


def _path(name: str) -> str:
    """The path inside the model, whichever way the wrapper shows in it."""
    return "" if name in ("", "model") else name.removeprefix("model.")


def _integers(counts: Mapping[str, Any]) -> dict[str, int]:
    return {name: round(n) for name, n in counts.items()}


@cache
def _fvcore() -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis
    return FlopCountAnalysis


@contextmanager
def _plain_attention() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
