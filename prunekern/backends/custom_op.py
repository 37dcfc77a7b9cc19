"""A lowered network as one operator, ``prunekern::run``, for ``torch.compile`` and ``torch.export``: their graphs call
it and look no further inside.

A graph names its network by a key. Networks are found by key as long as they live; a graph that another process loads
finds one that was registered there under its key:

    register(Lowered.load("small"), key)
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from prunekern.core.graph import Dim, at
from prunekern.core.program import Slot
from prunekern.errors import InputError

if TYPE_CHECKING:
    from prunekern.backends.lowered import Lowered

_NETWORKS: weakref.WeakValueDictionary[str, Lowered] = weakref.WeakValueDictionary()


def register(lowered: Lowered, key: str) -> None:
    """Let graphs find a network by this key, for as long as it lives; in place of any earlier one."""
    _NETWORKS[key] = lowered


def find(key: str) -> Lowered:
    """Raises InputError where no such network lives in this process."""
    lowered = _NETWORKS.get(key)
    if lowered is None:
        raise InputError(f"the graph runs the lowered network {key!r}, and none of that key lives in this process; "
                         "keep the one that it was made with, or load it and call "
                         f"prunekern.backends.custom_op.register(lowered, {key!r}).")
    return lowered


@torch.library.custom_op("prunekern::run", mutates_args=())
def run(inputs: Sequence[Tensor], key: str) -> list[Tensor]:
    """The output tensors of the network ``key``. inputs: one for each input slot of its program."""
    lowered = find(key)
    return [value.contiguous() for value in lowered.run(inputs, lowered.signature(inputs))]


@run.register_fake
def _shapes(inputs: Sequence[Tensor], key: str) -> list[Tensor]:
    """What ``run`` gives, without values; the batch is symbolic where it is in the inputs."""
    lowered = find(key)
    signature = lowered.signature(inputs)
    return [torch.empty(slot.at(signature.batch), dtype=slot.dtype, device=signature.device)
            for slot in lowered.program.output_slots]


def wants(tensors: Sequence[Any]) -> bool:
    """Whether a plain call must be the operator: a tensor has no values, or torch.func transforms it."""
    return any(isinstance(x, FakeTensor) or (isinstance(x, Tensor) and is_functorch_wrapped_tensor(x)) for x in tensors)


def call(lowered: Lowered, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``Lowered.__call__`` while a graph is recorded: the operator, between the structures of the arguments and of the
    output."""
    program = lowered.program
    tensors, out = lowered.bind(args, kwargs)
    values = torch.ops.prunekern.run([tensor.detach() for tensor in tensors], lowered.key)
    if out is not None:
        values = [each.copy_(value) for each, value in
                  zip([out] if isinstance(out, Tensor) else out, values, strict=True)]
    sizes = any(isinstance(leaf, Dim) for leaf in program.outputs)
    batch = lowered.signature(tensors).batch if sizes else 0
    rest = iter(values)
    leaves = [next(rest) if isinstance(leaf, Slot) else at(leaf, batch) for leaf in program.outputs]
    return pytree.tree_unflatten(leaves, program.out_spec)
