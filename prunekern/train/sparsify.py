"""Sparse training as a phase of its own: a copy of a network is trained until some of its channels do nothing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from prunekern.core.plan import Plan
from prunekern.errors import InputError, unknown
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.prune.oneshot import groups_of
from prunekern.prune.target import Target
from prunekern.train.batching import Data
from prunekern.train.loop import fit
from prunekern.train.sparsity import Choosing, GroupLasso, GrowingReg, SoftPruning, Sparsity

METHODS: Mapping[str, type[Sparsity]] = {"group-lasso": GroupLasso, "growing": GrowingReg, "soft": SoftPruning}
FIT = {"epochs": 5, "lr": 0.01}


def sparsify(model: nn.Module, groups: Groups, target: Target, train: Data, asked: Mapping[str, Any], *,
             choosing: Mapping[str, Any], **defaults: Any) -> tuple[nn.Module, Groups, Plan | None]:
    """A trained copy of the model, its groups and, where the method chose what is to go, the plan that cuts it.

    asked: 'method' (one of ``METHODS``), that method's own settings, and those of ``fit``. choosing: options of
    ``prune.propose``, for methods that choose. defaults: further options of ``fit``; asked wins.
    Raises UnknownName (method), InputError (settings), and what ``fit`` raises.
    """
    method, own, training = settings_of(asked)
    mine = copy.deepcopy(model)
    call = Call(groups.graph.args, groups.graph.kwargs)
    copied = groups_of(mine, call, policy=groups.labels.policy)
    sparsity: Sparsity
    if issubclass(method, Choosing):
        sparsity = method(copied, target, **{**choosing, **own})
    else:
        sparsity = method(copied, **{"ignore": choosing.get("ignore", ()), **own})
    fit(mine, train, **{**FIT, **defaults, **training, "sparsity": sparsity})
    return mine, copied, sparsity.chosen() if isinstance(sparsity, Choosing) else None


def settings_of(asked: Mapping[str, Any]) -> tuple[type[Sparsity], dict[str, Any], dict[str, Any]]:
    """(the method, its own settings, those of ``fit``). Raises UnknownName, InputError."""
    name = asked.get("method", "group-lasso")
    if name not in METHODS:
        raise unknown("method of sparse training", name, METHODS)
    own = set(inspect.signature(METHODS[name].__init__).parameters) - {"self", "groups", "target", "options", "ignore"}
    trains = {name for name, entry in inspect.signature(fit).parameters.items() if entry.kind is entry.KEYWORD_ONLY}
    wrong = sorted(asked.keys() - own - trains - {"method"})
    if wrong:
        raise InputError(f"sparse={{{wrong[0]!r}: ...}} is no option of {name!r} ({', '.join(sorted(own))}), nor of "
                         "training (prunekern.train.fit).")
    return (METHODS[name], {key: value for key, value in asked.items() if key in own},
            {key: value for key, value in asked.items() if key in trains and key not in own})


def chooses(asked: Mapping[str, Any]) -> bool:
    """Whether the method itself chooses what is to go."""
    return issubclass(settings_of(asked)[0], Choosing)
