"""The chosen network lowered, held to the same network in fp64 on all test images, and timed against others."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekern.backends import Lowered, lower
from prunekern.data.dataset import Pair
from prunekern.lower.tolerance import error, limit
from prunekern.recipes.fashion_mnist.network import example
from prunekern.report import LatencyRow

CHUNK = 1000
BASELINE = "original, eager"

Times = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Agreement:
    """Lowered against eager on all test images. Errors: largest difference from fp64 over the largest output.

    same: images with the same predicted class; accuracies are fractions of all images.
    """

    images: int
    error: float
    torch_error: float
    limit: float
    same: int
    eager_accuracy: float
    lowered_accuracy: float


def lowered_of(model: nn.Module) -> Lowered:
    """The network as planned GEMMs on the best backend there is, verified step by step.

    Raises LoweringError where a step misses its tolerance.
    """
    return lower(model, example())


def agreement(model: nn.Module, lowered: Callable[[Tensor], Tensor], test: Pair) -> Agreement:
    """Run both on every test image."""
    images, labels = test
    exact = _outputs(copy.deepcopy(model).double(), images.double())
    eager, ours = _outputs(model, images), _outputs(lowered, images)
    torch_error = error(eager, exact)
    eager_class, our_class = eager.argmax(1), ours.argmax(1)
    return Agreement(len(labels), error(ours, exact), torch_error, limit(torch_error, ours.dtype),
                     int((eager_class == our_class).sum()), _share(eager_class, labels), _share(our_class, labels))


def _outputs(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(chunk) for chunk in images.split(CHUNK)])


def _share(predicted: Tensor, labels: Tensor) -> float:
    return int((predicted == labels).sum()) / len(labels)


def latencies(contenders: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, batches: Sequence[int],
              rounds: Sequence[int]) -> list[LatencyRow]:
    """p20, p50, p80 per contender and batch size, in µs; the first contender is the baseline.

    Interleaved in this process: each round calls every contender once, starting with another one each time, so
    that what disturbs the machine disturbs all of them.
    """
    names = list(contenders)
    rows: list[LatencyRow] = []
    for batch, count in zip(batches, rounds, strict=True):
        inputs = images[torch.arange(batch) % len(images)].contiguous()
        times = _interleaved([contenders[name] for name in names], inputs, count)
        quantiles = (1e6 * np.quantile(times, (0.2, 0.5, 0.8), axis=0)).T.tolist()
        rows += [LatencyRow(name, batch, p20, p50, p80, quantiles[0][1] / p50, names[0])
                 for name, (p20, p50, p80) in zip(names, quantiles, strict=True)]
    return rows


def _interleaved(calls: Sequence[Callable[[Tensor], Tensor]], inputs: Tensor, rounds: int) -> Times:
    """Seconds per call, [rounds, contenders]."""
    times = np.empty((rounds, len(calls)))
    with torch.inference_mode():
        for call in (*calls, *calls):  # memory is laid out, caches are warm
            call(inputs)
        for number in range(rounds):
            for offset in range(len(calls)):
                index = (number + offset) % len(calls)
                start = time.perf_counter()
                calls[index](inputs)
                times[number, index] = time.perf_counter() - start
    return times
