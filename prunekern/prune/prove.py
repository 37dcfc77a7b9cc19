"""Proof that a sliced network equals the original with the removed channels zeroed at their consumers' inputs.

First on randomised twins (real weights can make a proof vacuous: zero gammas hide scrambled inputs), where the proof
must also have teeth (``prune/teeth.py``); then on the real weights. fp64 throughout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunekern.core.graph import at, place
from prunekern.errors import PlanError, ProofError
from prunekern.graph.evaluate import same_dice
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.graph.parts import ghost
from prunekern.prune.reference import difference, masked_outputs
from prunekern.prune.rewrite import ORIGIN
from prunekern.prune.slice import sliced_tensors
from prunekern.prune.teeth import TEETH, Teeth
from prunekern.prune.widen import default_dtype, widened

LIMIT = TEETH         # fp64, relative to max|output|; real slips are of the order of 1
SCALES = (1.0, 0.5, 0.25)     # of the weights of each further twin: calmer ones saturate no gate, softmax or attention
SHARP = 0.5           # share of the channels that must be felt, or a further twin is drawn
FP64 = torch.float64


@dataclass(frozen=True)
class Proof:
    """What was checked, and the numbers. Errors are max|difference| / max|masked original|.

    twin_error, real_error: of the returned module, the former the largest of all twins. teeth: share of the kept
    groups whose removal visibly changes the output of one of the twins; blunt names families for which none does.
    shapes: how many predicted shapes were compared with what ran, on each twin.
    """

    form: str
    twin_error: float
    real_error: float
    limit: float
    teeth: float
    blunt: tuple[str, ...]
    shapes: int
    dtype: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (f"proven in {self.dtype}: twin {self.twin_error:.1e}, real weights {self.real_error:.1e} "
                f"(limit {self.limit:.0e}), {self.shapes} shapes as predicted, teeth {self.teeth:.0%}")


def prove(groups: Groups, keep: Tensor, graph_form: fx.GraphModule, class_form: nn.Module | None,
          seed: int = 0) -> tuple[nn.Module, Proof]:
    """The user's class where it is proven equal to the masked original, else the rewritten graph module.

    Raises ProofError where neither is; PlanError where a predicted shape does not come true.
    """
    with widened(groups.graph), default_dtype(FP64):
        return _prove(groups, keep, graph_form, class_form, seed)


def _prove(groups: Groups, keep: Tensor, graph_form: fx.GraphModule, class_form: nn.Module | None,
           seed: int) -> tuple[nn.Module, Proof]:
    real = {n: _cast(t.detach()) for n, t in groups.graph.tensors.items()}
    trials = [_Trial(form, module) for form, module in (("class", class_form), ("graph", graph_form))
              if module is not None]
    teeth, shapes = _on_twins(groups, keep, trials, real, seed)
    given = _proof_call(groups, None)
    reference = masked_outputs(groups.labels, keep, real, given)
    notes: list[str] = []
    for trial in trials:
        trial.check("real", lambda module: _module_error(groups, module, {}, reference, given))
        if not trial.fault:
            return trial.module, Proof(trial.form, trial.errors["twin"], trial.errors["real"], LIMIT, teeth.share,
                                       tuple(family.name for family in teeth.blunt), shapes,
                                       str(FP64).removeprefix("torch."), tuple(notes))
        notes.append(trial.fault)
    raise ProofError("the sliced network is not equal to the masked original, so nothing is returned: "
                     + "; ".join(notes) + ". Please report the model; ignore=[...] on the layers involved avoids it.")


def _on_twins(groups: Groups, keep: Tensor, trials: Sequence[_Trial], real: Mapping[str, Tensor],
              seed: int) -> tuple[Teeth, int]:
    """Check every form on one twin, and on further ones while something may hide: (what they felt, shapes compared).

    A form counts only if it is equal on each of them, so what one twin felt and what another did add up.
    """
    teeth, shapes = Teeth(groups, keep), 0
    for draw, scale in enumerate(SCALES):
        call = _proof_call(groups, seed + draw)
        twin = randomised(groups, real, seed + draw, scale)
        reference = masked_outputs(groups.labels, keep, twin, call)
        if not _finite(reference) and (shapes or draw < len(SCALES) - 1):
            continue                                # it overflowed: nothing can be told from it
        shapes = _on_twin(groups, keep, trials, sliced_tensors(groups, keep, twin), reference, call)
        if all(trial.fault for trial in trials):
            break
        teeth.feel(twin, reference, call)
        if not teeth.blunt and teeth.share >= SHARP:
            break
    return teeth, shapes


def _on_twin(groups: Groups, keep: Tensor, trials: Sequence[_Trial], sliced: Mapping[str, Tensor],
             reference: list[Any], call: Call) -> int:
    """Check every form on the sliced tensors of one twin. Returns how many shapes were compared."""
    *own, graph = trials
    shapes, graph_error = _check_shapes(groups, keep, graph.module, sliced, reference, call)
    graph.check("twin", lambda module: graph_error)
    for trial in own:
        trial.check("twin", lambda module: _module_error(groups, module, sliced, reference, call))
    return shapes


class _Trial:
    """One form of the result and its largest errors so far; ``fault`` says why it is out."""

    def __init__(self, form: str, module: nn.Module) -> None:
        self.form, self.module, self.fault = form, module, ""
        self.errors = {"twin": 0.0, "real": 0.0}

    def check(self, weights: str, error_of: Callable[[nn.Module], float]) -> None:
        """Hold the module to one more state, unless it is out already."""
        if self.fault:
            return
        try:
            error = error_of(self.module)
        except Exception as failure:
            first = (str(failure) or "-").splitlines()[0]
            self.fault = f"the {_FORMS[self.form]} cannot run: {type(failure).__name__}: {first}"
            return
        self.errors[weights] = max(error, self.errors[weights])
        if error > LIMIT:
            self.fault = f"the {_FORMS[self.form]} differs from the masked original by {error:.1e} (limit {LIMIT:.0e})"


_FORMS = {"class": "user's own class", "graph": "rewritten graph module"}


def randomised(groups: Groups, tensors: Mapping[str, Tensor], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """A twin of the state: every parameter and every sliceable buffer drawn at random at a sane scale.

    scale: of the weights of layers, relative to 1/sqrt(fan in). Below 1 it is a calm twin: activations do not grow
    with depth, and biases are positive, so that ReLUs live.
    Constants that the forward makes itself stay: a user's class would go on making them as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    sliceable = {name for name, _ in groups.labels.axes} - set(groups.graph.constants)
    twin = {}
    for name, tensor in tensors.items():
        original = groups.graph.tensors[name]
        if not tensor.is_floating_point() or not (isinstance(original, nn.Parameter) or name in sliceable):
            twin[name] = tensor
            continue
        shape = tuple(tensor.shape)
        drawn = torch.randn(shape, generator=generator, dtype=FP64)
        if tensor.dim() >= 2:
            drawn *= scale * (1.5 * max(shape[0], 1) / max(1, tensor.numel())) ** 0.5    # about 1/sqrt(fan in)
        elif name.endswith(("bias", "running_mean")):
            drawn *= 0.3
            if scale < 1 and name.endswith("bias"):
                drawn = drawn.abs()
        else:                       # scales, slopes, variances: positive is safe for each of them
            drawn = drawn.abs().clamp(0.3, 1.7)
        if bool((tensor > 0).all()):        # a variance of more axes, say, under a root
            drawn = drawn.abs().clamp(1e-3)
        twin[name] = drawn.to(tensor.dtype).to(tensor.device)
    return twin


def _finite(outputs: list[Any]) -> bool:
    return all(bool(out.isfinite().all()) for out in outputs if isinstance(out, Tensor))


def _module_error(groups: Groups, module: nn.Module, tensors: Mapping[str, Tensor], reference: list[Any],
                  call: Call) -> float:
    with _lent(module, groups, tensors), torch.no_grad(), same_dice():
        run = module if isinstance(module, fx.GraphModule) else ghost(module)   # nothing is left on what is returned
        outputs = pytree.tree_leaves(run(*_copied(call.args), **_copied(dict(call.kwargs))))
    return difference(outputs, reference)


@contextlib.contextmanager
def _lent(module: nn.Module, groups: Groups, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a module on the given values of its state, on its own for the others, all in fp64; then give it its
    own back."""
    slots = [(t, t.data) for t in [*module.parameters(), *module.buffers()]]
    by_name = {**tensors, **{alias: tensors[name] for alias, name in groups.graph.tied.items() if name in tensors}}
    try:
        everything = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        for name, tensor in everything:
            if name in by_name:
                tensor.data = by_name[name].clone()
            elif tensor.is_floating_point():
                tensor.data = tensor.data.to(FP64)
        yield
    finally:
        for tensor, data in slots:
            tensor.data = data


def _check_shapes(groups: Groups, keep: Tensor, module: nn.Module, tensors: Mapping[str, Tensor],
                  reference: list[Any], call: Call) -> tuple[int, float]:
    """Run the rewritten graph node by node against every predicted shape; its output error comes for free.

    A stale view can silently turn a batch of 2 into 1, so a forward that runs proves nothing by itself.
    """
    watch = _ShapeWatch(module, groups, keep)
    leaves = _copied(tuple(pytree.tree_leaves((call.args, dict(call.kwargs)))))
    with _lent(module, groups, tensors), torch.no_grad(), same_dice():
        outputs = watch.run(*leaves, enable_io_processing=False)
    return watch.checked, difference(pytree.tree_leaves(outputs), reference)


class _ShapeWatch(fx.Interpreter):
    def __init__(self, module: nn.Module, groups: Groups, keep: Tensor) -> None:
        super().__init__(module)
        self.labels, self.keep, self.checked = groups.labels, keep, 0
        self.original = {node.name: node for node in groups.graph.nodes if node.op == "call_function"}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        node = self.original.get(n.meta.get(ORIGIN, ""))
        if isinstance(value, Tensor) and node is not None and self.labels.graph.is_tensor(node):
            dims = self.labels.dims(node, self.keep)
            predicted = at(dims, self.labels.graph.batch)
            if len(predicted) != value.dim() or any(
                    not dim.measured and want != size
                    for dim, want, size in zip(dims, predicted, value.shape, strict=True)):
                raise PlanError(f"{place(node)}: the plan predicts shape {predicted}, "
                                f"the sliced network has {tuple(value.shape)}.")
            self.checked += 1
        return value


def _proof_call(groups: Groups, seed: int | None) -> Call:
    """Inputs for the proof: floats drawn at random, all else as given; a batch of 2 where the batch is free.

    No seed: all of them as given. The twin wants inputs that hide nothing; but a float may be a mask, and one drawn at
    random lets attention look at one position only.
    """
    graph = groups.graph
    generator = torch.Generator().manual_seed(seed or 0)

    def draw(tensor: Tensor) -> Tensor:
        if seed is None or not tensor.is_floating_point():
            return _cast(tensor)
        return torch.randn(tensor.shape, generator=generator, dtype=FP64).to(tensor.device)
    call = Call(graph.args, graph.kwargs)
    return (call.resized(graph.batch) if graph.free_batch else call).map(draw)


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.clone(), value)


def _cast(tensor: Tensor) -> Tensor:
    return tensor.to(FP64) if tensor.is_floating_point() else tensor
