"""Integers that remember which attributes they were computed from, and a copy of a model that holds such.

A forward that does ``x.view(b, n, self.num_heads, self.dim // self.num_heads)`` hands torch two integers; traced
ones say which attributes of which module they stand for, through any arithmetic and any helper function.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.graph.parts import copied

Leaf = tuple[str, tuple[Any, ...]]      # a number held by a module: (path of the module, the way to it from there)
DEPTH = 4                               # how far into nested lists and configuration objects numbers are looked for


@dataclass(frozen=True)
class Origin:
    """leaves: what a number was computed from; value: what it is once they have other values; leaf: the one it is."""

    leaves: frozenset[Leaf]
    value: Callable[[Mapping[Leaf, int]], int]
    leaf: Leaf | None = None

    def __sub__(self, other: Origin) -> Origin:
        return _joined(operator.sub, self, other)


def _joined(plain: Callable[[int, int], int], left: Origin, right: Origin) -> Origin:
    return Origin(left.leaves | right.leaves, lambda new: plain(left.value(new), right.value(new)))


Agreements = list[tuple[Origin, Origin]]


class Traced(int):
    """An int with an origin (None where it is unknown). ``agreed`` collects pairs that a forward found equal."""

    origin: Origin | None
    agreed: Agreements

    def __new__(cls, value: int, origin: Origin | None, agreed: Agreements) -> Traced:
        made = super().__new__(cls, value)
        made.origin, made.agreed = origin, agreed
        return made

    def __eq__(self, other: object) -> bool:
        same = int(self) == other
        if same and isinstance(other, Traced) and self.origin is not None and other.origin is not None:
            self.agreed.append((self.origin, other.origin))
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __neg__(self) -> int:
        return 0 - self

    def __deepcopy__(self, memo: Any) -> Traced:
        return self


def _arithmetic(name: str) -> None:
    plain = getattr(operator, name)

    def forwards(self: Traced, other: Any) -> Any:
        return _combined(plain, self, other, self.agreed)

    def backwards(self: Traced, other: Any) -> Any:
        return _combined(plain, other, self, self.agreed)
    setattr(Traced, f"__{name}__", forwards)
    setattr(Traced, f"__r{name}__", backwards)


def _combined(plain: Callable[[int, int], int], left: Any, right: Any, agreed: Agreements) -> Any:
    if not isinstance(left, int) or not isinstance(right, int):
        return NotImplemented
    first, second = origin_of(left), origin_of(right)
    value = plain(int(left), int(right))
    if first is None or second is None:
        return Traced(value, None, agreed)
    return Traced(value, _joined(plain, first, second), agreed)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _arithmetic(_name)


def origin_of(value: int) -> Origin | None:
    """A plain number stays what it is, whatever becomes of the attributes."""
    if isinstance(value, Traced):
        return value.origin
    return known(value)


def known(value: int) -> Origin:
    """The origin of a number whose new value is known."""
    return Origin(frozenset(), lambda new: value)


def of_leaf(leaf: Leaf, old: int) -> Origin:
    return Origin(frozenset((leaf,)), lambda new: new.get(leaf, old), leaf)


def marked(value: Any, path: str, way: tuple[Any, ...], agreed: Agreements, leaves: dict[Leaf, int]) -> Any:
    """A value with every int in it traced: itself where it holds none, else a copy down to them.

    leaves: receives every number found, with its value.
    """
    if type(value) is int:
        leaves[path, way] = value
        return Traced(value, of_leaf((path, way), value), agreed)
    if len(way) >= DEPTH:
        return value
    if isinstance(value, (list, tuple)):
        items = [marked(item, path, (*way, i), agreed, leaves) for i, item in enumerate(value)]
        return value if all(map(operator.is_, items, value)) else like(value, items)
    if type(value) is dict:
        pairs = {key: marked(item, path, (*way, key), agreed, leaves) for key, item in value.items()}
        return value if all(map(operator.is_, pairs.values(), value.values())) else pairs
    if not is_settings(value):
        return value
    found = {name: marked(item, path, (*way, name), agreed, leaves) for name, item in vars(value).items()}
    clone = None if all(found[name] is item for name, item in vars(value).items()) else shallow(value)
    if clone is None:
        return value
    vars(clone).update(found)
    return clone


def like(original: Any, items: list[Any]) -> Any:
    """Items in the kind of list or tuple that the original is."""
    kind = type(original)
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def is_settings(value: Any) -> bool:
    """Whether a value is an object that holds settings: a dataclass, a namespace, a model's configuration."""
    return (hasattr(value, "__dict__") and not callable(value) and not isinstance(value, (nn.Module, Tensor))
            and not type(value).__module__.startswith("torch."))


def shallow(value: Any) -> Any:
    """A copy of an object that shares what it holds; None where it has none (enumeration members, open files)."""
    try:
        clone = copy.copy(value)
    except Exception:        # whatever a class's own copying raises
        return None
    return None if clone is value or not hasattr(clone, "__dict__") or vars(clone) is vars(value) else clone


OWN = frozenset(vars(nn.Module()))      # what torch keeps on every module


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What a class's author put on a module; nothing for the layers of torch.nn, whose sizes the rules know."""
    if type(module).__module__.startswith("torch.nn."):
        return {}
    return {name: value for name, value in vars(module).items() if name not in OWN}


def traced_copy(model: nn.Module, agreed: Agreements) -> tuple[nn.Module, dict[Leaf, int]]:
    """A copy of a model with its numbers traced, and those numbers. Parameters are shared, never copied."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    ghost = copied(model, shared)
    leaves: dict[Leaf, int] = {}
    for path, module in ghost.named_modules():
        for name, value in attributes_of(module).items():
            vars(module)[name] = marked(value, path, (name,), agreed, leaves)
    return ghost, leaves


def plain(value: Any, seen: list[int]) -> Any:
    """An argument with ordinary ints for traced ones; ``seen`` receives the ints (traced where they are), in order."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        seen.append(value)
        return int(value)
    if isinstance(value, torch.Size):
        return torch.Size([plain(item, seen) for item in value])
    if type(value) in (list, tuple):
        return type(value)(plain(item, seen) for item in value)
    if type(value) is dict:
        return {key: plain(item, seen) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(plain(value.start, seen), plain(value.stop, seen), plain(value.step, seen))
    return value
