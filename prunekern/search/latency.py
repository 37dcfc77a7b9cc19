"""Targets on latency: predicted step by step, and then measured on the whole lowered network.

Networks of a few widths are lowered and every step of them is timed. Which widths meet in a step is arranged so that
each pair of a step's input and output width occurs (an orthogonal array over the families of channels). Interpolated
over widths, the tables predict the time of any choice of channels, so the planner can bisect on it. What it chooses is
lowered and measured whole, in turns with the lowered original; the prediction is corrected by what was found, and the
choice is moved until the measured share is right.

Tables for parts and a check of the whole: Cai et al., ProxylessNAS (ICLR 2019), section 3.3; Yang et al., NetAdapt
(ECCV 2018). Orthogonal arrays: Bush, Orthogonal Arrays of Index Unity (1952).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.backends import Lowered
from prunekern.core.notebook import Notebook
from prunekern.errors import TargetError
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import as_call
from prunekern.prune.target import Choice, Meter, Target, by_share, choose
from prunekern.prune.units import Units
from prunekern.search.probe import LoweredProbe, Probe, Timed
from prunekern.search.tables import Corrected, Tables, colours, orthogonal, widths_of

BAND = 0.05             # the measured share is at most so far below the target (a share of it)
TRIES = 8               # networks that are measured whole, at most
LEVELS = (1.0, 0.5, 0.2)        # widths of the tables; a prime number of them


@dataclass(frozen=True)
class Verified:
    """A choice, what was measured on it, and the share that the tables alone predict."""

    keep: Tensor
    costs: Any
    notes: tuple[str, ...]
    timed: Timed
    predicted: float


class LatencyPlanner:
    """Chooses channels for ``Target(latency=...)``: pass it as ``planner`` to ``prune`` or ``propose``.

    model, example_inputs: the original, and one batch of the size that latency is to be measured at. backend: as for
    ``lower``. on: a device. seconds: of measuring each whole network. levels: shares of channels that the tables are
    measured at, a prime number of them, with 1.0 first. checkpoint: a folder; tables are kept there, network by
    network, and read again by the same call. tell: called with a line per stage. probe: what measures.

    ``dense`` stays the original also where it is called for a network that has been cut before (schedules). Raises
    TargetError, and what ``lower`` raises.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, *, backend: str = "auto", on: str | None = None,
                 seconds: float = 1.0, levels: Sequence[float] = LEVELS, checkpoint: str | Path | None = None,
                 tell: Callable[[str], None] = lambda _: None, probe: Probe | None = None) -> None:
        if len(levels) not in (2, 3, 5, 7) or levels[0] != 1.0 or not all(0 < each <= 1 for each in levels):
            raise TargetError(f"levels={tuple(levels)!r}: pass 2, 3, 5 or 7 shares of channels, 1.0 first.")
        self.probe: Probe = probe or LoweredProbe(model, as_call(model, example_inputs), backend, on, seconds)
        self.levels, self.tell = tuple(levels), tell
        self.folder = Path(checkpoint) if checkpoint is not None else None
        self._tables: dict[str, Tables] = {}
        self._first = ""
        self.last: Timed | None = None

    def tables(self, groups: Groups, units: Units) -> Tables:
        """Seconds of every step at the widths of ``levels``; measured once for a graph."""
        name = groups.fingerprint()
        if name not in self._tables:
            runs = orthogonal(len(self.levels))
            colour = colours(groups)
            identity = {"graph": name, "levels": str(self.levels), "machine": self.probe.identity}
            notebook = Notebook(self.folder / f"latency-{name}.json" if self.folder else None, "latency tables",
                                identity)
            meter, points = Meter(groups), []
            for number, run in enumerate(runs, 1):
                wanted = [(family, self.levels[run[c % len(run)]]) for family, c in zip(groups, colour, strict=True)]
                keep = ~units.removed(by_share(units, wanted))
                self.tell(f"measure the lowered steps at several widths {number}/{len(runs)}")
                # What a run keeps depends on importances, how many of each family it keeps does not.
                found = notebook.get(str(number), partial(self._steps, groups, keep))
                points.append((widths_of(groups, meter.shapes(keep)), found))
            self._tables[name] = Tables.of(groups, points)
        return replace(self._tables[name], groups=groups)       # the same graph can have been traced again

    def _steps(self, groups: Groups, keep: Tensor) -> dict[str, float]:
        return dict(self.probe.steps(groups, keep))

    def meter(self, groups: Groups, units: Units, known: Corrected | None = None) -> Meter:
        """Predicts latency beside the other costs; corrected by what is known of whole networks."""
        tables, known = self.tables(groups, units), known or Corrected()
        return Meter(groups, lambda shape: known.at(tables.share(shape)))

    def __call__(self, groups: Groups, units: Units, target: Target, *, ranking: str = "global") -> Choice:
        if target.latency is None:
            return choose(groups, units, target, ranking=ranking)
        if target.latency == 1.0:           # nothing has to get faster
            return choose(groups, units, target, ranking=ranking, meter=Meter(groups, lambda shape: 0.0))
        return _Search(self, groups, units, target, ranking).run()

    def is_original(self, groups: Groups) -> bool:
        """Whether these are the groups of the network that latency is relative to: the first that were asked about."""
        self._first = self._first or groups.fingerprint()
        return groups.fingerprint() == self._first

    def figures(self, lowered: Lowered | None) -> dict[str, float]:
        """Latencies in µs and their share, as metrics: of a network, else of the last choice."""
        timed = self.probe.against(lowered) if lowered is not None and not self.probe.moved else self.last
        return {} if timed is None else {"latency, original (µs)": timed.dense * 1e6,
                                         "latency, compressed (µs)": timed.pruned * 1e6,
                                         "latency, share": timed.share}

    def share(self, groups: Groups, keep: Tensor) -> Timed:
        """A whole network measured against the lowered original."""
        self.last = self.probe.whole(groups, keep)
        return self.last


class _Search:
    """Bisect on the prediction, measure, correct, and again."""

    def __init__(self, planner: LatencyPlanner, groups: Groups, units: Units, target: Target, ranking: str) -> None:
        assert target.latency is not None
        self.planner, self.groups, self.units, self.target, self.ranking = planner, groups, units, target, ranking
        self.limit: float = target.latency
        self.tables = planner.tables(groups, units)
        self.known = Corrected()
        self.meter = planner.meter(groups, units, self.known)
        self.seen: list[Verified] = []
        self.others = {name: share for name, share in target.shares.items() if name != "latency"}

    def run(self) -> Choice:
        if not self.planner.is_original(self.groups):        # cut before: it has its own place below the original
            self._measure(self._of(self.groups.everything()))
        if self.others or self.target.layers:                # raises where these are out of reach
            without = replace(self.target, latency=None, on=None)
            if self._measure(choose(self.groups, self.units, without, ranking=self.ranking)).timed.share <= self.limit:
                return self._best()
        aim = self.limit * (1 - BAND / 2)                     # the middle of what is good
        for _ in range(TRIES):
            choice = self._choice(aim)
            if self._known(choice) and aim < self.limit:     # units are coarse: try the room that is left
                aim = self.limit
                choice = self._choice(aim)
            if self._known(choice):
                break                                        # one unit more would be too slow
            if self.limit * (1 - BAND) <= self._measure(choice).timed.share <= self.limit:
                break
        return self._best()

    def _known(self, choice: Choice) -> bool:
        return any(torch.equal(choice.keep, each.keep) for each in self.seen)

    def _choice(self, aim: float) -> Choice:
        """The largest that takes at most ``aim``, as far as is known by now; else the smallest there is."""
        try:
            return choose(self.groups, self.units, replace(self.target, latency=aim), ranking=self.ranking,
                          meter=self.meter)
        except TargetError:
            return self._of(~self.units.removed(~self.units.last))

    def _of(self, keep: Tensor) -> Choice:
        return Choice(keep, self.meter.change(keep), self.units.notes)

    def _measure(self, choice: Choice) -> Verified:
        predicted = self.tables.share(self.meter.shapes(choice.keep))
        timed = self.planner.share(self.groups, choice.keep)
        self.planner.tell(f"measured {timed.share:.3f} of the original's latency (predicted "
                          f"{self.known.at(predicted):.3f}), at most {self.limit:g} wanted")
        self.known.add(predicted, timed.share)
        self.seen.append(Verified(choice.keep, choice.costs, choice.notes, timed, predicted))
        return self.seen[-1]

    def _bound(self, keep: Tensor) -> list[str]:
        """Other parts of the target that leave no room: what makes the network faster than it has to be."""
        left = self.meter.shares(keep, self.others)
        bound = [f"{name}={share:g}" for name, share in self.others.items() if left[name] > 0.98 * share]
        return bound + (["layers="] if self.target.layers and torch.equal(keep, self.seen[0].keep) else [])

    def _refusal(self) -> TargetError:
        best = min(self.seen, key=lambda each: each.timed.share)
        saved = 1 - min(each.costs["macs"][1] / max(each.costs["macs"][0], 1) for each in self.seen)
        return TargetError(
            f"latency={self.limit:g} is out of reach: with all gone that may go ({saved:.0%} of the MACs) the lowered "
            f"network takes {best.timed}, the best that was measured. What is left does not get faster with fewer "
            "channels (overhead of calls, layers that stay). Ask for more than that, ignore less, or measure at a "
            "larger batch.")

    def _fits(self, each: Verified) -> bool:
        """Whether a measured network also is what the rest of the target asks for."""
        asked = [(family, share) for pattern, share in (self.target.layers or {}).items()
                 for family in self.groups.find(pattern)]
        narrow = ~self.units.removed(by_share(self.units, asked))
        return not bool((each.keep & ~narrow).any()) and all(
            share <= self.others[name] + 1e-12 for name, share in self.meter.shares(each.keep, self.others).items())

    def _best(self) -> Choice:
        fitting = [each for each in self.seen if self._fits(each)]
        good = [each for each in fitting if each.timed.share <= self.limit]
        near = [each for each in fitting if each.timed.share <= self.limit * (1 + BAND)]
        if not near:
            raise self._refusal()
        best = max(good, key=lambda each: each.timed.share) if good else min(near, key=lambda each: each.timed.share)
        self.planner.last = best.timed
        said = (f"latency: {best.timed}; at most {self.limit:g} was asked for; {len(self.seen)} networks were measured "
                f"whole, the step tables alone predicted {best.predicted:.3f}")
        return Choice(best.keep, best.costs, (*self._plain(best.notes), said, *self._why(best)))

    def _plain(self, notes: Sequence[str]) -> list[str]:
        """Without the note on the gap to the share that was aimed at, which nobody asked for."""
        return [note for note in notes if " latency=" not in note]

    def _why(self, best: Verified) -> list[str]:
        share = best.timed.share
        if share > self.limit:
            return [f"latency={self.limit:g} is missed by {share / self.limit - 1:.1%}: none of {len(self.seen)} "
                    "networks was measured at or below it; time is uneven in the widths here"]
        if share >= self.limit * (1 - BAND) or bool(best.keep.all()):
            return []
        if bound := self._bound(best.keep):
            return [f"the latency is below what was asked because {' and '.join(bound)} asks for less"]
        above = min((each for each in self.seen if each.timed.share > self.limit), default=None,
                    key=lambda each: each.timed.share)
        other = f"the next larger network that was measured has {above.timed.share:.3f}" if above else \
            "no larger one was measured"
        return [f"the latency is {1 - share / self.limit:.1%} below what was asked: it falls in jumps; {other}"]

