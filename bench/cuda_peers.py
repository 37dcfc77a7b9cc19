"""Ways to run a network on a GPU in each precision: eager, recorded, compiled, TensorRT. All of them channels last."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], object]
NARROW = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """tf32 in matrix products and convolutions of fp32, or none of it."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def narrowed(model: nn.Module, precision: str) -> nn.Module:
    """A copy in channels-last memory and the precision's dtype."""
    return copy.deepcopy(model).to(NARROW[precision]).to(memory_format=torch.channels_last)


def converted(x: Tensor, precision: str) -> Tensor:
    form = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.to(NARROW[precision]).contiguous(memory_format=form)


def eager(model: nn.Module, precision: str) -> Callable[[Tensor], Call]:
    ready = narrowed(model, precision)

    def bind(x: Tensor) -> Call:
        y = converted(x, precision)

        def call() -> Tensor:
            with arithmetic(precision):
                return ready(y)
        return (lambda: ready(y)) if precision != "tf32" else call
    return bind


def recorded(model: nn.Module, x: Tensor, precision: str) -> Callable[[Tensor], Call]:
    """Eager's kernels as one CUDA graph; a call copies its input in, as torch.compile's graphs do."""
    ready, static = narrowed(model, precision), converted(x, precision).clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with arithmetic(precision), torch.inference_mode():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                ready(static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            output = ready(static)

    def bind(x: Tensor) -> Call:
        y = converted(x, precision)

        def call() -> Tensor:
            static.copy_(y)
            graph.replay()
            return output
        return call
    return bind


def tensorrt(model: nn.Module, x: Tensor, precision: str) -> Callable[[Tensor], Call]:
    """Torch-TensorRT's own engine, strongly typed."""
    import torch_tensorrt
    ready, y = narrowed(model, precision), converted(x, precision)
    options: dict[str, Any] = {"use_explicit_typing": True, "disable_tf32": precision != "tf32"}
    engine = torch_tensorrt.compile(ready, ir="dynamo", inputs=[y], **options)
    return lambda x: (lambda y: lambda: engine(y))(converted(x, precision))
