"""A large batch in slices that stay in cache, where every sample goes its own way through the Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunekern.backends.base import Gather, Observe, Signature
from prunekern.backends.reference.engine import Kernels, ReferencePlacement, copy_into
from prunekern.core.graph import Dim
from prunekern.core.program import Program, Slot, Step
from prunekern.lower.arena import Arena

SLICE_BYTES = 4 << 20      # of activations; what a core's share of the last cache holds
SMALLEST = 16              # samples: below, the GEMMs of late layers have too few rows

SAMPLE = Dim(1, 0)
BY_SAMPLE = frozenset(("conv", "conv_transpose", "scale", "activation", "binary", "pool", "adaptive_pool", "resize",
                       "group_norm", "embedding", "prelu", "constant"))


def slice_size(program: Program, signature: Signature, arena: Arena) -> int:
    """How many samples to run at once; the whole batch where slices gain nothing or samples meet."""
    batch = signature.batch
    each = max(1, arena.size // batch)
    wanted = max(SMALLEST, SLICE_BYTES // each)
    if signature.device.type != "cpu" or batch < 2 * wanted or not independent(program):
        return batch
    count = -(-batch // wanted)
    return -(-batch // count)


def independent(program: Program) -> bool:
    """Whether no step lets samples meet: axis 0 of every value is the sample, or there is none."""
    slots = program.slots().values()
    return (program.batch is None and all(_is_batched(slot) or not any(d.scale for d in slot.shape) for slot in slots)
            and all(_is_batched(slot) for slot in (*program.input_slots, *program.output_slots))
            and all(map(_keeps_samples, program.steps)))


def _is_batched(slot: Slot) -> bool:
    return bool(slot.shape) and slot.shape[0] == SAMPLE and not any(d.scale for d in slot.shape[1:])


def _keeps_samples(step: Step) -> bool:
    at, rank = step.attributes, len(step.outputs[0].shape)
    if step.op == "constant":
        return True
    if not all(map(_is_batched, step.outputs)) or any(len(s.shape) > rank for s in step.inputs if step.op == "binary"):
        return False
    match step.op:
        case "scale" | "prelu":
            return bool(at["axis"] != 0)
        case "linear" | "matmul":
            return rank > (1 if step.op == "linear" else 2) and all(map(_is_batched, step.inputs))
        case "attention":
            return rank > 3 and all(map(_is_batched, step.inputs[:3]))
        case "reduce":
            return 0 not in at["axes"]
        case "pad":
            return list(at["amounts"][0]) == [0, 0]
        case "cat" | "softmax":
            return bool(at["axis"] != 0) and all(map(_is_batched, step.inputs))
        case "layer_norm" | "rms_norm":
            return bool(at["axes"] < rank)
        case "move":
            stays = {"permute": at.get("axes", [0])[0] == 0, "slice": at.get("axis") != 0}
            return stays.get(at["kind"], True) and _is_batched(step.inputs[0])
    return step.op in BY_SAMPLE


class SlicedPlacement:
    """See ``backends.base.Placement``: one placement for the slices, and one for what is left over."""

    def __init__(self, program: Program, signature: Signature, kernels: Kernels, size: int) -> None:
        self.program, self.signature = program, signature
        batch = signature.batch
        self._slices = [slice(start, min(start + size, batch)) for start in range(0, batch, size)]
        self._inner = {count: ReferencePlacement(program, resized(program, signature, count), kernels)
                       for count in {s.stop - s.start for s in self._slices}}
        self._main = self._inner[size]

    rows: Mapping[str, str] = ReferencePlacement.rows

    @property
    def algorithms(self) -> Mapping[str, str]:
        return self._main.algorithms

    @property
    def arena(self) -> Arena:
        return self._main.arena

    def run(self, inputs: Sequence[Tensor], observe: Observe | None = None) -> list[Tensor]:
        gather = Gather()
        results: list[list[Tensor]] = []
        for rows in self._slices:
            inner = self._inner[rows.stop - rows.start]
            results.append(inner.run([x[rows] for x in inputs], None if observe is None else gather.note))
        with torch.no_grad():
            outputs = [torch.cat(parts) for parts in zip(*results, strict=True)]
            if observe is not None:
                gather.deliver(self.program.steps, observe)
        return outputs

    def direct(self) -> None:
        return None

    def run_into(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        copy_into(self.run(inputs), outputs)


def resized(program: Program, signature: Signature, batch: int) -> Signature:
    """The same inputs at another batch size."""
    return replace(signature, batch=batch, shapes=tuple(slot.at(batch) for slot in program.input_slots))
