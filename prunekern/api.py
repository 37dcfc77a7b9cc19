"""One call from a trained network to a smaller, proven, lowered one: ``compress``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunekern import train as training
from prunekern.backends import Lowered
from prunekern.backends import lower as lower_network
from prunekern.errors import InputError, TargetError
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call, as_call, from_loader, infer
from prunekern.graph.trace import check_model
from prunekern.prune import schedule
from prunekern.prune.importance import Criterion
from prunekern.prune.oneshot import groups_of
from prunekern.prune.recalibrate import recalibrate as recalibrate_norms
from prunekern.prune.target import SHARES, Target
from prunekern.result import Result
from prunekern.search import Trial, smallest
from prunekern.summary import summarise

Tell = Callable[[str], None]
FIT = {"epochs": 1, "lr": 0.01}


def compress(model: nn.Module, example_inputs: Any = None, target: Target | None = None, *,
             criterion: str | Criterion = "l2", reduction: str = "mean", normalisation: str = "mean",
             direction: str = "minimum", ranking: str = "global", ignore: Sequence[str] = (), round_to: int = 1,
             calibrate: Any = None, train: Any = None, validate: Any = None, test: Any = None,
             steps: int = 1, fit: Mapping[str, Any] | None = None, recalibrate: bool = False,
             loss: Callable[..., Tensor] | None = None, lower: bool = True, backend: str = "auto",
             checkpoint: str | Path | None = None, seed: int = 0, tell: Tell = lambda _: None) -> Result:
    """Shrink a trained network to a target, prove every cut, and lower the result to GEMMs.

    model: an nn.Module in eval mode; never modified. example_inputs: one batch (tensor, tuple or dict); taken
    from a loader, or inferred from an unambiguous first layer, where left out. target: what remains (default:
    half of the MACs); shares may be combined, ``accuracy`` and ``max_drop`` need ``validate``.
    criterion, reduction, normalisation, direction: see ``prunekern.prune.importance.score``. ranking: 'global'
    or 'layer'. ignore: globs of layers left alone. round_to: channels kept are multiples of it.
    calibrate: unlabelled batches, for criteria that look at activations and for ``recalibrate`` (batch-norm
    statistics estimated again after every cut). train, validate, test: loaders, (inputs, labels) tensors or
    functions; ``train(model)`` may train in place itself, ``validate(model)`` and ``test(model)`` may return an
    accuracy themselves. Selection uses the validation data only; test data gives the last figure.
    steps: prune in so many equal ratios, training (``fit``: options of ``prunekern.train.fit``) in between.
    checkpoint: a folder; the same call continues from it after a kill. tell: called with progress lines.

    Raises ModelError, InputError, TraceError, TargetError, PlanError, ProofError, LoweringError, UnknownName,
    BackendUnavailable, ArtefactError; the model is then as it was.
    """
    target = target or Target(macs=0.5)
    check_model(model)
    notes: list[str] = []
    call = as_call(model, _example(model, example_inputs, (calibrate, train, validate, test), notes))
    tell("trace")
    groups = groups_of(model, call)
    plan_options = {"criterion": criterion, "reduction": reduction, "normalisation": normalisation,
                    "direction": direction, "ranking": ranking, "ignore": tuple(ignore), "round_to": round_to,
                    "calibrate": _batches(calibrate if calibrate is not None else train), "loss": loss, "seed": seed}
    work = _Work(model, groups, plan_options, steps, train, validate, calibrate if recalibrate else None,
                 {**FIT, **(fit or {})}, seed, Path(checkpoint) if checkpoint else None, tell)
    outcome, metrics = work.accurate(target) if target.needs_evaluator else work.run(target, work.checkpoint)
    for name, data in (("validation", validate), ("test", test)):
        if data is not None:
            tell(f"measure on {name} data")
            metrics[f"{name} accuracy, original"] = _accuracy(model, data)
            metrics[f"{name} accuracy, compressed"] = _accuracy(outcome.model, data)
    lowered = _lowered(outcome.model, call, backend, tell) if lower else None
    all_notes = tuple(dict.fromkeys((*notes, *outcome.notes)))
    report = summarise(model, groups, outcome.plan, outcome.steps, lowered, metrics, all_notes)
    return Result(outcome.model, outcome.plan, outcome.steps[-1].proof.form, outcome.steps, call, report, lowered,
                  all_notes, metrics)


def _lowered(model: nn.Module, call: Call, backend: str, tell: Tell) -> Lowered:
    tell("lower")
    return lower_network(model, call, backend=backend)


@dataclass
class _Work:
    """The parts of one ``compress`` call that its stages share."""

    model: nn.Module
    groups: Groups
    options: dict[str, Any]
    steps: int
    train: Any
    validate: Any
    statistics: Any
    fit: Mapping[str, Any]
    seed: int
    checkpoint: Path | None
    tell: Tell
    dense: float = field(default=0.0)

    def run(self, target: Target, checkpoint: Path | None) -> tuple[schedule.Outcome, dict[str, Any]]:
        between = self._between(checkpoint) if self.train is not None or self.statistics is not None else None
        outcome = schedule.run(self.model, self.groups, target, steps=self.steps, between=between,
                               checkpoint=checkpoint, tell=self.tell, **self.options)
        return outcome, {}

    def _between(self, checkpoint: Path | None) -> schedule.Between:
        def between(module: nn.Module, number: int) -> dict[str, Any]:
            found: dict[str, Any] = {}
            if self.statistics is not None:
                recalibrate_norms(module, _batches(self.statistics))
            if self.validate is not None:
                found["accuracy before training"] = _accuracy(module, self.validate)
            if self.train is not None:
                found.update(self._train(module, number, checkpoint))
            if self.validate is not None:
                found["accuracy"] = _accuracy(module, self.validate)
            return found
        return between

    def _train(self, module: nn.Module, number: int, checkpoint: Path | None) -> dict[str, Any]:
        if _takes_model(self.train):
            self.train(module)
            return {}
        place = checkpoint / f"fit-{number}.ckpt" if checkpoint else None
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
        history = training.fit(module, self.train, progress=False, seed=self.seed, checkpoint=place,
                               **{"loss": self.options["loss"], **self.fit})
        return {"loss": history.final.loss} if history.final else {}

    def accurate(self, target: Target) -> tuple[schedule.Outcome, dict[str, Any]]:
        """The smallest network that keeps the accuracy; shares in the target are upper bounds on its size."""
        if self.validate is None:
            raise TargetError("a target on accuracy or max_drop needs validate= (data or a function) to measure it.")
        dense = _accuracy(self.model, self.validate)
        floor = max(target.accuracy or 0.0, dense - (target.max_drop if target.max_drop is not None else 1e9) / 100)
        if target.shares or target.layers or target.one:
            return self._bounded(target, floor)

        def make(share: float) -> Trial[schedule.Outcome]:
            self.tell(f"try {share:.3f} of the MACs")
            folder = self.checkpoint / f"share-{share:.5f}" if self.checkpoint else None
            outcome, _ = self.run(Target(macs=share), folder)
            return Trial(share, _accuracy(outcome.model, self.validate), outcome)
        best, trials = smallest(make, floor, dense=dense)
        tried = ", ".join(f"{t.share:.3f}: {t.accuracy:.4f}" for t in trials)
        outcome = best.result
        said = f"accuracy floor {floor:.4f}: the share of MACs was bisected (share: accuracy) {tried}"
        plan = outcome.plan.edited(target={**outcome.plan.target, **target.to_json()})
        return schedule.Outcome(outcome.model, plan, outcome.steps, (*outcome.notes, said)), {}

    def _bounded(self, target: Target, floor: float) -> tuple[schedule.Outcome, dict[str, Any]]:
        asked = {name: value for name, value in target.to_json().items() if name not in ("accuracy", "max_drop")}
        outcome, metrics = self.run(Target(**asked), self.checkpoint)
        found = _accuracy(outcome.model, self.validate)
        if found < floor:
            shares = {name: round(outcome.plan.costs[name][1] / outcome.plan.costs[name][0], 4) for name in SHARES}
            raise TargetError(f"the combination is out of reach: at {shares} the validation accuracy is {found:.4f}, "
                              f"below the floor {floor:.4f}. Loosen one of them, or pass train= to fine-tune.")
        return outcome, metrics


def _example(model: nn.Module, given: Any, sources: Sequence[Any], notes: list[str]) -> Any:
    """Example inputs: as given, else from the first data there is, else inferred from the first layer."""
    if given is not None:
        return given
    for source in sources:
        if source is not None and not _takes_model(source):
            return from_loader(_batches(source) or ())
    found = infer(model)
    notes.append(f"example inputs were inferred from the first layer: {tuple(found.shape)}, {found.dtype}")
    return found


def _batches(data: Any) -> Any:
    """Data as an iterable of batches (a few hundred rows each where it is tensors); None stays None."""
    if data is None or _takes_model(data):
        return None
    if isinstance(data, Tensor):
        return [data]
    return training.passes(data, 256)


def _takes_model(data: Any) -> bool:
    """Whether something is a function of the model, rather than data or a function that makes data."""
    if not callable(data) or hasattr(data, "__iter__") or hasattr(data, "__getitem__"):
        return False
    parameters = inspect.signature(data).parameters.values()
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _accuracy(model: nn.Module, data: Any) -> float:
    if _takes_model(data):
        value = data(model)
        if not isinstance(value, (int, float)):
            raise InputError(f"the evaluator returned a {type(value).__name__}, expected an accuracy from 0 to 1.")
        return float(value)
    return training.accuracy(model, data)
