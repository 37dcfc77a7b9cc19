"""A share of channels for every family, searched by Optuna: the best for one cost (TPE), or a front (NSGA-II).

Unlike ``search/ratios.py`` this measures whole networks, so what layers do to each other counts; it takes more of them.
With a target, a trial draws how the families stand to each other, and one exponent scales all of them to the cost that
is asked for, so every trial is a network of that cost. Trials that fall behind while they are measured are pruned.

Bergstra et al., Algorithms for Hyper-Parameter Optimization (NeurIPS 2011); Deb et al., NSGA-II (2002); Akiba et al.,
Optuna (KDD 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunekern.analysis.sensitivity import Scorer, labelled_batches, unlabelled_batches
from prunekern.errors import ArtefactError, InputError, TargetError
from prunekern.prune.target import Target
from prunekern.report import Curve, Table
from prunekern.search.ratios import Ratios, Space, within

if TYPE_CHECKING:
    import optuna

LOW, HIGH = 0.05, 1.0           # of the shares that are drawn
CHUNKS = 8                      # parts in which a trial is measured, at least, where there are so many batches
STARTUP = 5                     # trials before any is pruned
SIGMA = 3.0                     # standard errors of accuracy by which another network must lead on the front
FILE = "trials.log"

Evaluate = Callable[[Target], float]


@dataclass(frozen=True)
class Study:
    """All trials. best: the ratios of the least loss, or with two objectives the front, cheapest first.

    finished, pruned: how many trials were measured whole, and how many were given up early.
    """

    best: tuple[Ratios, ...]
    finished: int
    pruned: int

    @property
    def ratios(self) -> Ratios:
        """The one result of a search with a target; of a front, the one with the least loss."""
        return min(self.best, key=lambda each: each.loss)


def tune(model: nn.Module, data: Any, target: Target | None = None, *, trials: int = 50, loss: str = "divergence",
         evaluate: Evaluate | None = None, start: Sequence[Ratios] = (), example_inputs: Any = None,
         checkpoint: str | Path | None = None, tell: Callable[[str], None] = lambda _: None, **options: Any) -> Study:
    """Search with Optuna (``pip install 'prunekern[search]'``).

    target: one share, for which the least loss is searched (TPE); None: the front of MACs and loss is (NSGA-II).
    data: inputs without labels for loss='divergence', with labels for 'accuracy' (the loss is 1 - accuracy). evaluate:
    measures a trial instead: Target(layers=...) -> a score, higher is better (an accuracy after ``compress``, say; then
    no trial is pruned before its end). start: ratios to try first, such as those of ``layerwise``.
    checkpoint: a folder; trials are kept there, and the same call goes on to ``trials`` of them in all. options: see
    ``Space``.

    Raises InputError (no Optuna, wrong data), TargetError, ArtefactError (a checkpoint of another search).
    """
    optuna = _optuna()
    if trials < 1:
        raise InputError(f"trials={trials}: at least one is needed.")
    if loss not in ("divergence", "accuracy"):
        raise InputError(f"loss={loss!r}; known: 'divergence' (no labels needed), 'accuracy'.")
    labelled = loss == "accuracy"
    batches = labelled_batches(data) if labelled else [(each, None) for each in unlabelled_batches(data)]
    inputs = [each for each, _ in batches]
    options = {"calibrate": batches if labelled else inputs, **options}
    space = Space.of(model, example_inputs if example_inputs is not None else inputs[0], target, **options)
    scorer = Scorer(space.groups, batches)
    trial = _Trial(space, scorer, loss, evaluate, target is not None)
    identity = {**space.identity(model, scorer, options), "loss": loss, "evaluate": evaluate is not None,
                "target": None if target is None else target.to_json()} if checkpoint is not None else {}
    study = _study(optuna, Path(checkpoint) if checkpoint is not None else None, identity, target is None,
                   int(options.get("seed", 0)))
    _enqueue(study, space, start)
    finished = [each for each in study.get_trials(deepcopy=False) if each.state.name in ("COMPLETE", "PRUNED")]

    def said(_: Any, done: Any) -> None:
        value = f"{done.values[0]:.4g}" if done.state.name == "COMPLETE" else "given up early"
        tell(f"trial {done.number + 1}: {loss if evaluate is None else 'loss'} {value}")
    if len(finished) < trials:
        study.optimize(trial, n_trials=trials - len(finished), callbacks=[said])
    return _result(study, space, trial)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError("this search needs Optuna: pip install 'prunekern[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, folder: Path | None, identity: Mapping[str, Any], front: bool, seed: int) -> optuna.Study:
    """The study, continued where there is one. Trials that a kill left running count as failed."""
    import json
    storage = None
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(folder / FILE)))
            known = optuna.get_all_study_names(storage)
        except (OSError, ValueError, KeyError) as error:
            raise ArtefactError(f"{folder / FILE} cannot be used ({type(error).__name__}: {error}); delete it to start "
                                "again, or choose another folder.") from error
        count = len(optuna.load_study(study_name="ratios", storage=storage).trials) if "ratios" in known else 0
    else:
        count = 0
    # Drawing goes on, and does not begin again with the same numbers.
    sampler = optuna.samplers.NSGAIISampler(seed=seed + count, population_size=16) if front else \
        optuna.samplers.TPESampler(seed=seed + count, multivariate=True, n_startup_trials=8)
    pruner = optuna.pruners.NopPruner() if front else optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
    study = optuna.create_study(study_name="ratios", storage=storage, sampler=sampler, pruner=pruner,
                                load_if_exists=True, directions=["minimize"] * (2 if front else 1))
    mark = json.dumps(identity, sort_keys=True, default=str)
    if study.user_attrs.setdefault("identity", mark) != mark:
        raise ArtefactError(f"{folder} holds the trials of another search (other model, data or settings); choose "
                            "another folder, or delete it to start again.")
    study.set_user_attr("identity", mark)
    for each in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(each.number, state=optuna.trial.TrialState.FAIL)
    return study  # type: ignore[no-any-return]


def _enqueue(study: optuna.Study, space: Space, start: Sequence[Ratios]) -> None:
    """The same share for all, to be compared with, and what the user has."""
    if study.get_trials(deepcopy=False):
        return
    study.enqueue_trial({family.name: 0.5 for family in space.families})
    for ratios in (each for each in start if each.layers):
        left = {name: after / before for name, (before, after) in ratios.channels.items()}
        study.enqueue_trial({family.name: min(max(left.get(family.name, HIGH), LOW), HIGH)
                             for family in space.families})


class _Trial:
    """One network: drawn, measured batch by batch, given up where it is hopeless."""

    def __init__(self, space: Space, scorer: Scorer, loss: str, evaluate: Evaluate | None, targeted: bool) -> None:
        self.space, self.scorer, self.loss, self.evaluate, self.targeted = space, scorer, loss, evaluate, targeted

    def keep(self, params: Mapping[str, float]) -> tuple[Tensor, float]:
        """(what parameters stand for, its cost)."""
        weights = [params[family.name] for family in self.space.families]
        if self.targeted:
            return within(self.space, weights)
        keep = self.space.keep(weights)
        return keep, self.space.spent(keep)

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        keep, cost = self.keep({family.name: trial.suggest_float(family.name, LOW, HIGH)
                                for family in self.space.families})
        trial.set_user_attr("cost", cost)
        if self.evaluate is not None:
            value = self.evaluate(Target(layers=self.space.layers(keep) or {"*": 1.0}))
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise InputError(f"evaluate returned {value!r}, expected a number, higher being better.")
            loss = 1 - float(value)
        else:
            loss = self._measure(trial, keep, cost)
        return loss if self.targeted else (loss, cost)

    def _measure(self, trial: optuna.Trial, keep: Tensor, cost: float) -> float:
        import optuna
        loss, step = math.nan, max(1, len(self.scorer.batches) // CHUNKS)
        for number, (count, accuracy, diverged) in enumerate(self.scorer.running(keep), 1):
            loss = 1 - accuracy if self.loss == "accuracy" else diverged
            if number % step or number == len(self.scorer.batches):
                continue
            if self.targeted:
                trial.report(loss, number)
                hopeless = trial.should_prune()
            else:
                hopeless = self._dominated(trial.study, loss, cost, count)
            if hopeless:
                trial.set_user_attr("pruned at", count)
                raise optuna.TrialPruned
        return loss

    def _dominated(self, study: optuna.Study, loss: float, cost: float, count: int) -> bool:
        """Whether a finished network is as cheap and better by more than what is still to be measured can make up for:
        by ``SIGMA`` standard errors of an accuracy, or of a divergence by half."""
        margin = SIGMA * math.sqrt(max(loss * (1 - loss), 1e-9) / count) if self.loss == "accuracy" else loss / 2
        return any(each.state.name == "COMPLETE" and each.values[1] <= cost and each.values[0] < loss - margin
                   for each in study.get_trials(deepcopy=False))


def _result(study: optuna.Study, space: Space, trial: _Trial) -> Study:
    done = study.get_trials(deepcopy=False)
    complete = [each for each in done if each.state.name == "COMPLETE"]
    pruned = sum(each.state.name == "PRUNED" for each in done)
    if not complete:
        raise TargetError(f"none of {len(done)} trials was measured whole; allow more trials.")
    best = [min(complete, key=lambda each: each.values[0])] if trial.targeted else \
        sorted(study.best_trials, key=lambda each: each.values[1])
    name = "loss" if trial.evaluate is not None or trial.loss == "accuracy" else trial.loss
    tables, curves = (_table(done, space.cost, name),), _curves(done, complete, name)
    found = []
    for each in best:
        keep, cost = trial.keep(each.params)
        found.append(Ratios(space.layers(keep), space.cost, cost, each.values[0], name, space.channels(keep),
                            (f"the best of {len(complete)} networks measured whole; {pruned} were given up early",),
                            tables, curves))
    return Study(tuple(found), len(complete), pruned)


def _table(done: Sequence[optuna.trial.FrozenTrial], cost: str, name: str) -> Table:
    rows = tuple((each.number + 1, each.state.name.lower(), each.values[0] if each.state.name == "COMPLETE" else None,
                  each.user_attrs.get("cost"), each.user_attrs.get("pruned at")) for each in done)
    return Table("Trials", ("trial", "state", name, f"share of {cost}", "samples when given up"), rows)


def _curves(done: Sequence[optuna.trial.FrozenTrial], complete: Sequence[optuna.trial.FrozenTrial],
            name: str) -> tuple[Curve, ...]:
    best, line = math.inf, []
    for each in complete:
        best = min(best, each.values[0])
        line.append((float(each.number + 1), best))
    each_one = tuple((float(each.number + 1), each.values[0]) for each in complete)
    return (Curve(f"Search: {name}", "trial", name, {"each trial": each_one, "best so far": tuple(line)}),)
