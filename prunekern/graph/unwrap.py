"""What users wrap a network in, taken off; what cannot be pruned, refused with the remedy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from prunekern.errors import ModelError

NOT_FLOAT = ("torch.ao.nn.", "torch.ao.quantization.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic.q")
SHARDED = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp", "deepspeed.")


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The network inside DataParallel, DistributedDataParallel, torch.compile and adapters (PEFT), and what was done.

    Adapters are merged into a copy; the given model is never modified. Raises ModelError where merging fails.
    """
    notes: list[str] = []
    while True:
        inner, note = _inner(model)
        if inner is None:
            return model, tuple(notes)
        model = inner
        notes.append(note)


def _inner(model: nn.Module) -> tuple[nn.Module | None, str]:
    kind = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module, f"the model was wrapped in {kind}; the result is not, wrap it again"
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(model, torch._dynamo.OptimizedModule) and isinstance(compiled, nn.Module):
        return compiled, "the model was wrapped by torch.compile; the result is not, compile it again"
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        return _merged(model), f"the adapters of {kind} were merged into a copy of its base model, and that was pruned"
    return None, ""


def _merged(model: Any) -> nn.Module:
    """A PEFT model with its adapters in the weights; by its own method, so that peft need not be imported."""
    training = model.training
    try:
        with torch.no_grad():
            merged: nn.Module = copy.deepcopy(model).merge_and_unload()
    except Exception as error:
        raise ModelError(f"the adapters of {type(model).__name__} cannot be merged ({type(error).__name__}: {error}); "
                         "unload or merge them yourself and pass the base model.") from error
    return merged.train(training)


def check_kind(model: nn.Module) -> None:
    """Refuse modules that are not, or not yet, a float network of plain tensors.

    Raises ModelError: scripted, quantised or about to be, sharded, lazy.
    """
    for name, module in model.named_modules():
        where = f"{name!r} is" if name else "model is"
        home = f"{type(module).__module__}."
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{where} scripted (torch.jit); pass the original nn.Module it was made from.")
        if isinstance(module, fx.GraphModule) and "eval" in vars(module):       # torch.export replaces its own
            raise ModelError(f"{where} exported (torch.export); pass the original nn.Module it was made from.")
        if home.startswith(NOT_FLOAT):
            raise ModelError(f"{where} a quantised module ({type(module).__name__}), or one that prepares for it; "
                             "prune the float model, then quantise the result.")
        if home.startswith(SHARDED):
            raise ModelError(f"{where} sharded ({type(module).__name__}); gather the full state dict into a plain "
                             "nn.Module on one device, prune that, and shard the result.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(f"{name!r} is lazy and has no shape yet; run the model once on a batch before pruning.")
        if type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor":
            raise ModelError(f"{name!r} is sharded (DTensor); gather the full state dict into a plain nn.Module on "
                             "one device, prune that, and shard the result.")
