"""Weights in the order in which kernels read them. All of it is plain torch: pads, views, permutations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from prunekern.backends.cpu.native import Isa


def pack_gemm(matrix: Tensor, isa: Isa, half: bool = False) -> Tensor:
    """``[groups, N, K]`` (outputs by depth) in panels of columns, one after another: ``[panel][K][columns]``.

    A panel is a few registers wide; columns that are missing at its end are zeros. half: stored as fp16.
    """
    outputs = matrix.shape[1]
    padded = functional.pad(matrix.detach(), (0, 0, 0, isa.padded(outputs) - outputs))
    widths = [vectors * isa.lanes for vectors in isa.panels(outputs)]
    panels = [[panel.t().reshape(-1) for panel in group.split(widths)] for group in padded]
    packed = torch.cat([panel for group in panels for panel in group])
    return aligned(packed.half() if half else packed.float())


def fits_half(weight: Tensor) -> bool:
    """Whether fp16 keeps 11 bits of a layer's largest weights: neither infinite nor subnormal there."""
    largest, limits = float(weight.detach().abs().max()) if weight.numel() else 0.0, torch.finfo(torch.float16)
    return largest == 0 or limits.smallest_normal <= largest <= limits.max


def aligned(tensor: Tensor) -> Tensor:
    """On a cache line, with one line to spare behind: kernels fetch ahead."""
    spare = 256 // tensor.element_size()
    room = torch.empty(tensor.numel() + spare + 64 // tensor.element_size(), dtype=tensor.dtype)
    start = (-room.data_ptr() % 64) // tensor.element_size()
    found = room[start:start + tensor.numel() + spare]
    found[:tensor.numel()] = tensor.reshape(-1)
    found[tensor.numel():] = 0
    return found
