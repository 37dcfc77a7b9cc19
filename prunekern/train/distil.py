"""Knowledge distillation: a student learns a teacher's class scores, and the outputs of layers inside."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.core.graph import owner
from prunekern.core.plan import Plan
from prunekern.errors import InputError, ModelError
from prunekern.graph.groups import Groups
from prunekern.prune.slice import choice_of
from prunekern.train.batching import call, scores
from prunekern.train.checkpoint import fingerprint
from prunekern.train.evaluate import Loss, device_of, kept_modes

Kept = Mapping[str, Mapping[int, Tensor]]
"""Layer -> axis of its output -> which indices of the teacher's the student still has."""


@dataclass(frozen=True)
class Distil:
    """`labels * loss + logits * T^2 * KL(teacher / T, student / T) + features * mean of the layers' errors`.

    The KL term compares class scores `[N, classes, ...]` softened by `temperature` T (Hinton, Vinyals and Dean 2015).
    `layers` names modules whose outputs are compared (FitNets: Romero et al. 2015), each by its squared error relative
    to the mean square of the teacher's. Where the student has fewer channels, the kept ones are compared: `kept`, as
    `kept_outputs` gives it. Batches without labels are trained on by the other two terms.
    """

    logits: float = 0.9
    labels: float = 0.1
    temperature: float = 4.0
    layers: tuple[str, ...] = ()
    features: float = 1.0
    kept: Kept = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("logits", "labels", "features"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"distil: {name}={getattr(self, name)!r} must be a weight from 0.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"distil: temperature={self.temperature!r} must be positive.")
        if not self.logits and not (self.layers and self.features):
            raise InputError("distil: nothing of the teacher is used; give logits a weight, or name layers.")

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint's settings say of it."""
        digest = hashlib.sha256()
        for name, axes in sorted(self.kept.items()):
            digest.update(f"{name}: { {axis: index.tolist() for axis, index in sorted(axes.items())} }".encode())
        return {**asdict(replace(self, kept={})), "layers": list(self.layers), "kept": digest.hexdigest()[:16]}


def as_distil(asked: Any) -> Distil:
    """None or True: the defaults; a mapping of fields; a `Distil`. Raises `InputError`."""
    if asked is None or asked is True:
        return Distil()
    if isinstance(asked, Mapping):
        known = [entry.name for entry in fields(Distil)]
        wrong = sorted(asked.keys() - set(known))
        if wrong:
            raise InputError(f"distil={{{wrong[0]!r}: ...}} is unknown; known: {', '.join(known)}.")
        layers = asked.get("layers", ())
        return Distil(**{**asked, "layers": (layers,) if isinstance(layers, str) else tuple(layers)})
    if not isinstance(asked, Distil):
        raise InputError(f"distil is a {type(asked).__name__}; pass a mapping like {{'temperature': 4}}, or a Distil.")
    return asked


def kept_outputs(groups: Groups, plan: Plan, layers: Sequence[str]) -> dict[str, dict[int, Tensor]]:
    """For `Distil.kept`: which indices of these modules' outputs a plan keeps, axes that stay whole left out.

    groups: of the teacher; the module's output is what its forward computes last. Raises `InputError` for a name
    that the traced network does not have, `PlanError` where the plan belongs to another one.
    """
    keep, labels = choice_of(groups, plan), groups.labels
    last: dict[str, Any] = {}
    for node in groups.graph.nodes:
        if node.op == "call_function":
            for path in _paths(node):
                last[path] = node
    found: dict[str, dict[int, Tensor]] = {}
    for name in layers:
        if name not in last:
            raise InputError(f"distil: the network runs no layer {name!r}; it has {_some(last)}.")
        node = last[name]
        live = labels.live.get(node, ())
        axes = {} if isinstance(live, list) else {axis: labels.alive(node, axis, keep) for axis, _ in live}
        found[name] = {axis: alive.nonzero()[:, 0] for axis, alive in axes.items() if not bool(alive.all())}
    return found


def _paths(node: Any) -> list[str]:
    """Every module inside whose forward a node was computed."""
    parts = owner(node)[0].split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


class Teaching:
    """The loss of a student under a teacher. Use it inside `ready`, which puts the hooks on and takes them off."""

    def __init__(self, student: nn.Module, teacher: nn.Module, asked: Distil, loss: Loss) -> None:
        if not isinstance(teacher, nn.Module):
            raise ModelError(f"fit: the teacher is a {type(teacher).__name__}, it must be a torch.nn.Module.")
        own = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ModelError("fit: the teacher shares weights with the model that is trained; pass a copy of it.")
        self.student, self.teacher, self.asked, self.loss = student, teacher, asked, loss
        self.theirs: dict[str, Tensor] = {}
        self.ours: dict[str, Tensor] = {}

    @contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        """The teacher on `device` and in eval mode; it is as it was afterwards."""
        home = device_of(self.teacher)
        with ExitStack() as stack:
            stack.enter_context(kept_modes(self.teacher, train=False))
            if home != device:
                stack.callback(self.teacher.to, home)
                self.teacher.to(device)
            for model, seen in ((self.teacher, self.theirs), (self.student, self.ours)):
                for handle in _tapped(model, self.asked.layers, seen):
                    stack.callback(handle.remove)
            yield

    def __call__(self, value: Any, target: Tensor | None) -> tuple[Tensor, Any]:
        """The loss on a batch, and the student's output."""
        asked = self.asked
        with torch.no_grad():
            taught = call(self.teacher, value)
        output = call(self.student, value)
        terms: list[Tensor] = []
        if target is not None and asked.labels:
            terms.append(asked.labels * self.loss(output, target))
        if asked.logits:
            terms.append(asked.logits * softened(scores(output), scores(taught), asked.temperature))
        if asked.layers and asked.features:
            errors = [self._error(name) for name in asked.layers]
            terms.append(asked.features * torch.stack(errors).mean())
        self.ours.clear()
        self.theirs.clear()
        return torch.stack([term.float() for term in terms]).sum(), output

    def _error(self, name: str) -> Tensor:
        if name not in self.ours or name not in self.theirs:
            raise InputError(f"distil: layer {name!r} did not run, or gave no tensor; name one that does.")
        ours, theirs = self.ours[name].float(), self.theirs[name].float()
        for axis, index in self.asked.kept.get(name, {}).items():
            if ours.shape[axis] != theirs.shape[axis]:
                theirs = theirs.index_select(axis, index.to(theirs.device))
        if ours.shape != theirs.shape:
            raise InputError(f"distil: layer {name!r} gives {tuple(ours.shape)} in the student and "
                             f"{tuple(theirs.shape)} in the teacher; pass kept=kept_outputs(groups, plan, layers).")
        return F.mse_loss(ours, theirs) / theirs.square().mean().clamp(min=1e-12)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with."""
        return {**self.asked.to_dict(), "weights": fingerprint(self.teacher)}


def softened(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL` of the softened class scores `[N, classes, ...]`, averaged over everything but the classes.

    Raises `InputError` where the two have different shapes.
    """
    if ours.shape != theirs.shape:
        raise InputError(f"distil: the student's scores are {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}; "
                         "they must be of the same classes.")
    if ours.dim() < 2:
        raise InputError(f"distil: class scores are {tuple(ours.shape)}, expected [N, classes, ...]; set logits to 0.")
    student = F.log_softmax(ours.float() / temperature, 1)
    teacher = F.log_softmax(theirs.float() / temperature, 1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean() * temperature**2


def _tapped(model: nn.Module, layers: Sequence[str], seen: dict[str, Tensor]) -> Iterator[Any]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in layers:
        if name not in modules:
            raise InputError(f"distil: {type(model).__name__} has no layer {name!r}; it has "
                             f"{_some([path for path in modules if path])}.")

        def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            found = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(found, Tensor):
                seen[name] = found
        yield modules[name].register_forward_hook(hook)


def _some(names: Any) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")
