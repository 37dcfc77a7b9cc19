"""Norms and means that count channels which have left, as zeros: what makes them exact to prune.

A layer norm over C channels of which n remain is no layer norm over n: the zeros that the others would be are in its
mean and variance. Of sums over the channels that remain, and C, both follow. With r = n/C, m and v the mean and
variance of what remains, those of all are r m and r v + r (1 - r) m^2; a mean of squares is r times its own.

The operators are torch's own and know ``of``, how many values (for a group norm: channels) there would be. They are
registered as composites, so that autograd, ``torch.compile`` and ``torch.export`` know them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAMESPACE = "prunekern"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _operator(schema: str, function: Any) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _normalised(x: Tensor, axes: Sequence[int], eps: float, of: int, centred: bool) -> Tensor:
    """x [..., of which ``of`` values there would be along the axes] less its mean, over its deviation."""
    wide = x.float() if x.dtype in (torch.half, torch.bfloat16) else x         # as torch's own norms have it
    share = math.prod(x.shape[axis] for axis in axes) / of
    if not centred:
        scaled: Tensor = wide * (wide.square().mean(tuple(axes), True) * share + eps).rsqrt()
        return scaled.to(x.dtype)
    variance, mean = torch.var_mean(wide, tuple(axes), correction=0, keepdim=True)
    spread = variance * share + mean.square() * (share * (1 - share))
    return ((wide - mean * share) * (spread + eps).rsqrt()).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _last(normalized_shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


def _layer_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float,
                of: int) -> Tensor:
    return _affine(_normalised(input, _last(normalized_shape), eps, of, True), weight, bias)


def _rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None,
              of: int) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(_normalised(input, _last(normalized_shape), eps, of, False), weight, None)


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
                of: int) -> Tensor:
    if num_groups != 1:
        raise RuntimeError(f"channels are counted in one group, not in {num_groups}.")
    column = (-1, *[1] * (input.dim() - 2))
    vectors = (vector if vector is None else vector.view(column) for vector in (weight, bias))
    of *= math.prod(input.shape[2:])
    return _affine(_normalised(input, range(1, input.dim()), eps, of, True), *vectors)


def _mean(input: Tensor, dim: Sequence[int] | None, keepdim: bool, of: int, dtype: torch.dtype | None = None) -> Tensor:
    axes = tuple(dim) if dim else tuple(range(input.dim()))
    return input.mean(axes, keepdim, dtype=dtype) * (math.prod(input.shape[axis] for axis in axes) / of)


LAYER_NORM = _operator("counted_layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, "
                       "float eps, int of) -> Tensor", _layer_norm)
RMS_NORM = _operator("counted_rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, float? eps, int of) "
                     "-> Tensor", _rms_norm)
GROUP_NORM = _operator("counted_group_norm(Tensor input, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, "
                       "int of) -> Tensor", _group_norm)
MEAN = _operator("counted_mean(Tensor input, int[]? dim, bool keepdim, int of, *, ScalarType? dtype=None) -> Tensor",
                 _mean)
COUNTED = (LAYER_NORM, RMS_NORM, GROUP_NORM, MEAN)


def of(target: Any, args: Sequence[Any]) -> int:
    """How many values (for a group norm: channels) a call of a counted operator counts."""
    return int(args[3] if target is MEAN else args[-1])


class CountedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm of channels some of which have left: ``of`` values are counted, the missing ones as zeros.

    Arguments, results and state dict are those of nn.LayerNorm, of which instances are made by pruning.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), equation 3.
    """

    of: int

    def forward(self, input: Tensor) -> Tensor:
        """input [..., normalized_shape]; the result has its shape."""
        return LAYER_NORM(input, self.normalized_shape, self.weight, self.bias, self.eps, self.of)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, of={self.of}"


class CountedRMSNorm(nn.RMSNorm):
    """nn.RMSNorm of channels some of which have left: the mean is over ``of`` squares, the missing ones being zeros.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """

    of: int

    def forward(self, x: Tensor) -> Tensor:
        """x [..., normalized_shape]; the result has its shape."""
        return RMS_NORM(x, self.normalized_shape, self.weight, self.eps, self.of)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, of={self.of}"


class CountedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm with one group, of channels some of which have left: ``of`` channels are counted."""

    of: int

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, ...]; the result has its shape."""
        return GROUP_NORM(input, 1, self.weight, self.bias, self.eps, self.of)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, of={self.of}"


CLASSES: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.LayerNorm, CountedLayerNorm), (nn.RMSNorm, CountedRMSNorm), (nn.GroupNorm, CountedGroupNorm))
