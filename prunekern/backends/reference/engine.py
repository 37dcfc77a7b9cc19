"""Lays a Program out in one arena and compiles each Step into a closure over fixed tensors.

Tensors keep torch's logical order of axes; "channels last" is a matter of strides, so every view stays right
whatever the layout, and no axis is permuted between layers. A slot that no kernel writes to in place (an input, a
view, an ATen result) is bound at run time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prunekern.backends.base import Observe, Signature
from prunekern.core.activations import apply_into
from prunekern.core.graph import Shape
from prunekern.core.program import Program, Slot, Step
from prunekern.errors import LoweringError
from prunekern.lower.arena import Arena, plan

Kernel = Callable[[], None]
Compiler = Callable[["Layout", Step], Kernel]
Finish = Callable[[Tensor, slice], None]
EVERYTHING = slice(None)


@dataclass(frozen=True)
class Kernels:
    """How steps are compiled, which of them write into the arena, and which may give views of their inputs."""

    compilers: Mapping[str, Compiler]
    placed: Callable[[Step, int], bool]
    views: tuple[str, ...]


class Layout:
    """What a compiler of a Step is given: concrete shapes, the arena, weights on the device, workspaces."""

    def __init__(self, program: Program, signature: Signature, kernels: Kernels) -> None:
        self.program, self.batch, self.device = program, signature.batch, signature.device
        self.producers, self.consumers = program.producers(), program.consumers()
        self.arena = self.planned(kernels)
        self.memory = torch.empty(self.arena.size, dtype=torch.uint8, device=self.device)
        self.index = {name: i for i, name in enumerate(program.slots())}
        self.values: list[Any] = [None] * len(self.index)
        self.hints: dict[str, Tensor] = {}                 # slot -> meta tensor with the strides to expect
        self.algorithms: dict[str, str] = {}
        self.flat: dict[str, Shape] = {}                   # flattened in the order the memory has; from this shape
        for slot in program.input_slots:
            self.hints[slot.name] = torch.empty(slot.at(self.batch), dtype=slot.dtype, device="meta")
        self._weights: dict[str, Tensor] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8, device=self.device)

    def planned(self, kernels: Kernels) -> Arena:
        """Where values live; backends that give them more room than their elements take say so here."""
        return arena_of(self.program, self.batch, kernels)

    def shape(self, slot: Slot) -> Shape:
        return slot.at(self.batch)

    def weight(self, name: str) -> Tensor:
        """A weight on the device; moved once."""
        if name not in self._weights:
            self._weights[name] = self.program.weights[name].to(self.device)
        return self._weights[name]

    def bias(self, step: Step) -> Tensor | None:
        return None if step.epilogue.bias is None else self.weight(step.epilogue.bias)

    def get(self, slot: Slot) -> Callable[[], Tensor]:
        """Reads a slot's value at run time."""
        values, index = self.values, self.index[slot.name]
        fixed = values[index]
        return (lambda: fixed) if fixed is not None else (lambda: values[index])

    def fixed(self, slot: Slot) -> Tensor | None:
        """The slot's tensor where it is the same for every run."""
        return self.values[self.index[slot.name]]  # type: ignore[no-any-return]

    def is_channels_last(self, slot: Slot) -> bool:
        hint = self.hints[slot.name]
        return hint.dim() > 2 and hint.permute(0, *range(2, hint.dim()), 1).is_contiguous()

    def out(self, slot: Slot, channels_last: bool) -> Tensor:
        """The slot's place in the arena, in one of the two layouts."""
        shape = self.shape(slot)
        buffer = self.arena.buffers.get(slot.name)
        if buffer is None:                                  # no elements
            flat = torch.empty(0, dtype=slot.dtype, device=self.device)
        else:
            count = math.prod(shape) * slot.dtype.itemsize
            flat = self.memory[buffer.offset:buffer.offset + count].view(slot.dtype)
        if channels_last and len(shape) > 2:
            tensor = flat.view(shape[0], *shape[2:], shape[1]).permute(0, -1, *range(1, len(shape) - 1))
        else:
            tensor = flat.view(shape)
        self.fix(slot, tensor)
        return tensor

    def fix(self, slot: Slot, tensor: Tensor) -> None:
        """The slot is this tensor in every run."""
        self.values[self.index[slot.name]] = tensor
        self.hints[slot.name] = tensor.to("meta")

    def expect(self, slot: Slot, like: Slot) -> None:
        """The slot will be bound at run time, in the layout of another one."""
        shape = self.shape(slot)
        hint = torch.empty(shape, dtype=slot.dtype, device="meta")
        if len(shape) == len(like.shape) and len(shape) > 2 and self.is_channels_last(like):
            hint = hint.view(shape[0], *shape[2:], shape[1]).permute(0, -1, *range(1, len(shape) - 1))
        self.hints[slot.name] = hint

    def put(self, slot: Slot) -> Callable[[Tensor], None]:
        """Binds a slot at run time."""
        values, index = self.values, self.index[slot.name]

        def bind(tensor: Tensor) -> None:
            values[index] = tensor
        return bind

    def scratch(self, shape: Shape, dtype: torch.dtype, start: int = 0) -> Callable[[], Tensor]:
        """A workspace that is valid within one step; ``start`` bytes of it are in use already."""
        count = math.prod(shape) * dtype.itemsize
        if self._scratch.numel() < start + count:
            self._scratch = torch.empty(start + count, dtype=torch.uint8, device=self.device)
        return lambda: self._scratch[start:start + count].view(dtype).view(shape)

    def finish(self, step: Step, skip_bias: bool = False, axis: int = 1) -> Finish | None:
        """The epilogue, on a part of the output (a slice of axis 0) while it is in cache."""
        epilogue, bias = step.epilogue, None if skip_bias else self.bias(step)
        stages: list[Finish] = []
        if bias is not None:
            shaped = bias.view(-1, *[1] * (len(step.output.shape) - 1 - axis % len(step.output.shape)))
            stages.append(lambda y, rows: _add(y, shaped))
        if epilogue.residual is not None:
            other = self.get(epilogue.residual)
            stages.append(lambda y, rows: _add(y, other()[rows]))
        if epilogue.activation is not None:
            kind, constants = epilogue.activation.kind, epilogue.activation.constants
            stages.insert(len(stages) - epilogue.residual_last,
                          lambda y, rows: apply_into(kind, constants, y, y))
        if len(stages) < 2:
            return stages[0] if stages else None

        def run(y: Tensor, rows: slice) -> None:
            for stage in stages:
                stage(y, rows)
        return run


def arena_of(program: Program, batch: int, kernels: Kernels) -> Arena:
    """Where the values that have a place live, at a batch size."""
    producers = program.producers()

    def size(slot: Slot) -> int:
        inside = kernels.placed(producers[slot.name], batch)
        return math.prod(slot.at(batch)) * slot.dtype.itemsize if inside else 0
    return plan(program, size, lambda step: step.op in kernels.views)


def waiter(device: torch.device) -> Callable[[], Any]:
    """Waits for all work on a device."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def _add(y: Tensor, other: Tensor) -> None:
    y.add_(other)


def copy_into(values: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    for value, out in zip(values, outputs, strict=True):
        out.copy_(value)


class ReferencePlacement:
    """See ``backends.base.Placement``. One run at a time; others wait."""

    rows: Mapping[str, str] = MappingProxyType({})
    layout_class: type[Layout] = Layout

    def __init__(self, program: Program, signature: Signature, kernels: Kernels) -> None:
        self.program, self.signature = program, signature
        self._lock = threading.Lock()
        with torch.inference_mode():
            layout = self.layout_class(program, signature, kernels)
            self._kernels = [self._compile(layout, step, kernels.compilers) for step in program.steps]
        self.algorithms, self.arena = layout.algorithms, layout.arena
        self._values = layout.values
        self._inputs = [layout.index[slot.name] for slot in program.input_slots]
        self._outputs = [layout.index[slot.name] for slot in program.output_slots]
        self._loose = [i for i, value in enumerate(self._values) if value is None]
        self._free = self._last_reads(layout)
        self._flat = layout.flat

    def _compile(self, layout: Layout, step: Step, compilers: Mapping[str, Compiler]) -> Kernel:
        try:
            return compilers[step.op](layout, step)
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(f"step {step.name!r} ({step.op}, {step.place}) cannot be placed at batch "
                                f"{layout.batch}: {type(error).__name__}: {error}") from error

    def _last_reads(self, layout: Layout) -> list[list[int]]:
        """For every step the run-time-bound values that nobody reads after it."""
        last: dict[str, int] = {}
        for number, step in enumerate(self.program.steps):
            last.update({slot.name: number for slot in (*step.reads, *step.outputs)})
        keep = set(self._outputs)
        free: list[list[int]] = [[] for _ in self.program.steps]
        for name, number in last.items():
            if layout.index[name] in self._loose and layout.index[name] not in keep:
                free[number].append(layout.index[name])
        return free

    def run(self, inputs: Sequence[Tensor], observe: Observe | None = None) -> list[Tensor]:
        with self._lock, torch.inference_mode():
            values = self._values
            for index, tensor in zip(self._inputs, inputs, strict=True):
                values[index] = tensor
            if observe is None:
                for kernel, free in zip(self._kernels, self._free, strict=True):
                    kernel()
                    for index in free:
                        values[index] = None
            else:
                self._observed(observe)
            found = [values[index] for index in self._outputs]
            for index in self._loose:
                values[index] = None
            with torch.inference_mode(False), torch.no_grad():
                return [value.clone(memory_format=torch.contiguous_format) for value in found]

    def direct(self) -> None:
        return None

    def run_into(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        copy_into(self.run(inputs), outputs)

    def _logical(self, slot: Slot, value: Tensor) -> Tensor:
        """A value in torch's order of elements."""
        shape = self._flat.get(slot.name)
        if shape is None:
            return value
        return value.view(shape[0], *shape[2:], shape[1]).permute(0, -1, *range(1, len(shape) - 1)).flatten(1)

    def _observed(self, observe: Observe) -> None:
        sync = waiter(self.signature.device)
        index = {name: i for i, name in enumerate(self.program.slots())}
        for step, kernel, free in zip(self.program.steps, self._kernels, self._free, strict=True):
            sync()
            start = time.perf_counter()
            kernel()
            sync()
            seconds = time.perf_counter() - start
            observe(step, tuple(self._logical(slot, self._values[index[slot.name]]) for slot in self._shown(step)),
                    seconds)
            for i in free:
                self._values[i] = None

    def _shown(self, step: Step) -> Sequence[Slot]:
        """The outputs of a step that an observer is given."""
        return step.outputs
