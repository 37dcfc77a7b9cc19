"""Plans edited by hand, a channel at a time: what leaves with it follows by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunekern.core.labels import FIXED
from prunekern.core.plan import Plan
from prunekern.errors import PlanError
from prunekern.graph.groups import Groups
from prunekern.prune.slice import check_balance, choice_of, plan_of
from prunekern.prune.target import Meter

Channels = Mapping[str, Sequence[int]]


def edit_plan(groups: Groups, plan: Plan | None = None, *, remove: Channels | None = None,
              keep: Channels | None = None) -> Plan:
    """A plan in which some channels are removed and others kept, with everything that leaves with them.

    groups: of the model (``prunekern.groups_of``). plan: where to start; by default everything is kept.
    remove, keep: layer -> output channels, e.g. {"conv1": [0, 3]}; a family's own name counts too, its channels
    in the order of ``Family.groups``. Nothing is cut: that is what ``apply_plan`` and ``compress(plan=...)`` do.

    Raises PlanError: a name that is no layer with channels, a channel that is not there or must stay, one both
    removed and kept, a layer that would lose its last channel, half a row of a grouped convolution.
    """
    choice = groups.everything() if plan is None else choice_of(groups, plan)
    gone, back = _groups_of(groups, remove or {}, "remove"), _groups_of(groups, keep or {}, "keep")
    both = gone & back
    if bool(both.any()):
        raise PlanError(f"remove and keep name channels that leave together: {_example(groups, both)}; "
                        "drop them from one of the two.")
    choice = (choice & ~gone) | back
    _check(groups, choice)
    return plan_of(groups, choice, costs=Meter(groups).change(choice),
                   target={**(plan.target if plan else {}), "edited": True})


def _groups_of(groups: Groups, channels: Channels, verb: str) -> Tensor:
    chosen = torch.zeros(groups.labels.groups, dtype=torch.bool)
    for name, indices in channels.items():
        axis = _channels_of(groups, name)
        wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(axis)]
        if wrong:
            raise PlanError(f"{verb}[{name!r}] names channel {wrong[0]!r}; {name!r} has channels 0 to {len(axis) - 1}.")
        ids = axis[torch.tensor(list(indices), dtype=torch.long)]
        held = [i for i, group in zip(indices, ids.tolist(), strict=True) if group == FIXED]
        if held and verb == "remove":
            raise PlanError(f"remove[{name!r}]: channel {held[0]} must stay (it reaches an input, an output or an "
                            "operator that holds it); prunekern doctor says which.")
        chosen[ids] = True
    chosen[FIXED] = False
    return chosen


def _channels_of(groups: Groups, name: str) -> Tensor:
    """The group of every output channel of a layer, or of every channel of a family."""
    labels = groups.labels
    axes = [key for key in labels.produced if name in (key[0], key[0].rpartition(".")[0]) and key in labels.axes]
    if len(axes) == 1:
        return labels.axes[axes[0]].reshape(-1)
    if axes:
        raise PlanError(f"{name!r} has several weights with channels; name one: "
                        + ", ".join(sorted({key[0] for key in axes})) + ".")
    family = next((family for family in groups if family.name == name), None)
    if family is None:
        raise PlanError(f"{name!r} is no layer with channels; there are: "
                        + ", ".join(dict.fromkeys(layer for f in groups for layer in (f.layers or (f.name,)))) + ".")
    return family.groups


def _check(groups: Groups, choice: Tensor) -> None:
    for (name, _), index in groups.labels.axes.items():
        if index.numel() and not bool(choice[index].any()):
            raise PlanError(f"{name!r} would keep no channel; at least one must stay.")
    check_balance(groups.labels, choice)


def _example(groups: Groups, chosen: Tensor) -> str:
    return ", ".join(f"{int(chosen[f.groups].sum())} of {f.name!r}" for f in groups if bool(chosen[f.groups].any()))
