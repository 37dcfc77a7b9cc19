"""The study itself: train the original, then prune layer by layer; every finished step is read back, not redone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from prunekern.core.plan import Plan
from prunekern.cost import profile
from prunekern.data.dataset import Dataset, Pair
from prunekern.errors import PlanError
from prunekern.graph.groups import Groups
from prunekern.prune.compose import compose
from prunekern.prune.oneshot import Pruned, groups_of, prune
from prunekern.prune.target import Target
from prunekern.recipes.fashion_mnist.network import (
    DENSE,
    LAYERS,
    FashionNet,
    Widths,
    example,
    fvcore_macs,
    initialised,
)
from prunekern.recipes.fashion_mnist.progress import Teller
from prunekern.recipes.fashion_mnist.protocol import Protocol, Stage
from prunekern.recipes.fashion_mnist.records import Record, Store, Stored
from prunekern.train import History, accuracy, fit


@dataclass(frozen=True)
class Splits:
    """Normalised images and labels. validation decides; test is only reported."""

    train: Pair
    validation: Pair
    test: Pair

    @classmethod
    def of(cls, data: Dataset, validation: float, seed: int) -> Splits:
        train, held = data.split(validation, seed)
        return cls(train, held, data.test)


@dataclass(frozen=True)
class Study:
    """Everything the steps need. groups: of the original, to which all plans are composed."""

    protocol: Protocol
    splits: Splits
    seed: int
    store: Store
    tell: Teller
    groups: Groups

    def run(self) -> list[Stored]:
        """All steps in order, the original first. A second run goes on where the first was stopped."""
        most = 1 + sum(self._most(stage) for stage in self.protocol.stages)
        self.tell.doing("original: training", 0, most)
        done = [self.store.read(0) or self._original()]
        self._say(done[0].record)
        current, passed = done[0], 1
        for stage in self.protocol.stages:
            for step in self._stage(stage, current, len(done), passed, most):
                done.append(step)
                self._say(step.record)
                current = step if step.record.accepted else current
            passed += self._most(stage)
        self.store.write_table([step.record for step in done])
        return done

    def _most(self, stage: Stage) -> int:
        return math.ceil((DENSE[LAYERS.index(stage.layer)] - 1) / stage.per_step)

    def _stage(self, stage: Stage, current: Stored, number: int, passed: int, most: int) -> Iterator[Stored]:
        """Steps until one costs too much (the last one then, not accepted), or one channel is left."""
        while (left := current.record.widths[LAYERS.index(stage.layer)]) > 1:
            taken = min(stage.per_step, left - 1)
            self.tell.doing(f"{stage.name}: {left} → {left - taken} of {DENSE[LAYERS.index(stage.layer)]}",
                            passed, most)
            step = self.store.read(number) or self._step(stage, taken, current, number)
            yield step
            if not step.record.accepted:
                return
            current, number, passed = step, number + 1, passed + 1

    # ---- one step ------------------------------------------------------------------------------------------

    def _original(self) -> Stored:
        model, protocol = initialised(self.seed), self.protocol
        history = self._fit(model, 0, protocol.epochs, protocol.lr)
        plan = Plan(self.groups.fingerprint(), {})
        final = _final(history)
        macs, params = _costs(model)
        record = Record(0, "original", "", "", (), DENSE, None, None, final, None, 0.0, True,
                        accuracy(model, self.splits.train), accuracy(model, self.splits.test), macs, macs,
                        fvcore_macs(model), params)
        stored = Stored(record, history, plan, None, {})
        self.store.write(stored, model)
        return stored

    def _step(self, stage: Stage, taken: int, current: Stored, number: int) -> Stored:
        """Prune, prove, measure, retrain, measure, write down."""
        left = current.record.widths[LAYERS.index(stage.layer)]
        target = (Target(one=stage.layer) if taken == 1 else
                  Target(layers={stage.layer: (left - taken) / left}))
        pruned = prune(self.store.model(current.record), example(), target, criterion=stage.criterion,
                       normalisation="none", seed=self.seed)
        model = _shrunk(pruned, current.record.widths, stage.layer, taken)
        cut = accuracy(model, self.splits.validation)
        history = self._fit(model, number, self.protocol.retrain_epochs, self.protocol.retrain_lr)
        plan = compose(self.groups, current.plan, pruned.plan)
        stored = Stored(self._record(stage, current, number, model, cut, history, plan), history, plan, pruned.proof,
                        pruned.seconds)
        self.store.write(stored, model)
        return stored

    def _record(self, stage: Stage, current: Stored, number: int, model: FashionNet, cut: float, history: History,
                plan: Plan) -> Record:
        before, after = current.record.after_retraining, _final(history)
        drop = 100 * (before - after)
        macs, params = _costs(model)
        removed = set(_kept(current.plan, stage.layer)) - set(_kept(plan, stage.layer))
        return Record(number, stage.name, stage.layer, stage.says, tuple(sorted(removed)), widths_of(model), before,
                      cut, after, drop, current.record.total_drop + drop, not self.protocol.exceeded(drop), None,
                      accuracy(model, self.splits.test), macs, plan.costs["macs"][1], fvcore_macs(model), params)

    def _fit(self, model: FashionNet, number: int, epochs: int, lr: float) -> History:
        p = self.protocol
        updates = epochs * math.ceil(len(self.splits.train[1]) / p.batch_size)
        return fit(model, self.splits.train, self.splits.validation, epochs=epochs, lr=lr, momentum=p.momentum,
                   weight_decay=p.weight_decay, batch_size=p.batch_size, seed=self.seed * 100_003 + number,
                   checkpoint=self.store.checkpoint(number), progress=False,
                   before_step=self.tell.training(updates))

    def _say(self, record: Record) -> None:
        if record.before is None or record.after_pruning is None:
            text = f"original: {record.after_retraining:.2%} validation"
        else:
            text = (f"{record.stage} → {record.left}: {record.before:.2%} → {record.after_pruning:.2%} → "
                    f"{record.after_retraining:.2%} validation")
        undone = "" if record.accepted else f"; {record.drop:.2f} points lost, undone"
        self.tell.say(f"{record.number:3d} {text}, {record.test:.2%} test, {record.macs:,} MACs{undone}")


def study(protocol: Protocol, data: Dataset, seed: int, store: Store, tell: Teller) -> Study:
    """Set a study up: the splits, and the labelled graph of the original."""
    return Study(protocol, Splits.of(data, protocol.validation, seed), seed, store, tell,
                 groups_of(FashionNet().eval(), example()))


def _final(history: History) -> float:
    assert history.final is not None
    assert history.final.validation_accuracy is not None
    return history.final.validation_accuracy


def _costs(model: FashionNet) -> tuple[int, int]:
    """MACs of one image, and parameters."""
    total = profile(model, example(), batch=1).total
    return total.macs, total.params


def widths_of(model: FashionNet) -> Widths:
    """Channels of conv1 and conv2, neurons of fc1, as the weights have them."""
    return len(model.conv1.weight), len(model.conv2.weight), len(model.fc1.weight)


def _shrunk(pruned: Pruned, before: Widths, layer: str, taken: int) -> FashionNet:
    """The pruned network; it is the user's own class here, and has lost what was asked for."""
    wanted = tuple(width - taken * (name == layer) for name, width in zip(LAYERS, before, strict=True))
    model = pruned.model
    if not isinstance(model, FashionNet) or widths_of(model) != wanted:
        raise PlanError(f"{layer}: pruning left a {type(model).__name__} of other widths than {wanted}; "
                        f"{'; '.join(pruned.proof.notes) or 'its proof says nothing of it'}.")
    return model


def _kept(plan: Plan, layer: str) -> list[int]:
    whole = list(range(DENSE[LAYERS.index(layer)]))
    return list(plan.kept.get(f"{layer}.weight", {}).get(0, whole))
