"""2:4 sparsity that runs faster: linear layers on the sparse tensor cores of NVIDIA GPUs, through torch.

``nm(model, 2, 4)`` makes the masks on any machine (``prune/sparse.py``); only the execution needs the hardware. Source:
Mishra et al., Accelerating Sparse Deep Neural Networks (2021). Convolutions stay as they are: torch has no 2:4 kernel
for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.errors import BackendUnavailable, ModelError
from prunekern.graph.parts import Parts, copied

ARCHITECTURE = (8, 0)       # Ampere: the first with sparse tensor cores
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SemiStructured:
    """A copy whose 2:4 linear layers run on sparse tensor cores. converted: their names. left: the others, and why."""

    model: nn.Module
    converted: tuple[str, ...]
    left: Mapping[str, str]


def unavailable(device: torch.device | str = "cuda") -> str | None:
    """Why 2:4 products cannot run on this device; None where they can."""
    place = torch.device(device)
    if place.type != "cuda":
        return f"the weights are on {place}; sparse tensor cores are on CUDA devices (sm_80 and later): move the model."
    if not torch.cuda.is_available():
        return "this machine has no CUDA device; sparse tensor cores are on NVIDIA GPUs from sm_80 (Ampere) on."
    found = torch.cuda.get_device_capability(place)
    if found < ARCHITECTURE:
        return f"{torch.cuda.get_device_name(place)} is sm_{found[0]}{found[1]}; sparse tensor cores begin with sm_80."
    return None


def follows(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether at most n of every m consecutive values along the last axis are not zero; the last block may be short."""
    filled = F.pad(weight.detach() != 0, (0, -weight.shape[-1] % m))
    return bool((filled.reshape(-1, m).sum(1) <= n).all())


def to_semi_structured(model: nn.Module) -> SemiStructured:
    """A copy of a model whose linear layers of 2:4 weights are ``torch.sparse.to_sparse_semi_structured``.

    The model must be on the GPU, in fp16 or bf16, and masked already. Each layer that cannot be converted stays dense,
    its reason in ``left``. For inference: the sparse weights take no gradient.
    Raises BackendUnavailable (no such GPU; the reason), ModelError (nothing to convert; the reasons).
    """
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not weights:
        raise ModelError(f"{type(model).__name__} has no linear layer, and torch multiplies nothing else 2:4.")
    reason = unavailable(next(iter(weights.values())).device)
    if reason is not None:
        raise BackendUnavailable(f"2:4 execution: {reason} The masks themselves (prunekern.prune.sparse.nm) need no "
                                 "GPU.")
    made = copied(model, {})
    if isinstance(made, Parts):
        raise ModelError(f"{made.why}, so its layers cannot be exchanged.")
    left: dict[str, str] = {}
    for name in weights:
        why = _convert(made.get_submodule(name))
        if why is not None:
            left[name] = why
    converted = tuple(name for name in weights if name not in left)
    if not converted:
        raise ModelError("no linear layer can run 2:4: " + "; ".join(f"{n}: {why}" for n, why in left.items()) + ".")
    return SemiStructured(made, converted, left)


def _convert(layer: nn.Module) -> str | None:
    """Exchange one linear layer's weight; why not, where it cannot be."""
    assert isinstance(layer, nn.Linear)
    weight = layer.weight
    if weight.dtype not in DTYPES:
        return f"its weights are {str(weight.dtype).removeprefix('torch.')}; 2:4 products are of fp16 or bf16"
    if not follows(weight):
        return "its weights are not 2:4; impose prunekern.prune.sparse.nm(model, 2, 4) first"
    try:
        sparse = torch.sparse.to_sparse_semi_structured(weight.detach())
    except (RuntimeError, ValueError, NotImplementedError) as error:     # torch has no kernel for its shape, or at all
        return str(error).splitlines()[0]
    layer.weight = nn.Parameter(sparse, requires_grad=False)
    return None
