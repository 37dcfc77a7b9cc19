"""A pruned network made again from the dense one, its plan and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from prunekern.core.plan import Plan
from prunekern.errors import ArtefactError, PlanError
from prunekern.graph.groups import Groups
from prunekern.ops import REGISTRY
from prunekern.prune.attributes import slice_class
from prunekern.prune.rewrite import rewrite
from prunekern.prune.slice import choice_of

Form = Literal["class", "graph"]


def rebuild(model: nn.Module, groups: Groups, plan: Plan, form: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """Shrink a copy of ``model`` as ``plan`` says and fill it with ``weights`` (names of its state dict).

    form: 'class' (the user's own) or 'graph' (rewritten). Raises PlanError where the plan does not belong to
    the model, ArtefactError where the weights do not fit what it leaves.
    """
    module = shrink(model, groups, plan, form)
    fill(module, weights)
    return module


def shrink(model: nn.Module, groups: Groups, plan: Plan, form: str) -> nn.Module:
    """A copy of ``model`` cut down to what ``plan`` keeps of its own weights, in a form that was proven before.

    Raises PlanError where the plan does not belong to the model.
    """
    keep = choice_of(groups, plan)
    module: nn.Module = slice_class(model, groups, keep, REGISTRY)
    return rewrite(groups.labels, keep, module, REGISTRY) if form == "graph" else module


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module. Raises ArtefactError where names or shapes differ."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    if missing or extra or wrong:
        kinds = (("missing", missing), ("unknown", extra), ("of another shape", wrong))
        raise ArtefactError("the saved weights do not fit the model: "
                            + "; ".join(f"{what} {names[:5]}" for what, names in kinds if names)
                            + ". Load them with the model class and version they were saved from.")
    with torch.no_grad():
        module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in weights.items()})


def check_structure(module: nn.Module, groups: Groups, plan: Plan) -> None:
    """Later changes keep the proven structure: every tensor has the size the plan gives it.

    Raises PlanError naming the first that does not.
    """
    keep, labels = choice_of(groups, plan), groups.labels
    state = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    nodes = {labels.graph.state[node.name]: node for node in labels.graph.nodes if node.name in labels.graph.state}
    for name, tensor in state.items():
        node = nodes.get(labels.graph.tied.get(name, name))
        if node is not None:
            wanted = tuple(dim.offset for dim in labels.dims(node, keep))
            if tuple(tensor.shape) != wanted:
                raise PlanError(f"{name!r} has shape {tuple(tensor.shape)}, the plan predicts {wanted}.")
