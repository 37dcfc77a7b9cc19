"""A module's tensors and layers under their names, without its forward: what a rewritten graph is made of."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from types import CellType, MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Parts(nn.Module):
    """Tensors and layers by name. It has no forward: the graph says what is done with them.

    why: what made the module it stands for come apart, for a note.
    """

    def __init__(self, why: str = "") -> None:
        super().__init__()
        self.why = why


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy or, of what cannot be copied whole (a lock or an open file in it, say), of its Parts.

    memo: as for ``copy.deepcopy``, what takes the place of what. A tensor that a forward or a hook left behind
    (old-style weight norm's ``weight``) is copied without its history, which deepcopy refuses.
    """
    for part in module.modules():
        for left in pytree.tree_leaves(list(vars(part).values())):
            if isinstance(left, Tensor) and not left.is_leaf:
                memo.setdefault(id(left), left.detach().clone())
    return _copied(module, memo)


def tensors_of(model: nn.Module) -> tuple[dict[str, str], dict[str, str], dict[str, Tensor]]:
    """(every name -> canonical name, tied name -> canonical name, canonical name -> tensor)."""
    canonical: dict[str, str] = {}
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        canonical[name] = first.setdefault(id(tensor), name)
        tensors.setdefault(canonical[name], tensor)
    return canonical, {n: c for n, c in canonical.items() if n != c}, tensors


def ghost(model: nn.Module, stand_ins: Mapping[int, Tensor] = MappingProxyType({})) -> nn.Module:
    """A copy that shares every tensor, for running a forward that leaves things behind on its modules; the model
    itself where it cannot be copied, or where a function put in place of a forward or a hook holds on to it.

    stand_ins: id of a tensor -> what the copy has in its place."""
    if any(_holds(function) for module in model.modules() for function in _functions(module)):
        return model
    tensors = [leaf for module in model.modules() for leaf in pytree.tree_leaves(list(vars(module).values()))
               if isinstance(leaf, Tensor)]
    made = copied(model, {id(tensor): stand_ins.get(id(tensor), tensor) for tensor in tensors})
    return model if isinstance(made, Parts) else made


def _functions(module: nn.Module) -> list[Any]:
    return [value for value in (vars(module).get("forward"), *module._forward_hooks.values(),
                                *module._forward_pre_hooks.values()) if value is not None]


def _holds(value: Any, depth: int = 4) -> bool:
    """Whether a function's closure leads to a module: copies of functions keep the closures they have."""
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
    return depth > 0 and any(isinstance(cell, nn.Module) or isinstance(getattr(cell, "__self__", None), nn.Module)
                             or _holds(cell, depth - 1) for cell in cells)


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    trial = dict(memo)                                     # half a copy must not stay behind
    try:
        whole = copy.deepcopy(module, trial)
    except Exception as error:
        parts = _emptied(module, f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error})")
        memo[id(module)] = parts
        parts._parameters = {name: copy.deepcopy(tensor, memo) for name, tensor in module._parameters.items()}
        parts._buffers = {name: copy.deepcopy(tensor, memo) for name, tensor in module._buffers.items()}
        parts._modules = {name: child if child is None else _copied(child, memo)
                          for name, child in module._modules.items()}
        return parts
    memo.update(trial)
    return whole


def _emptied(module: nn.Module, why: str = "") -> Parts:
    parts = Parts(why)
    parts.training = module.training
    parts._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return parts


def parts_of(module: nn.Module, without: Collection[str], more: Mapping[str, Tensor]) -> nn.Module:
    """The module's own tensors and layers (not copies) in its own nesting, ``without`` some tensors and with
    ``more``. Layers that lose and gain nothing are the module's own; those around them become ``Parts``."""
    changed = {path for name in (*without, *more) for path in _ancestors(name)}
    return _parts(module, "", changed, set(without), more, {})


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _parts(module: nn.Module | None, path: str, changed: set[str], without: set[str], more: Mapping[str, Tensor],
           made: dict[int, Parts]) -> nn.Module:
    if module is not None and path not in changed:
        return module
    if module is not None and id(module) in made:         # one module under two names stays one
        return made[id(module)]
    prefix = f"{path}." if path else ""
    parts = Parts() if module is None else _emptied(module)
    if module is not None:
        made[id(module)] = parts
        parts._parameters = {n: t for n, t in module._parameters.items() if prefix + n not in without}
        parts._buffers = {n: t for n, t in module._buffers.items() if prefix + n not in without}
    children = dict(module._modules) if module is not None else {}
    new = [name.removeprefix(prefix) for name in more if name.startswith(prefix)]
    for child in dict.fromkeys((*children, *(name.partition(".")[0] for name in new if "." in name))):
        parts._modules[child] = _parts(children.get(child), prefix + child, changed, without, more, made)
    for name in new:
        tensor = more[prefix + name]
        if isinstance(tensor, nn.Parameter) and "." not in name:
            parts.register_parameter(name, tensor)
        elif "." not in name:
            parts.register_buffer(name, tensor)
    return parts
