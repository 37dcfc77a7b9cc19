"""Elementwise functions by name, for epilogues: kinds and constants as ``prunekern.core.activations`` has them.

NaN goes through all of them, as in torch. Where exponentials cancel (tanh, expm1 and log1p near 0), series take over:
errors stay at a few units in the last place of the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

# kind -> the same in plain torch
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu, "leaky_relu": functional.leaky_relu,
    "elu": lambda x, alpha, scale, inner: torch.ops.aten.elu(x, alpha, scale, inner),
    "gelu": functional.gelu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu, "mish": functional.mish, "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "softplus": functional.softplus, "softsign": functional.softsign, "log_sigmoid": functional.logsigmoid,
    "clamp": torch.clamp, "clamp_min": torch.clamp_min, "clamp_max": torch.clamp_max,
    "threshold": functional.threshold, "hardshrink": functional.hardshrink, "softshrink": functional.softshrink,
    "exp": torch.exp, "log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "square": torch.square, "abs": torch.abs, "neg": torch.neg, "sin": torch.sin, "cos": torch.cos, "erf": torch.erf,
    "sign": torch.sign, "floor": torch.floor, "ceil": torch.ceil, "reciprocal": torch.reciprocal}
KINDS = frozenset(REFERENCES)


def takes(kind: str | None) -> bool:
    """Whether an activation (None: none at all) can be computed in an epilogue."""
    return kind is None or kind in KINDS


@triton.jit
def tanh(x):
    t = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - t) / (1.0 + t)
    s = x * x
    small = x * (1.0 + s * (-0.333333333 + s * (0.133333333 + s * (-0.0539682540 + s * 0.0218694885))))
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def expm1(x):
    small = x * (1.0 + x * (0.5 + x * (0.166666667 + x * (0.0416666667 + x * (0.00833333333 + x * (
        0.00138888889 + x * (0.000198412698 + x * 0.0000248015873)))))))
    return tl.where(tl.abs(x) < 0.5, small, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    # W. Kahan's correction for the rounding of 1 + x.
    u = 1.0 + x
    near = u == 1.0
    return tl.where(near, x, tl.where(u == float("inf"), u, tl.log(u) * (x / tl.where(near, 1.0, u - 1.0))))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def smooth(x, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Kinds that need exponentials and logarithms."""
    if ACT == "silu":
        return x * sigmoid(x)
    elif ACT == "sigmoid":
        return sigmoid(x)
    elif ACT == "tanh":
        return tanh(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "elu":
        return tl.where(x > 0, x * P1, expm1(x * P2) * (P0 * P1))
    elif ACT == "mish":
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        t = e * (e + 2.0)
        return tl.where(x > 20.0, x, x * (t / (t + 2.0)))
    elif ACT == "softplus":
        b = x * P0
        return tl.where(b > P1, x, log1p(tl.exp(tl.where(b > P1, 0.0, b))) / P0)
    elif ACT == "log_sigmoid":
        return tl.where(x < 0, x, 0.0) - log1p(tl.exp(-tl.abs(x)))
    elif ACT == "exp":
        return tl.exp(x)
    elif ACT == "log":
        return tl.log(x)
    elif ACT == "log1p":
        return log1p(x)
    elif ACT == "sin":
        return tl.sin(x)
    elif ACT == "cos":
        return tl.cos(x)
    else:
        tl.static_assert(ACT == "erf", "no such activation")
        return tl.erf(x)


@triton.jit
def activate(x, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """``ACT`` of fp32 values; its constants are P0, P1 and P2. ACT = "": x itself."""
    if ACT == "":
        return x
    elif ACT == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACT == "clamp":
        return tl.where(x < P0, P0, tl.where(x > P1, P1, x))
    elif ACT == "clamp_min":
        return tl.where(x < P0, P0, x)
    elif ACT == "clamp_max":
        return tl.where(x > P0, P0, x)
    elif ACT == "leaky_relu":
        return tl.where(x < 0, x * P0, x)
    elif ACT == "hardswish":
        return x * tl.where(x < -3.0, 0.0, tl.where(x > 3.0, 6.0, x + 3.0)) / 6.0
    elif ACT == "hardsigmoid":
        return tl.where(x < -3.0, 0.0, tl.where(x > 3.0, 6.0, x + 3.0)) / 6.0
    elif ACT == "softsign":
        return x / (1.0 + tl.abs(x))
    elif ACT == "threshold":
        return tl.where(x <= P0, P1, x)
    elif ACT == "hardshrink":
        return tl.where(tl.abs(x) <= P0, 0.0, x)
    elif ACT == "softshrink":
        return tl.where(x > P0, x - P0, tl.where(x < -P0, x + P0, x * 0.0))
    elif ACT == "sqrt":
        return tl.sqrt_rn(x)
    elif ACT == "rsqrt":
        return 1.0 / tl.sqrt_rn(x)
    elif ACT == "square":
        return x * x
    elif ACT == "abs":
        return tl.abs(x)
    elif ACT == "neg":
        return -x
    elif ACT == "sign":
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    elif ACT == "floor":
        return tl.floor(x)
    elif ACT == "ceil":
        return tl.ceil(x)
    elif ACT == "reciprocal":
        return 1.0 / x
    else:
        return smooth(x, ACT, P0, P1, P2)
