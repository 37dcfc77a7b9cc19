"""Nests of tensors: dataclasses and named tuples that a forward takes or returns, made known to torch's pytrees."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from prunekern.errors import ArtefactError

PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def register(value: Any) -> list[str]:
    """Make every dataclass in a nest known to torch, as ``torch.export.register_dataclass`` does; the names of those
    that were not. Other classes stay closed."""
    names = []
    for kind in _closed(value):
        if dataclasses.is_dataclass(kind):
            torch.export.register_dataclass(kind, serialized_type_name=_name(kind))
            names += [kind.__name__, *register(value)]       # it may hold others
            break
    return names


def closed(value: Any) -> list[str]:
    """The classes in a nest that torch cannot look into, by name."""
    return [kind.__name__ for kind in _closed(value)]


def _closed(value: Any) -> Iterator[type]:
    for leaf in pytree.tree_leaves(value):
        if not isinstance(leaf, PLAIN):
            yield type(leaf)


def dumps(spec: pytree.TreeSpec) -> str:
    """The structure of a nest as text. Raises ArtefactError where it holds a class without a name for torch."""
    for kind in _kinds(spec):
        if issubclass(kind, tuple) and hasattr(kind, "_fields") and kind not in pytree.SUPPORTED_SERIALIZED_TYPES:
            pytree._register_namedtuple(kind, serialized_type_name=_name(kind))
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ArtefactError(f"the network's arguments or outputs have a type without a JSON form ({error}); register "
                            "it with torch.utils._pytree and a serialized_type_name, or return dicts and tuples."
                            ) from error


def loads(text: str) -> pytree.TreeSpec:
    """The structure again. Raises ArtefactError naming a class that this process does not know yet."""
    for name in _names(json.loads(text)[1]):
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and not _recall(name):
            raise ArtefactError(f"the network's inputs or outputs hold a {name}, which this process does not know; "
                                "import the module that defines it first.")
    return pytree.treespec_loads(text)


def _kinds(spec: pytree.TreeSpec) -> Iterator[type]:
    if not spec.is_leaf():
        yield spec.type if spec.type is not namedtuple else spec.context
        for child in spec.children():
            yield from _kinds(child)


def _names(data: Any) -> Iterator[str]:
    if data["type"] is not None:
        yield data["context"] if data["type"] == "collections.namedtuple" else data["type"]
    for child in data["children_spec"]:
        yield from _names(child)


def _recall(name: str) -> bool:
    """Register a class by its name, if its module has been imported: nothing is imported for the sake of a file."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:i]))
        for part in parts[i:]:
            found = getattr(found, part, None)
        if isinstance(found, type):
            if dataclasses.is_dataclass(found):
                torch.export.register_dataclass(found, serialized_type_name=name)
            elif issubclass(found, tuple) and hasattr(found, "_fields"):
                pytree._register_namedtuple(found, serialized_type_name=name)
            return name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    return False


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
