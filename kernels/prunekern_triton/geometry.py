"""Windows over channels-last images, in two dimensions; one-dimensional ones have a height of 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Window:
    """kernel, stride, low padding and dilation by (height, width), and the size of the output."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    out: tuple[int, int]

    @classmethod
    def of(cls, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[Sequence[int]],
           dilation: Sequence[int]) -> Window:
        """From one or two dimensions of an image; ``padding`` has (low, high) for each."""
        out = [(n + low + high - d * (k - 1) - 1) // s + 1 for n, k, s, (low, high), d in
               zip(size, kernel, stride, padding, dilation, strict=True)]
        lows = [low for low, _ in padding]
        return cls(_two(kernel, 1), _two(stride, 1), _two(lows, 0), _two(dilation, 1), _two(out, 1))

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def numbers(self) -> dict[str, Any]:
        """Compiled in."""
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel, self.stride, self.padding, self.dilation
        return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw}

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """``[N, H, W, C]`` with what all windows reach, in plain torch."""
        ends = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in
                zip(self.out, self.stride, self.dilation, self.kernel, strict=True)]
        highs = [end - p - n for end, p, n in zip(ends, self.padding, x.shape[1:3], strict=True)]
        (top, left), (bottom, right) = self.padding, highs
        return functional.pad(x, (0, 0, left, right, top, bottom), value=value)

    def taps_of(self, x: Tensor, value: float = 0.0) -> Tensor:
        """``[N, out, out, KH, KW, C]``, in plain torch."""
        padded = self.padded(x, value)
        n, h, w, c = padded.stride()
        (sh, sw), (dh, dw) = self.stride, self.dilation
        return padded.as_strided((x.shape[0], *self.out, *self.kernel, x.shape[3]),
                                 (n, h * sh, w * sw, h * dh, w * dw, c))


def image(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` or ``[N, C, L]`` as ``[N, H, W, C]``: a view."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x.permute(0, 2, 1).unsqueeze(1)


def is_image(x: Tensor) -> bool:
    """Whether ``[N, H, W, C]`` has its positions one after the other at one pitch: what kernels take."""
    n, h, w, c = x.shape
    pitch = x.stride(2) if w > 1 else x.stride(1) if h > 1 else x.stride(0) if n > 1 else c
    wanted = (h * w * pitch, w * pitch, pitch, 1)
    return pitch >= c and all(size == 1 or stride == want for size, stride, want in
                              zip(x.shape, x.stride(), wanted, strict=True))


def rows(x: Tensor) -> Tensor:
    """``[N * H * W, C]`` of such an image."""
    n, h, w, c = x.shape
    pitch = x.stride(2) if w > 1 else x.stride(1) if h > 1 else x.stride(0) if n > 1 else c
    return torch.as_strided(x, (n * h * w, c), (pitch, 1), x.storage_offset())


def _two(values: Sequence[int], fill: int) -> tuple[int, int]:
    a, b = (fill, *values)[-2:]
    return int(a), int(b)
