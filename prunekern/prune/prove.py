"""Proof that a sliced network equals the original with the removed channels zeroed at their consumers' inputs.

First on a randomised twin (real weights can make a proof vacuous: zero gammas hide scrambled inputs), where
the proof must also have teeth; then on the real weights. fp64 throughout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunekern.core.graph import at, place
from prunekern.errors import PlanError, ProofError
from prunekern.graph.evaluate import evaluate, same_dice
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.graph.parts import ghost
from prunekern.prune.reference import masked_outputs, replaced, restricting
from prunekern.prune.rewrite import ORIGIN
from prunekern.prune.slice import sliced_tensors
from prunekern.prune.widen import default_dtype, widened

LIMIT = 1e-9          # fp64, relative to max|output|; real slips are of the order of 1
TEETH = 1e-9          # a channel more or less must move the twin's output by at least this share
DRAWS = 4             # how many twins are tried for one that hides nothing


@dataclass(frozen=True)
class Proof:
    """What was checked, and the numbers. Errors are max|difference| / max|masked original|.

    twin_error, real_error: of the returned module. teeth: share of the kept groups of the sampled families
    whose removal visibly changes the twin's output; blunt names families for which none does.
    shapes: how many predicted shapes were compared with what ran.
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
    with widened(groups.graph), default_dtype(torch.float64):
        return _prove(groups, keep, graph_form, class_form, seed)


def _prove(groups: Groups, keep: Tensor, graph_form: fx.GraphModule, class_form: nn.Module | None,
           seed: int) -> tuple[nn.Module, Proof]:
    dtype = torch.float64
    call, given = _proof_call(groups, dtype, seed), _proof_call(groups, dtype, None)
    real = {n: _cast(t.detach(), dtype) for n, t in groups.graph.tensors.items()}
    twin, reference, teeth, blunt = _sharpest_twin(groups, keep, real, call, seed)
    sliced_twin = sliced_tensors(groups, keep, twin)
    real_reference = masked_outputs(groups.labels, keep, real, given)
    shapes, graph_error = _check_shapes(groups, keep, graph_form, sliced_twin, dtype, reference, call)
    notes: list[str] = []
    for form, module in (("class", class_form), ("graph", graph_form)):
        if module is None:
            continue
        try:
            twin_error = graph_error if form == "graph" else _module_error(
                groups, module, sliced_twin, dtype, reference, call)
            real_error = _module_error(groups, module, {}, dtype, real_reference, given)     # on its very own weights
        except Exception as error:
            first = (str(error) or "-").splitlines()[0]
            notes.append(f"the {_FORMS[form]} cannot run: {type(error).__name__}: {first}")
            continue
        worst = max(twin_error, real_error)
        if worst <= LIMIT:
            return module, Proof(form, twin_error, real_error, LIMIT, teeth, blunt, shapes,
                                 str(dtype).removeprefix("torch."), tuple(notes))
        notes.append(f"the {_FORMS[form]} differs from the masked original by {worst:.1e} (limit {LIMIT:.0e})")
    raise ProofError("the sliced network is not equal to the masked original, so nothing is returned: "
                     + "; ".join(notes) + ". Please report the model; ignore=[...] on the layers involved avoids it.")


_FORMS = {"class": "user's own class", "graph": "rewritten graph module"}


def randomised(groups: Groups, tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A twin of the state: every parameter and every sliceable buffer drawn at random at a sane scale.

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
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        if tensor.dim() >= 2:
            drawn *= (1.5 * max(shape[0], 1) / max(1, tensor.numel())) ** 0.5    # about 1/sqrt(fan in)
        elif name.endswith(("bias", "running_mean")):
            drawn *= 0.3
        else:                       # scales, slopes, variances: positive is safe for each of them
            drawn = drawn.abs().clamp(0.3, 1.7)
        if bool((tensor > 0).all()):        # a variance of more axes, say, under a root
            drawn = drawn.abs().clamp(1e-3)
        twin[name] = drawn.to(tensor.dtype).to(tensor.device)
    return twin


def _sharpest_twin(groups: Groups, keep: Tensor, real: Mapping[str, Tensor], call: Call,
                   seed: int) -> tuple[dict[str, Tensor], list[Any], float, tuple[str, ...]]:
    """A twin whose output feels every family, or the best of a few draws (a random ReLU may die for all inputs).

    Returns (twin, its masked outputs, teeth, blunt families).
    """
    best: tuple[dict[str, Tensor], list[Any], float, tuple[str, ...]] | None = None
    for draw in range(DRAWS):
        twin = randomised(groups, real, seed + draw)
        reference = masked_outputs(groups.labels, keep, twin, call)
        teeth, blunt = _teeth(groups, keep, twin, reference, call)
        if best is None or len(blunt) < len(best[3]):
            best = twin, reference, teeth, blunt
        if not blunt:
            break
    assert best is not None
    return best


def _teeth(groups: Groups, keep: Tensor, twin: Mapping[str, Tensor], reference: list[Any],
           call: Call) -> tuple[float, tuple[str, ...]]:
    """Which kept groups visibly matter: the gradient of the output with respect to a switch per group.

    One backward pass stands for zeroing each group in turn, at first order.
    """
    labels = groups.labels
    switch = keep.to(torch.float64).requires_grad_(True)

    def switched(node: fx.Node, arg: fx.Node, value: Any) -> Any:
        if arg in labels.masked.get(node, ()):
            for axis, index in labels.live.get(arg, ()):
                value = value * switch[index].view([-1 if a == axis else 1 for a in range(value.dim())]).to(value)
        return value

    def before(node: fx.Node, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return replaced(node, values, lambda arg, value: switched(node, arg, value))
    with torch.enable_grad(), same_dice():
        outputs = evaluate(groups.graph, twin, call.args, call.kwargs, before=before,
                           instead=restricting(labels, keep), out_of_place=True)
        total = torch.zeros((), dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        for out in outputs:
            if isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad:
                weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
                scale = out.detach().abs().max().clamp(min=1e-30)
                total = total + ((out * weights).sum() / scale).to(total)
        if total.requires_grad:
            total.backward()
    seen = keep & (switch.grad.abs() > TEETH) if switch.grad is not None else torch.zeros_like(keep)
    tries = 8
    for family in groups:
        ids = family.groups[keep[family.groups]]
        if len(ids) and tries and not bool(seen[ids].any()):
            tries -= 1
            # Gradients miss writes through views and kinks: really zero one group, in the network as it is.
            seen[ids[0]] = _visible(groups, keep, twin, call, reference, int(ids[0]))
    kept = [family.groups[keep[family.groups]] for family in groups]
    blunt = tuple(f.name for f, ids in zip(groups, kept, strict=True) if len(ids) and not bool(seen[ids].any()))
    everything = torch.cat(kept) if kept else torch.tensor([], dtype=torch.long)
    return (float(seen[everything].double().mean()) if len(everything) else 1.0), blunt


def _visible(groups: Groups, keep: Tensor, twin: Mapping[str, Tensor], call: Call, reference: list[Any],
             group: int) -> bool:
    fewer = keep.clone()
    fewer[group] = False
    return difference(masked_outputs(groups.labels, fewer, twin, call), reference) > TEETH


def _module_error(groups: Groups, module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype,
                  reference: list[Any], call: Call) -> float:
    with _lent(module, groups, tensors, dtype), torch.no_grad(), same_dice():
        run = module if isinstance(module, fx.GraphModule) else ghost(module)   # nothing is left on what is returned
        outputs = pytree.tree_leaves(run(*_copied(call.args), **_copied(dict(call.kwargs))))
    return difference(outputs, reference)


def difference(outputs: list[Any], reference: list[Any]) -> float:
    """Largest relative error over tensor outputs; infinite where shapes or non-tensors differ."""
    if len(outputs) != len(reference):
        return float("inf")
    worst = 0.0
    for out, ref in zip(outputs, reference, strict=True):
        if not isinstance(ref, Tensor):
            continue
        if not isinstance(out, Tensor) or out.shape != ref.shape:
            return float("inf")
        if ref.numel():
            scale = max(float(ref.abs().max()), 1e-30) if ref.is_floating_point() else 1.0
            error = float((out.double() - ref.double()).abs().max()) / scale
            worst = max(worst, error if error == error else float("inf"))
    return worst


@contextlib.contextmanager
def _lent(module: nn.Module, groups: Groups, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Run a module on the given values of its state, on its own for the others, all in one dtype; then give it its
    own back."""
    slots = [(t, t.data) for t in [*module.parameters(), *module.buffers()]]
    by_name = {**tensors, **{alias: tensors[name] for alias, name in groups.graph.tied.items() if name in tensors}}
    try:
        everything = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        for name, tensor in everything:
            if name in by_name:
                tensor.data = by_name[name].clone()
            elif tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in slots:
            tensor.data = data


def _check_shapes(groups: Groups, keep: Tensor, module: fx.GraphModule, tensors: Mapping[str, Tensor],
                  dtype: torch.dtype, reference: list[Any], call: Call) -> tuple[int, float]:
    """Run the rewritten graph node by node against every predicted shape; its output error comes for free.

    A stale view can silently turn a batch of 2 into 1, so a forward that runs proves nothing by itself.
    """
    watch = _ShapeWatch(module, groups, keep)
    leaves = _copied(tuple(pytree.tree_leaves((call.args, dict(call.kwargs)))))
    with _lent(module, groups, tensors, dtype), torch.no_grad(), same_dice():
        outputs = watch.run(*leaves, enable_io_processing=False)
    return watch.checked, difference(pytree.tree_leaves(outputs), reference)


class _ShapeWatch(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, groups: Groups, keep: Tensor) -> None:
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


def _proof_call(groups: Groups, dtype: torch.dtype, seed: int | None) -> Call:
    """Inputs for the proof: floats drawn at random, all else as given; a batch of 2 where the batch is free.

    No seed: all of them as given. The twin wants inputs that hide nothing; but a float may be a mask, and one drawn at
    random lets attention look at one position only.
    """
    graph = groups.graph
    generator = torch.Generator().manual_seed(seed or 0)

    def draw(tensor: Tensor) -> Tensor:
        if seed is None or not tensor.is_floating_point():
            return _cast(tensor, dtype)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(dtype).to(tensor.device)
    call = Call(graph.args, graph.kwargs)
    return (call.resized(graph.batch) if graph.free_batch else call).map(draw)


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.clone(), value)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
