"""Random weights and statistics that leave nothing in a network trivial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Norm layers; batch and instance norms (running statistics included) share `_NormBase`."""


@torch.no_grad()
def randomise_(model: nn.Module) -> nn.Module:
    """Draw every parameter and statistic from the current random state, at scales kept sane.

    Weights are He-normal over their fan-in; norm gains lie in 0.5..1.5 with one in ten negative,
    shifts and biases are small but never zero, running statistics are near (0, 1).
    """
    own = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(False)}
    for parameter in model.parameters():
        if id(parameter) in own:
            continue
        if parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            parameter.normal_(0, (2 / fan_in) ** 0.5)
        else:
            parameter.normal_(0, 0.1)
    for module in model.modules():
        if isinstance(module, NORMS):
            _randomise_norm(module)
        elif isinstance(module, nn.PReLU):
            module.weight.uniform_(0.1, 0.4)
    return model


def _randomise_norm(module: Any) -> None:
    if module.weight is not None:
        module.weight.uniform_(0.5, 1.5)
        module.weight.mul_(torch.where(torch.rand_like(module.weight) < 0.1, -1.0, 1.0))
    if getattr(module, "bias", None) is not None:
        module.bias.normal_(0, 0.2)
    if getattr(module, "running_mean", None) is not None:
        module.running_mean.normal_(0, 0.2)
        module.running_var.uniform_(0.5, 1.5)
        module.num_batches_tracked.fill_(1)


@torch.no_grad()
def calibrate_(model: nn.Module, *inputs: Tensor) -> None:
    """Set batch-norm statistics from one forward of `inputs`, then jitter them; no batch norm, no effect."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25)).add_(1e-3)
