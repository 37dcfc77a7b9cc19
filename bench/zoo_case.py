"""One network of the zoo under one pruner: does half of it come out smaller, running, and equal to the masked original?

The same questions for every library: PASS where all are answered with yes; EXPLAINED where the result is correct, but
above the wanted share of the MACs, and the reason says what holds the channels, or where the forward is refused with
the line that stops it and a named part of the network comes out smaller and proven; FAIL with where it broke; SKIP
where the network itself does not run.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.architectures import Architecture
from bench.shrinkers import OURS, Shrunk, Stages, Tell, shrinker
from prunekern.errors import InputError, PlanError, TraceError
from prunekern.graph.inputs import Call, as_call

SMALLER = 0.90          # of its MACs, at most, that a part of a refused network keeps
SHARE = 0.60            # of the MACs, at most, with half of the channels
ERROR = {"float64": 1e-6, "float32": 1e-4}      # relative to max|output|; fp32 where a forward itself insists on it
PEER_SECONDS = 20.0     # that a peer may take to prune, proofs apart
TEETH = 0.1             # of the kept channels, at least, whose loss would be noticed
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
KINDS = {"plan": "slice", "rewrite": "slice", "prove": "proof", "check": "run"}  # stage -> kind of failure


@dataclass(frozen=True)
class Case:
    """What became of a network. kind: where it failed ('trace', 'label', 'slice', 'run', 'shape', 'proof', 'teeth',
    'ratio', 'lower', 'time', 'crash'). ratio: MACs after over before. seconds: processor time by stage. facts: see
    ``Shrunk``."""

    zoo: str
    name: str
    library: str
    status: str
    kind: str = ""
    reason: str = ""
    ratio: float | None = None
    macs: float | None = None
    error: float | None = None
    teeth: float | None = None
    blunt: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "", (), {})}


def examine(architecture: Architecture, library: str, tell: Tell) -> Case:
    """Build, run, shrink, check. tell: called with the name of each stage as it begins."""
    tell("build")
    base: dict[str, Any] = {"zoo": architecture.zoo, "name": architecture.name, "library": library}
    try:
        model, inputs = architecture.make()
        call = as_call(model, inputs)
        shapes, macs = measured(model, call)
    except Exception as error:
        return Case(**base, status="SKIP", reason=first_line(error))
    stages = Stages(tell)
    try:
        shrunk = shrinker(library)(model, call, stages)
        with stages("check"):
            found, left = measured(shrunk.model, call)
    except Exception as error:
        stage = next(reversed(stages.seconds), "crash")
        if isinstance(error, InputError) and stage == "plan":       # nothing may go, and the message says what holds it
            return Case(**base, status="EXPLAINED", reason=str(error), ratio=1.0, macs=macs, seconds=stages.seconds)
        if isinstance(error, TraceError) and stage == "trace" and library == OURS and (found := in_parts(model, error)):
            reason = f"{first_line(error)[:300]}; {found['name']!r} alone keeps {found['ratio']:.2f} of its MACs"
            return Case(**base, status="EXPLAINED", reason=reason, macs=macs, seconds=stages.seconds,
                        facts={"part": found})
        kind = "shape" if stage == "prove" and isinstance(error, PlanError) else KINDS.get(stage, stage)
        return Case(**base, status="FAIL", kind=kind, reason=first_line(error), macs=macs,
                    seconds=stages.seconds, facts={"traceback": traceback.format_exc()[-3000:]})
    if library != OURS and sum(stages.seconds.get(stage, 0.0) for stage in ("trace", "slice")) > PEER_SECONDS:
        return Case(**base, status="FAIL", kind="time", reason=f"more than {PEER_SECONDS:g} s", macs=macs,
                    seconds=stages.seconds)
    status, kind, reason = verdict(shrunk, shapes == found, left / macs if macs else 1.0)
    return Case(**base, status=status, kind=kind, reason=reason, ratio=left / macs if macs else 1.0, macs=macs,
                error=shrunk.error, teeth=shrunk.teeth, blunt=shrunk.blunt, frozen=shrunk.frozen or (),
                seconds=stages.seconds, facts=shrunk.facts)


def in_parts(model: nn.Module, refusal: TraceError) -> dict[str, Any] | None:
    """The first submodule named by a refusal that by itself passes, or comes out smaller and proven with a reason for
    what it keeps; the figures of its case. A forward that cannot be captured is explained where the line that stops it
    is known and the advice that comes with it works."""
    for path, call in refusal.parts if refusal.line else ():
        part = Architecture("part", path, lambda path=path, call=call: (model.get_submodule(path), call))  # type: ignore[misc]
        case = examine(part, OURS, lambda stage: None)
        if case.status in ("PASS", "EXPLAINED") and case.error is not None and (case.ratio or 1.0) <= SMALLER:
            return {"line": refusal.line, "name": path, "status": case.status, "macs": case.macs, "ratio": case.ratio,
                    "error": case.error, "teeth": case.teeth, "frozen": case.frozen}
    return None


def verdict(shrunk: Shrunk, same_shapes: bool, ratio: float) -> tuple[str, str, str]:
    """(status, kind of failure, reason)."""
    if not same_shapes:
        return "FAIL", "shape", "the outputs have other shapes than the original's"
    if not shrunk.error < ERROR.get(shrunk.facts.get("dtype", "float64"), 0.0):
        return "FAIL", "proof", f"differs from the masked original by {shrunk.error:.1e}"
    if shrunk.blunt and (shrunk.teeth or 0.0) < TEETH:
        return "FAIL", "teeth", (f"the loss of {1 - (shrunk.teeth or 0.0):.0%} of the channels would not be noticed, "
                                 f"of all in {len(shrunk.blunt)} families: {', '.join(shrunk.blunt[:3])}, ...")
    if ratio > SHARE and shrunk.frozen is None:
        return "FAIL", "ratio", f"{ratio:.2f} of the MACs remain, and nothing says why"
    if ratio > SHARE:
        return "EXPLAINED", "", "; ".join(shrunk.frozen[:3]) or "inputs and outputs hold the rest"  # type: ignore[index]
    return "PASS", "", ""


@torch.no_grad()
def measured(model: nn.Module, call: Call) -> tuple[list[Any], float]:
    """Shapes of the tensors that a model gives (other outputs as they are), and its MACs on these inputs."""
    given, fast = call.map(Tensor.clone), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)      # fused, and so not counted
    try:
        with Multiplications(model) as counter, sdpa_kernel(SDPBackend.MATH):       # takes attention apart
            outputs = model(*given.args, **given.kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    leaves = pytree.tree_leaves(outputs)
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves], counter.total


class Multiplications(TorchDispatchMode):
    """torch's closed formulas for contractions, summed over a run; for recurrent layers, which it does not know, a
    multiply-accumulate for each weight, step and sample. (``FlopCounterMode`` also follows modules, which some forwards
    do not bear.)"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total, self.paused, self.hooks = 0.0, False, list[Any]()
        for module in model.modules():
            if isinstance(module, RECURRENT):
                self.hooks += [module.register_forward_pre_hook(self.enter), module.register_forward_hook(self.leave)]

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        data = args[0].data if isinstance(args[0], nn.utils.rnn.PackedSequence) else args[0]
        weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
        self.total += weights * data.numel() / data.shape[-1]
        self.paused = True

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = None if self.paused else flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out) / 2
        return out

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '-'}"[:500]
