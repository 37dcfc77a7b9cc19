"""Winograd's convolution, 3x3 with stride 1: ``Y = A^T [(G w G^T) . (B^T d B)] A`` in tiles of m x m outputs.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. The weights are transformed here,
once; A and B are in ``csrc/cpu/kernels/winograd.h``.

Points: F(2x2) has 0, ±1, infinity. F(4x4) has 0, ±sqrt(1/2), ±sqrt(2), infinity: pairs (p, 1/p) keep the powers that
are summed near 1 (B. Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
Neural Networks", ACM TOMS 46(4), 2020), and the error was a quarter of that with the usual 0, ±1, ±2.

A NaN or an infinity in the input reaches all outputs of the tiles that read it, not only those in its window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunekern.backends.cpu.builder import Builder, image
from prunekern.backends.cpu.geometry import Geometry
from prunekern.backends.cpu.pack import pack_gemm
from prunekern.backends.cpu.place import Form
from prunekern.core.program import Step

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2.0), -math.sqrt(2.0))}


def weight_matrix(m: int) -> Tensor:
    """G, [m + 2, 3], in fp64: row i evaluates a kernel at point i, divided by the product of its distances to the
    other points (Lagrange); the last row is the point at infinity. Raises KeyError where m is not 2 or 4."""
    points = POINTS[m]
    rows = [[p ** k / math.prod(p - q for q in points if q != p) for k in range(3)] for p in points]
    g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    if m == 2:
        g[0] = -g[0]            # B^T has the usual d0 - d2 in its first row, and no sign to flip in A^T
    return g


def transform(weight: Tensor, m: int) -> Tensor:
    """``G w G^T`` of weights [O, C, 3, 3]: [(m + 2)^2, O, C], rounded once, to fp32."""
    g = weight_matrix(m)
    outputs, channels = weight.shape[:2]
    return (torch.kron(g, g) @ weight.detach().double().reshape(-1, 9).T).float().view(-1, outputs, channels)


def takes(geometry: Geometry) -> str | None:
    """Why it cannot run a convolution, or None."""
    if geometry.kernel != (3, 3) or geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return "it takes 3x3 windows with stride and dilation 1"
    if geometry.groups > 1:
        return "it takes one group"
    return "a side is cropped" if any(low < 0 for low, _ in geometry.padding) else None


def emit(m: int, builder: Builder, step: Step, geometry: Geometry) -> None:
    """The op `winograd` of csrc/cpu/kernels/winograd.cpp, with tiles of m x m."""
    x, y, name = builder.want(step.inputs[0], Form.LAST), builder.write(step.output), step.weights["weight"]
    (pad_h, _), (pad_w, _) = geometry.padding
    weight = builder.packed(("winograd", m, name, builder.isa.lanes),
                            lambda: pack_gemm(transform(builder.weight(name), m), builder.isa))
    builder.emit("winograd", x=image(x), y=image(y), row=x.view.stride(2), column=x.view.stride(3), weight=weight, m=m,
                 pad_h=pad_h, pad_w=pad_w, **builder.epilogue(step, form=Form.LAST))
