"""One channel at a time: prune, retrain, keep the step if it cost little; every step leaves its pruning triplet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load, save
from torch import nn

from prunekern.core.files import write_bytes, write_text
from prunekern.core.plan import Plan
from prunekern.errors import ArtefactError, InputError, TargetError
from prunekern.graph.groups import Family, Groups
from prunekern.graph.inputs import Call
from prunekern.prune.compose import compose
from prunekern.prune.importance import Criterion
from prunekern.prune.oneshot import prune
from prunekern.prune.prove import Proof
from prunekern.prune.rebuild import check_structure, rebuild
from prunekern.prune.schedule import Outcome, Step, identity_of
from prunekern.prune.slice import choice_of
from prunekern.prune.target import Target, ignored

VERSION = 1
Train = Callable[[nn.Module, int, Plan], Any]
"""Called with a pruned module, to be trained in place, the step's number, and the plan that leads to it from the
original; what it returns is in ``Taken.told``."""


@dataclass(frozen=True)
class Stage:
    """A pass over a layer's channels, least important first, ended by a step that costs too much.

    layer: a glob of one family of the original (``Family.name`` or a layer of it). per_step: channels at a time.
    """

    layer: str
    criterion: str | Criterion = "l2"
    per_step: int = 1
    name: str = ""

    @property
    def says(self) -> str:
        return self.name or self.layer


@dataclass(frozen=True)
class Triplet:
    """Accuracies, 0..1: before pruning, after it, after retraining. drop: first minus last, in points."""

    before: float
    after_pruning: float
    after_retraining: float

    @property
    def drop(self) -> float:
        return 100 * (self.before - self.after_retraining)


@dataclass(frozen=True)
class Taken:
    """A network that a step left. Number 0 is the original, which has no stage, triplet or proof.

    left: channels of the stage's layer. plan: relative to the original. proof, seconds: of this step alone.
    model: gives the network, from disk where it was read back. told: what training returned.
    """

    number: int
    stage: Stage | None
    left: int
    triplet: Triplet | None
    accuracy: float
    accepted: bool
    plan: Plan
    proof: Proof | None
    model: Callable[[], nn.Module]
    told: Any = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Shelf(Protocol):
    """Where finished steps are kept: a step that ``read`` finds is not taken again."""

    def read(self, number: int, stage: Stage) -> Taken | None: ...

    def write(self, taken: Taken) -> None: ...


def walk(start: Taken, groups: Groups, stages: Sequence[Stage], *, train: Train, accuracy: Callable[[nn.Module], float],
         trained: Callable[[nn.Module, Any], float] | None = None, limit: float = 1.0, shelf: Shelf | None = None,
         tell: Callable[[Stage, int, int], None] = lambda stage, left, taken: None, **options: Any) -> Iterator[Taken]:
    """Every step in order. A stage ends with the first step that loses more than ``limit`` points (it is yielded, not
    accepted, and not built upon), or when nothing more can go.

    start: the trained original, to which all plans are composed; groups: its. accuracy: measured on each network as it
    was pruned; ``trained(model, told)`` after training (default: ``accuracy`` again). tell: called before each step
    with the stage, the channels left and how many go. options: those of ``prune``.
    Raises TargetError for a layer that is none, and what ``prune`` raises.
    """
    families = [_family(groups, stage) for stage in stages]
    ignored(groups, options.get("ignore", ()))            # a glob of no layer is said before the work
    current, number = start, start.number
    for stage, family in zip(stages, families, strict=True):
        while (left := int(choice_of(groups, current.plan)[family.groups].sum())) > 1:
            taken, number = min(stage.per_step, left - 1), number + 1
            tell(stage, left, taken)
            step = shelf.read(number, stage) if shelf else None
            if step is None:
                step = _step(current, groups, stage, family, number, left, taken, train, accuracy, trained, limit,
                             options)
                if step is None:
                    number -= 1
                    break
                if shelf:
                    shelf.write(step)
            yield step
            if not step.accepted:
                break
            current = step


def _step(current: Taken, groups: Groups, stage: Stage, family: Family, number: int, left: int, taken: int,
          train: Train, accuracy: Callable[[nn.Module], float], trained: Callable[[nn.Module, Any], float] | None,
          limit: float, options: Mapping[str, Any]) -> Taken | None:
    """Prune, prove, measure, retrain, measure; None where no channel of the layer may go."""
    target = Target(one=stage.layer) if taken == 1 else Target(layers={stage.layer: (left - taken) / left})
    call = Call(groups.graph.args, groups.graph.kwargs)
    try:
        pruned = prune(current.model(), call, target, criterion=stage.criterion, policy=groups.labels.policy,
                       **options)
    except TargetError:                   # what is left is ignored, or leaves only together with the last
        if taken > 1:
            raise
        return None
    plan = compose(groups, current.plan, pruned.plan)
    remaining = int(choice_of(groups, plan)[family.groups].sum())
    if remaining == left:
        return None
    module = pruned.model
    cut = float(accuracy(module))
    told = train(module, number, plan)
    module.eval()
    after = float(accuracy(module) if trained is None else trained(module, told))
    triplet = Triplet(current.accuracy, cut, after)
    return Taken(number, stage, remaining, triplet, after, not exceeded(triplet.drop, limit), plan, pruned.proof,
                 lambda: module, told, pruned.seconds)


def exceeded(drop: float, limit: float) -> bool:
    """Whether a drop is more than the limit. Exactly the limit is not: the tolerance is for the last digit of a
    difference of two fractions."""
    return drop > limit + 1e-9


def _family(groups: Groups, stage: Stage) -> Family:
    found = groups.find(stage.layer)
    if len(found) != 1:
        raise TargetError(f"stage {stage.says!r}: {stage.layer!r} must name one layer, it names {len(found)}: "
                          + ", ".join(family.name for family in (found or groups.families)) + ".")
    if stage.per_step < 1:
        raise TargetError(f"stage {stage.says!r}: per_step={stage.per_step} must be at least 1.")
    return found[0]


def one_at_a_time(model: nn.Module, groups: Groups, stages: Sequence[Stage | str] | None = None, *, train: Train,
                  accuracy: Callable[[nn.Module], float], limit: float = 1.0, checkpoint: str | Path | None = None,
                  tell: Callable[[str], None] = lambda _: None, **options: Any) -> Outcome:
    """Remove channels one by one, retraining after each, layer by layer; the outcome is the last accepted network.

    model: trained, not modified; groups: its. stages: layers or ``Stage``s, in order (default: every family). train,
    accuracy, limit: see ``walk``. ``measured`` of each step holds stage, accuracies of the triplet, drop (points) and
    whether it was accepted. checkpoint: a folder in which every step is kept (weights, plan, triplet); the same call
    continues from it after a kill. options: those of ``prune``.

    Raises InputError (stages), ArtefactError (a checkpoint of another run, or damaged), and what ``walk`` raises.
    """
    passes = [stage if isinstance(stage, Stage) else Stage(stage)
              for stage in (stages if stages is not None else [family.name for family in groups])]
    if not passes:
        raise InputError("one_at_a_time: stages is empty; name the layers to prune, or leave it out for all of them.")
    shelf = None
    if checkpoint is not None:
        settings = ["single", limit, [(s.layer, s.per_step, _plain(s.criterion)) for s in passes]]
        shelf = _Folder(Path(checkpoint), model, groups, identity_of(model, groups, settings, options))
    whole = Plan(groups.fingerprint(), {})
    current = start = Taken(0, None, 0, None, float(accuracy(model)), True, whole, None, lambda: model)
    done: list[Step] = []
    for taken in walk(start, groups, passes, train=train, accuracy=accuracy, limit=limit, shelf=shelf,
                      tell=lambda stage, left, gone: tell(f"{stage.says}: {left} -> {left - gone}"), **options):
        assert taken.proof is not None
        assert taken.triplet is not None
        assert taken.stage is not None
        done.append(Step(len(done) + 1, {}, taken.plan.costs, taken.proof, {
            "stage": taken.stage.says, **asdict(taken.triplet), "drop": taken.triplet.drop,
            "accepted": taken.accepted}))
        current = taken if taken.accepted else current
    found = current.model()
    check_structure(found, groups, current.plan)
    notes = () if current is not start else ("no step was accepted: this is the original",)
    return Outcome(found, current.plan, tuple(done), (*current.plan.notes, *notes))


def _plain(criterion: str | Criterion) -> str:
    return criterion if isinstance(criterion, str) else getattr(criterion, "__qualname__", type(criterion).__name__)


class _Folder:
    """A step a subfolder, in which step.json is written last."""

    def __init__(self, folder: Path, model: nn.Module, groups: Groups, identity: str) -> None:
        self.folder, self.model, self.groups, self.identity = folder, model, groups, identity
        path = folder / "run.json"
        if not path.exists():
            write_text(path, json.dumps({"format": "prunekern-single", "version": VERSION, "identity": identity}))
        else:
            found = _json(path)
            if not isinstance(found, dict) or (found.get("identity"), found.get("version")) != (identity, VERSION):
                raise ArtefactError(f"{folder} is the checkpoint of another run (other model, weights or settings); "
                                    "choose another folder, or delete it to start again.")

    def write(self, taken: Taken) -> None:
        folder = self.folder / f"{taken.number:04d}"
        module, proof = taken.model(), taken.proof
        assert proof is not None
        assert taken.triplet is not None
        data = save({name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()})
        write_bytes(folder / "weights.safetensors", data)
        write_text(folder / "step.json", json.dumps({
            "number": taken.number, "left": taken.left, "triplet": asdict(taken.triplet), "accepted": taken.accepted,
            "plan": taken.plan.to_json(), "proof": proof.to_json(), "seconds": dict(taken.seconds),
            "sha256": hashlib.sha256(data).hexdigest()}))

    def read(self, number: int, stage: Stage) -> Taken | None:
        folder = self.folder / f"{number:04d}"
        if not (folder / "step.json").exists():
            return None
        data = _json(folder / "step.json")
        try:
            weights = (folder / "weights.safetensors").read_bytes()
            if hashlib.sha256(weights).hexdigest() != data["sha256"]:
                raise ValueError("its weights are not those that were saved")
            proof = Proof(**{**data["proof"], "blunt": tuple(data["proof"]["blunt"]),
                             "notes": tuple(data["proof"]["notes"])})
            triplet, plan = Triplet(**data["triplet"]), Plan.from_json(data["plan"])
            return Taken(number, stage, data["left"], triplet, triplet.after_retraining, data["accepted"], plan, proof,
                         lambda: rebuild(self.model, self.groups, plan, proof.form, load(weights)), None,
                         data["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{folder} is damaged ({type(error).__name__}: {error}); delete it to make this step "
                                "again.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); delete {path.parent} to start again.") from error
