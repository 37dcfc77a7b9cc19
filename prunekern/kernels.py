"""The Python face of the C++ extension: each operator beside its plain-torch reference.

The extension is optional. An operator here runs its C++ kernel where that is built and takes the input, and
its reference otherwise; both give the same bits.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunekern.errors import InputError

_CPP_DTYPES = (torch.float32, torch.float64)


_REBUILD = "`PRUNEKERN_BUILD=cpp pip install -e . --no-build-isolation`, with torch installed before"


def unavailable() -> str | None:
    """Why the C++ operators (`torch.ops.prunekern`) cannot be used here, or None when they can."""
    return _REASON


def _load() -> str | None:
    try:
        importlib.import_module("prunekern._C")
    except ModuleNotFoundError:
        note = Path(__file__).with_name("_C.reason")
        why = note.read_text(encoding="utf-8").strip() if note.is_file() else f"build it: {_REBUILD}"
        return f"the C++ extension is not built: {why}"
    except (ImportError, OSError) as error:
        return f"the C++ extension does not load here ({error}); rebuild it: {_REBUILD}"
    torch.library.register_fake("prunekern::im2col_nhwc", _im2col_nhwc_fake)
    return None


def im2col_nhwc(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Patches of a padded channels-last tensor as matrix rows, the left operand of a convolution's GEMM.

    Args:
        x: `[N, *spatial, C]`, already padded, any strides.
        kernel: window size per spatial dimension; with `stride` and `dilation`, one entry for each.
        stride: step between windows.
        dilation: step between a window's taps.

    Returns:
        `[N * prod(out), prod(kernel) * C]`, `out = (in - dilation * (kernel - 1) - 1) // stride + 1`. Rows
        run over (n, *out), columns over (*kernel, c). May share memory with `x`.

    Raises:
        InputError: ranks do not match, a geometry entry is below 1, or a window is larger than the input.

    Source: K. Chellapilla, S. Puri, P. Simard, "High Performance Convolutional Neural Networks for Document
    Processing", IWFHR 2006.
    """
    geometry = (list(kernel), list(stride), list(dilation))
    if not _cpp_takes(x, *geometry):
        return im2col_nhwc_ref(x, *geometry)
    output_size(x.shape, *geometry)
    patches: Tensor = torch.ops.prunekern.im2col_nhwc(x, *geometry)
    return patches


def im2col_nhwc_ref(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """`im2col_nhwc` in plain torch: a strided view, copied by `reshape`."""
    out = output_size(x.shape, kernel, stride, dilation)
    batch, *spatial, channel = x.stride()
    view = x.as_strided(
        (x.shape[0], *out, *kernel, x.shape[-1]),
        (
            batch,
            *(step * s for step, s in zip(spatial, stride, strict=True)),
            *(step * d for step, d in zip(spatial, dilation, strict=True)),
            channel,
        ),
    )
    return view.reshape(x.shape[0] * math.prod(out), math.prod(kernel) * x.shape[-1])


def output_size(
    shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Number of windows along each spatial dimension of an already padded `[N, *spatial, C]`.

    Raises:
        InputError: as `im2col_nhwc`.
    """
    spatial = tuple(shape[1:-1])
    if len(shape) < 3 or not len(spatial) == len(kernel) == len(stride) == len(dilation):
        raise InputError(
            f"im2col_nhwc: x is {list(shape)}, kernel {list(kernel)}, stride {list(stride)}, dilation "
            f"{list(dilation)}; pass x as [N, *spatial, C] and one entry of each per spatial dimension."
        )
    if min(*kernel, *stride, *dilation) < 1:
        raise InputError(
            f"im2col_nhwc: kernel {list(kernel)}, stride {list(stride)}, dilation {list(dilation)}: "
            "every entry must be at least 1."
        )
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    if any(e > size for e, size in zip(extent, spatial, strict=True)):
        raise InputError(
            f"im2col_nhwc: the window covers {list(extent)}, the padded input has only {list(spatial)}; "
            "pad it more."
        )
    return tuple((size - e) // s + 1 for size, e, s in zip(spatial, extent, stride, strict=True))


def _cpp_takes(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> bool:
    # The operator has no backward, and a 1x1 window over a contiguous x needs no copy at all.
    return (
        x.ndim == 4
        and x.device.type == "cpu"
        and x.dtype in _CPP_DTYPES
        and len(kernel) == len(stride) == len(dilation) == 2
        and not (x.requires_grad and torch.is_grad_enabled())
        and not (kernel == [1, 1] and stride == [1, 1])
        and unavailable() is None
    )


def _im2col_nhwc_fake(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    out = output_size(x.shape, kernel, stride, dilation)
    return x.new_empty(x.shape[0] * math.prod(out), math.prod(kernel) * x.shape[-1])


_REASON = _load()
