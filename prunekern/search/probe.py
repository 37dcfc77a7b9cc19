"""What measures lowered networks for a search; tests put a model of time in its place."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from prunekern.analysis.latency import measure, synchroniser
from prunekern.backends import Lowered, lower
from prunekern.errors import BackendUnavailable
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.ops import REGISTRY
from prunekern.prune.attributes import slice_class
from prunekern.prune.rewrite import rewrite
from prunekern.search.tables import REST

ALONE = 0.93            # of the wall clock, that one thread which always works gets at least where nobody disturbs it


@dataclass(frozen=True)
class Timed:
    """Medians of two lowered networks that took turns, in seconds. how: where and with what."""

    dense: float
    pruned: float
    how: str = ""

    @property
    def share(self) -> float:
        return self.pruned / self.dense if self.dense else 1.0

    def __str__(self) -> str:
        return (f"{self.share:.3f} of the lowered original's time ({self.pruned * 1e6:.4g} of {self.dense * 1e6:.4g} µs"
                f"{'; ' if self.how else ''}{self.how})")


class Probe(Protocol):
    """Measures networks that a choice of groups leaves. moved: they are measured on another device than the model's."""

    moved: bool

    @property
    def identity(self) -> str:
        """What figures depend on beside the network: machine, backend, inputs, threads."""

    def steps(self, groups: Groups, keep: Tensor) -> Mapping[str, float]:
        """Seconds of every step, by the graph's node that it computes; ``REST``: of the call beyond these."""

    def whole(self, groups: Groups, keep: Tensor) -> Timed:
        """The whole network against the original."""

    def against(self, pruned: Lowered) -> Timed:
        """A lowered network against the original."""


class LoweredProbe:
    """Slices, lowers and measures. Nothing is proven here: only time is looked at.

    device: None for where the inputs are. seconds: of measuring each network against the original.
    Raises BackendUnavailable where there is no such device.
    """

    def __init__(self, model: nn.Module, call: Call, backend: str = "auto", device: str | None = None,
                 seconds: float = 1.0) -> None:
        here = next((t.device for _, t in call.named_tensors()), torch.device("cpu"))
        self.device = _device(device) if device else here
        self.moved = self.device.type != here.type
        self.call = call.map(lambda t: t.to(self.device)) if self.moved else call
        self.model, self.backend, self.seconds = model, backend, seconds

    @cached_property
    def dense(self) -> Lowered:
        """The original, lowered."""
        return self._lowered(self.model)

    @property
    def how(self) -> str:
        used = self.dense.choice(self.device.type).backend.name
        threads = torch.get_num_threads()
        return (f"backend {used} on {self.device}, batch {self.call.batch or 1}"
                + (f", {threads} thread{'s' * (threads > 1)}" if self.device.type == "cpu" else ""))

    @property
    def identity(self) -> str:
        shapes = ", ".join(str(tuple(t.shape)) for _, t in self.call.named_tensors())
        return f"{platform.node()}, {platform.machine()}, {self.how}, inputs {shapes}, torch {torch.__version__}"

    def network(self, groups: Groups, keep: Tensor) -> Lowered:
        """What a choice leaves, lowered."""
        model = groups.graph.module if groups.graph.module is not None else self.model
        sliced = slice_class(model, groups, keep, REGISTRY)
        return self._lowered(rewrite(groups.labels, keep, sliced, REGISTRY))

    def _lowered(self, module: nn.Module) -> Lowered:
        if self.moved:
            module = copy.deepcopy(module).to(self.device)
        return lower(module, self.call, backend=self.backend, verify=False)

    def steps(self, groups: Groups, keep: Tensor) -> dict[str, float]:
        nodes = {node.name for node in groups.graph.nodes if node.op == "call_function"}
        network = self.network(groups, keep)
        found = network.explain(*self.call.args, time=True, **self.call.kwargs)
        seconds: dict[str, float] = {}
        for row in found.rows:
            if row.step in nodes:
                seconds[row.step] = seconds.get(row.step, 0.0) + (row.seconds or 0.0)
        return {**seconds, REST: max(self._least(network) - sum(seconds.values()), 0.0)}

    def _least(self, network: Lowered) -> float:
        """Least seconds of a call: what disturbs it would count as time that no width changes."""
        own = self.device.type == "cpu" and torch.get_num_threads() == 1
        row, = measure({"call": self._call(network)}, seconds=self.seconds / 4, synchronise=synchroniser(self.device),
                       clock=time.process_time if own else time.perf_counter)
        return row.min / 1e6

    def whole(self, groups: Groups, keep: Tensor) -> Timed:
        return self.against(self.network(groups, keep))

    def module(self, pruned: nn.Module) -> Timed:
        """Another module against the original. Raises LoweringError."""
        return self.against(self._lowered(pruned))

    def against(self, pruned: Lowered) -> Timed:
        """The same for a network that is there already: both take turns on the same inputs.

        By the wall clock; where one thread computes and other work on the machine kept it waiting, again by the time
        that the process itself had.
        """
        calls = {"original": self._call(self.dense), "pruned": self._call(pruned)}
        wait = synchroniser(self.device)
        wall, own = time.perf_counter(), time.process_time()
        rows, how = measure(calls, seconds=self.seconds, synchronise=wait), self.how
        busy = (time.process_time() - own) / max(time.perf_counter() - wall, 1e-9)
        if self.device.type == "cpu" and busy < ALONE:
            if torch.get_num_threads() == 1:
                rows = measure(calls, seconds=self.seconds, clock=time.process_time)
                how += ", time of the process: other work disturbed the clock"
            else:
                how += ", while other work was running"
        return Timed(rows[0].p50 / 1e6, rows[1].p50 / 1e6, how)

    def _call(self, lowered: Lowered) -> Callable[[], object]:
        args, kwargs = self.call.args, self.call.kwargs
        return lambda: lowered(*args, **kwargs)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BackendUnavailable(f"on={name!r}: torch finds {torch.cuda.device_count()} CUDA devices here; measure on "
                                 "'cpu', or on a machine that has one.")
    return device
