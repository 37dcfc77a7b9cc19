"""Hold a lowered network to the model it came from, per step and end to end, in fp64 terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunekern.backends.exact import Shaken, exactly, kept_of, run_graph
from prunekern.core.arguments import find_operator
from prunekern.core.graph import Graph, at
from prunekern.core.program import Slot, Step
from prunekern.errors import LoweringError
from prunekern.graph.inputs import Call
from prunekern.graph.measured import has_measured
from prunekern.lower.tolerance import FLOOR, TRUSTED, error, limit, loosest

if TYPE_CHECKING:
    from prunekern.backends.lowered import Lowered

Amount = Callable[[], float]


@dataclass(frozen=True)
class Check:
    """One value held to fp64: a step's output, or an output of the network (``step`` is then '')."""

    name: str
    step: str
    error: float
    torch_error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Verification:
    """What was compared, on which inputs. Errors are ``max|y - y64| / max|y64|``."""

    cases: tuple[str, ...]
    steps: tuple[Check, ...]
    outputs: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest error of an output."""
        return max((check.error for check in self.outputs), default=0.0)

    @property
    def torch_error(self) -> float:
        """torch's own largest error of an output."""
        return max((check.torch_error for check in self.outputs), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {"cases": list(self.cases), "notes": list(self.notes), "error": self.error,
                "torch_error": self.torch_error,
                **{key: [vars(check) for check in getattr(self, key)] for key in ("steps", "outputs")}}

    def __str__(self) -> str:
        return (f"verified on {', '.join(self.cases)}: {len(self.outputs)} outputs, {len(self.steps)} step values; "
                f"largest output error {self.error:.1e} (torch's own {self.torch_error:.1e})"
                + "".join(f"; {note}" for note in self.notes))


WORK = 4e9      # multiply-accumulates in fp64 that a comparison may cost where a smaller batch says the same


def verify_examples(lowered: Lowered, graph: Graph, model: nn.Module | None) -> Verification:
    """On the example inputs, and on random ones of the same spread, at another batch size where it is free.

    Large batches of large networks are cut: every sample goes through the same steps.
    """
    example = drawn = Call(graph.args, graph.kwargs)
    if graph.free_batch:
        most = max(1, int(WORK / max(1, lowered.program.macs(1))))
        example, drawn = (example.resized(min(batch, most)) for batch in (graph.example_batch, 3))
    generator = torch.Generator().manual_seed(0)
    numbers_stay = has_measured(graph)              # others would make other sizes
    cases = {"the example inputs": example, "random inputs": drawn.map(
        lambda t: t if numbers_stay and not t.is_floating_point() else _random_like(t, generator))}
    # Which algorithms are fastest at the other batch size need not be known for this.
    found = [verify_graph(lowered, graph, call.args, call.kwargs, model, name, hasty=call is not example)
             for name, call in cases.items()]
    return Verification(tuple(cases), tuple(check for each in found for check in each.steps),
                        tuple(check for each in found for check in each.outputs),
                        tuple(dict.fromkeys(note for each in found for note in each.notes)))


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.numel():
        return tensor
    if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        spread = tensor.std(correction=0) if tensor.numel() > 1 else tensor.abs().max()
        return noise * spread + tensor.mean()
    low, high = int(tensor.min()), int(tensor.max())
    return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)


def verify_graph(lowered: Lowered, graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any],
                 model: nn.Module | None = None, case: str = "the given inputs", hasty: bool = False) -> Verification:
    """Compare with a Graph (and with the model's own forward) on one call.

    Raises LoweringError naming the first step, in order, that misses its tolerance.
    """
    program = lowered.program
    wanted = {slot.name: step for step in program.steps for slot in step.outputs}
    with torch.no_grad():
        ours, outputs, rows = _run_lowered(lowered, args, kwargs, hasty)
        theirs, flat = run_graph(graph, graph.tensors, args, kwargs, set(ours))
        exact, exact_flat, notes = exactly(graph, args, kwargs, set(ours))
        own = _model_outputs(model, args, kwargs, flat) if model is not None else flat
    shaken = None if exact is None else Shaken(graph, args, kwargs, exact, program.kept)
    if exact is None:
        exact, exact_flat = theirs, flat

    def of(name: str) -> Amount | None:
        return None if shaken is None else partial(shaken.of, name)
    steps: list[Check] = []
    reach, row = 0.0, "direct"             # errors are handed on: a step may owe its own to one before it
    for name, value in ours.items():
        if name in exact and _is_defined(wanted[name]):
            kept = program.kept.get(name)
            pair = (kept_of(exact[name], kept), kept_of(theirs[name], kept))
            row = loosest(row, rows.get(wanted[name].name, "direct"))
            steps.append(_check(name, wanted[name].name, value, *pair, of(name), reach, row))
            reach = max(reach, steps[-1].torch_error if math.isfinite(steps[-1].torch_error) else 0.0)
            _require(steps[-1], wanted[name], case)
    checks = []
    for index, (leaf, value) in enumerate(zip(program.outputs, outputs, strict=True)):
        if isinstance(leaf, Slot):
            checks.append(_output_check(f"output {index}", value, exact_flat[index], own[index], of(leaf.name), row))
            _require(checks[-1], wanted.get(leaf.name), case)
        elif value != own[index]:
            raise LoweringError(f"output {index} is {value!r}, the model gives {own[index]!r} on {case}; "
                                "lower the model with example inputs of this kind.")
    return Verification((case,), tuple(steps), tuple(checks), tuple(notes))


def _check(name: str, step: str, value: Tensor, exact: Tensor, theirs: Tensor, shaken: Amount | None,
           reach: float = 0.0, row: str = "direct") -> Check:
    """shaken: how far rounding moves this value, asked where torch's own error is too small to say; None where both may
    err, there being no fp64 to compare with. reach: the largest error that torch made on the way to this value; row: of
    the loosest algorithm there."""
    if not (value.is_floating_point() or value.is_complex()):
        ours, torchs = _share_of_others(value, exact), _share_of_others(theirs, exact)
        return Check(name, step, ours, torchs, 2 * torchs + 1e-3)
    found, torch_error = error(value, exact), error(theirs, exact)
    most = limit(torch_error, value.dtype, row, reach)
    if shaken is None:
        most += 3 * FLOOR.get(value.dtype, 0.0)
    elif math.isfinite(found) and found > most:
        most = limit(torch_error, value.dtype, row, reach, shaken())
    return Check(name, step, found, torch_error, most)


def _share_of_others(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape:
        return 1.0
    return float((value != exact).double().mean()) if value.numel() else 0.0


def _output_check(name: str, value: Tensor, exact: Tensor, own: Tensor, shaken: Amount | None, row: str) -> Check:
    """Against fp64; where that is visibly another network (it looks at bits, say), against the model's own dtype."""
    check = _check(name, "", value, exact, own, shaken, row=row)
    trusted = TRUSTED.get(value.dtype)
    if trusted is None or check.torch_error <= trusted:
        return check
    return _check(name, "", value, own, own, None, row=row)


def _is_defined(step: Step) -> bool:
    """Whether a step's value is the same in every run."""
    if step.op != "aten":
        return True
    target = step.attributes["target"]
    return "empty" not in target and torch.Tag.nondeterministic_seeded not in find_operator(target).tags


def _require(check: Check, step: Step | None, case: str) -> None:
    if check.passed:
        return
    where = f"step {step.name!r} ({step.op}, {step.place})" if step is not None else check.name
    raise LoweringError(
        f"{where}: its output is off by {check.error:.2e} of the largest value on {case}; torch's own error there is "
        f"{check.torch_error:.2e}, the limit {check.limit:.2e}. Lower with fuse=False to see whether a pass is to "
        "blame, and report the network; nothing wrong is returned.")


def _run_lowered(lowered: Lowered, args: tuple[Any, ...], kwargs: Mapping[str, Any], hasty: bool,
                 ) -> tuple[dict[str, Tensor], list[Any], Mapping[str, str]]:
    """Values of slots, leaves of the output, and the steps' rows of the tolerance table."""
    tensors, _ = lowered.bind(args, kwargs)
    signature = lowered.signature(tensors)
    values: dict[str, Tensor] = {}

    def keep(step: Step, outputs: tuple[Tensor, ...], seconds: float) -> None:
        values.update({slot.name: value.clone() for slot, value in zip(step.outputs, outputs, strict=False)})
    placement = lowered.passing(signature) if hasty else lowered.placement(signature)
    placement.run(tensors, keep)
    results = iter(placement.run(tensors))      # once more without looking: what a call does
    leaves = [next(results) if isinstance(leaf, Slot) else at(leaf, signature.batch)
              for leaf in lowered.program.outputs]
    return values, leaves, placement.rows


def _model_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: list[Any]) -> list[Any]:
    """The model's own outputs; they must be those of its trace, or the comparison would prove nothing."""
    args, kwargs = Call(args, kwargs).map(Tensor.clone).args, Call(args, kwargs).map(Tensor.clone).kwargs
    own = pytree.tree_leaves(model(*args, **kwargs), is_leaf=lambda leaf: leaf is None)
    for index, (value, other) in enumerate(zip(own, traced, strict=True)):
        if isinstance(value, Tensor) and value.is_floating_point() \
                and error(other, value) > 10 * FLOOR.get(value.dtype, 0.0):
            raise LoweringError(
                f"output {index} of the traced graph is not what the model gives on these inputs (off by "
                f"{error(other, value):.1e}): the forward takes another branch, or is random; make its behaviour a "
                "function of the inputs' shapes only.")
    return own
