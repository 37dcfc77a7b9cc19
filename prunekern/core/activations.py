"""Elementwise functions by name: what an ``Activation``'s kind and constants mean, in plain torch.

The same table serves building (the ATen operator and how its arguments become constants), the reference
backend and constant propagation. A kind is a promise to every backend, so it never changes its meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Function = Callable[..., Tensor]

# kind -> function(x, *constants); F(x, out=...) forms are in INTO.
FUNCTIONS: dict[str, Function] = {
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,                            # negative slope
    "elu": lambda x, alpha, scale, inner: torch.ops.aten.elu(x, alpha, scale, inner),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": functional.softplus,                                # beta, threshold
    "softsign": functional.softsign,
    "log_sigmoid": functional.logsigmoid,
    "clamp": torch.clamp,                                           # low, high
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "threshold": functional.threshold,                              # x where x > threshold, else value
    "hardshrink": functional.hardshrink,
    "softshrink": functional.softshrink,
    "exp": torch.exp, "log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "square": torch.square, "abs": torch.abs, "neg": torch.neg, "sin": torch.sin, "cos": torch.cos,
    "erf": torch.erf, "sign": torch.sign, "round": torch.round, "floor": torch.floor, "ceil": torch.ceil,
    "reciprocal": torch.reciprocal,
    "pow": torch.pow,                                               # exponent
}

_ELU = {"alpha": 1.0, "scale": 1.0, "input_scale": 1.0}
_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)


def _call(kind: str, *names: str, **defaults: float) -> Callable[[dict[str, Any]], tuple[str, tuple[float, ...]]]:
    def read(given: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
        return kind, tuple(float(given.get(name, defaults.get(name))) for name in names)  # type: ignore[arg-type]
    return read


def _clamp(given: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
    low, high = given.get("min"), given.get("max")
    if low is None:
        return "clamp_max", (float(high),)  # type: ignore[arg-type]
    return ("clamp_min", (float(low),)) if high is None else ("clamp", (float(low), float(high)))


def _celu(given: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
    alpha = float(given.get("alpha", 1.0))
    return "elu", (alpha, 1.0, 1.0 / alpha)


def _rrelu(given: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
    return "leaky_relu", ((float(given.get("lower", 1 / 8)) + float(given.get("upper", 1 / 3))) / 2,)


def _gelu(given: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
    return ("gelu_tanh" if given.get("approximate") == "tanh" else "gelu"), ()


# ATen operator (in-place underscore removed) -> (its arguments by name) -> (kind, constants)
ATEN: dict[str, Callable[[dict[str, Any]], tuple[str, tuple[float, ...]]]] = {
    **{name: _call(name) for name in (
        "relu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "tanh", "softsign", "log_sigmoid", "exp", "log",
        "log1p", "sqrt", "rsqrt", "square", "abs", "neg", "sin", "cos", "erf", "sign", "floor", "ceil", "reciprocal")},
    "round": _call("round"),
    "relu6": lambda given: ("clamp", (0.0, 6.0)),
    "leaky_relu": _call("leaky_relu", "negative_slope", negative_slope=0.01),
    "elu": _call("elu", "alpha", "scale", "input_scale", **_ELU),
    "celu": _celu,
    "selu": lambda given: ("elu", _SELU),
    "gelu": _gelu,
    "hardtanh": _call("clamp", "min_val", "max_val", min_val=-1.0, max_val=1.0),
    "softplus": _call("softplus", "beta", "threshold", beta=1.0, threshold=20.0),
    "threshold": _call("threshold", "threshold", "value"),
    "hardshrink": _call("hardshrink", "lambd", lambd=0.5),
    "softshrink": _call("softshrink", "lambd", lambd=0.5),
    "rrelu": _rrelu,
    "clamp": _clamp,
    "clamp_min": _call("clamp_min", "min"),
    "clamp_max": _call("clamp_max", "max"),
    "pow": _call("pow", "exponent"),
}


def _into(operator: Any) -> Callable[..., Tensor]:
    return lambda x, *constants, out: operator(x, *constants, out=out)


_out = torch.ops.aten


def _gelu_into(x: Tensor, *, out: Tensor, approximate: str = "none") -> None:
    if x.is_contiguous() and not out.is_contiguous():     # torch 2.13 (oneDNN) writes as if ``out`` were contiguous
        out.copy_(functional.gelu(x, approximate=approximate))
    else:
        _out.gelu.out(x, approximate=approximate, out=out)


# kind -> function(x, *constants, out=y); y may be x. What is missing has no such form.
INTO: dict[str, Callable[..., Any]] = {
    **{kind: _into(getattr(torch, kind)) for kind in (
        "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "exp", "log", "log1p", "sqrt", "rsqrt", "square", "abs",
        "neg", "sin", "cos", "erf", "sign", "round", "floor", "ceil", "reciprocal", "pow")},
    "relu": lambda x, out: torch.clamp_min(x, 0, out=out),
    "leaky_relu": _into(_out.leaky_relu.out),
    "elu": _into(_out.elu.out),
    "gelu": _gelu_into,
    "gelu_tanh": partial(_gelu_into, approximate="tanh"),
    "silu": _into(_out.silu.out),
    "mish": _into(_out.mish.out),
    "hardswish": _into(_out.hardswish.out),
    "hardsigmoid": _into(_out.hardsigmoid.out),
    "softplus": _into(_out.softplus.out),
    "threshold": _into(_out.threshold.out),
    "hardshrink": _into(_out.hardshrink.out),
    "softshrink": _into(_out.softshrink.out),
}


def apply(kind: str, constants: tuple[float, ...], x: Tensor) -> Tensor:
    """A new tensor: the function of every element."""
    return FUNCTIONS[kind](x, *constants)


def apply_into(kind: str, constants: tuple[float, ...], x: Tensor, out: Tensor) -> None:
    """The same, written to ``out`` (which may be ``x``)."""
    into = INTO.get(kind)
    if into is None:
        out.copy_(FUNCTIONS[kind](x, *constants))
    else:
        into(x, *constants, out=out)
