"""What a command works on: a model from a factory or a saved result, its example inputs, a dataset."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.cli.console import Out
from prunekern.errors import DataError, InputError, ModelError
from prunekern.result import MANIFEST, Result, load

HOW = "pass package.module:factory (a function that returns the model) or a folder that Result.save wrote"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, and example inputs where something said what they are. result: what was saved."""

    model: nn.Module
    example: Any
    result: Result | None = None


def load_target(text: str, inputs: Sequence[str], out: Out, *, seed: int = 0, threads: int | None = None) -> Loaded:
    """The model that TARGET names. ``inputs`` (see ``parse_inputs``) go before what the target itself brings.

    Raises ModelError (no such thing; the user's own error is in the text), ArtefactError, InputError.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    example = parse_inputs(inputs)
    folder = Path(text)
    if folder.is_dir():
        saved = load(folder)
        return Loaded(saved.model, saved.example if example is None else example, saved)
    if ":" not in text:
        found = f"{folder.parent} holds no {MANIFEST}" if folder.is_file() else "there is no such folder"
        raise ModelError(f"TARGET {text!r}: {found}; {HOW}.")
    made = _call(text, seed)
    own = None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made, own = made
    if not isinstance(made, nn.Module):
        raise ModelError(f"{text} returned a {type(made).__name__}; it must return a torch.nn.Module, or "
                         "(model, example_inputs).")
    if made.training:
        made.eval()
        out.remark(f"{text}: the model came in training mode; eval() was called")
    return Loaded(made, own if example is None else example)


def _call(text: str, seed: int) -> Any:
    module, _, name = text.rpartition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    factory: Any = _guarded(f"importing {module!r} failed", lambda: importlib.import_module(module))
    for part in name.split("."):
        if not hasattr(factory, part):
            near = [n for n, value in vars(factory).items() if callable(value) and not n.startswith("_")]
            raise ModelError(f"{module!r} has no {name!r}" + (f"; it has {', '.join(near[:12])}" if near else "")
                             + f". {HOW[0].upper()}{HOW[1:]}.")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ModelError(f"{text} is a {type(factory).__name__}, not a function; {HOW}.")
    torch.manual_seed(seed)             # whatever importing has drawn
    return _guarded(f"{text}() failed", factory)


def _guarded(what: str, act: Callable[[], Any]) -> Any:
    """The user's own code: its error is told with the line it came from."""
    try:
        return act()
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith("<")]
        own = [f for f in frames if os.sep + "importlib" + os.sep not in f.filename and f.filename != __file__]
        line = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        raise ModelError(f"{what}: {type(error).__name__}: {error}{line}. Run prunekern in the folder that holds the "
                         "module, or install it; --traceback shows the whole way there.") from error


SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def parse_inputs(specs: Sequence[str]) -> Any:
    """'1x3x224x224', '1x16:int64', 'mask=1x16:bool' -> one batch of example inputs; None where there are none.

    Floats are normal noise, integers 0 or 1, booleans true. Raises InputError for what is not understood.
    """
    found: list[tuple[str | None, Tensor]] = []
    for spec in specs:
        match = SHAPE.fullmatch(spec)
        dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
        if match is None or not isinstance(dtype, torch.dtype):
            raise InputError(f"--input {spec!r} is not understood; write a shape and, after a colon, a dtype of torch: "
                             "1x3x224x224, 1x16:int64, or with the argument's name mask=1x16:bool.")
        found.append((match["name"], _drawn(tuple(map(int, match["shape"].split("x"))), dtype)))
    if not found:
        return None
    names = [name for name, _ in found if name]
    if names and len(set(names)) != len(found):
        raise InputError("--input: give every input a different name, or none of them one.")
    return {str(name): tensor for name, tensor in found} if names else tuple(tensor for _, tensor in found)


def _drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.randint(0, 2, shape).to(dtype)


def need_example(loaded: Loaded) -> Any:
    """Its example inputs, inferred from an unambiguous first layer where nothing else says. Raises InputError."""
    if loaded.example is not None:
        return loaded.example
    from prunekern.graph.inputs import infer
    try:
        return infer(loaded.model)
    except InputError as error:
        raise InputError(f"{error} On the command line: --input 1x3x224x224.") from error


@dataclass(frozen=True)
class Sets:
    """(images, labels), normalised. validate: a stratified tenth of the training images."""

    train: tuple[Tensor, Tensor]
    validate: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    source: str


def load_sets(name: str | None, out: Out, seed: int = 0, limit: int | None = None) -> Sets | None:
    """A dataset by name, split; None where no name is given. limit: so many images of each part at most."""
    if name is None:
        return None
    from prunekern import data
    if limit is not None and limit < 1:
        raise DataError(f"--samples {limit}: pass at least 1.")
    found = data.load(name, progress=out.live)
    train, validate = found.split(seed=seed)
    out.remark(f"{found.name}: {len(train[1])} training, {len(validate[1])} validation and {len(found.test[1])} test "
               f"images from {found.source}")
    parts = [(images[:limit], labels[:limit]) for images, labels in (train, validate, found.test)]
    return Sets(parts[0], parts[1], parts[2], found.source)
