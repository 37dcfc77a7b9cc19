"""A forward that cannot be captured: which line stops it, and which of its submodules can be compressed instead."""

from __future__ import annotations

import linecache
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from prunekern.core import structure
from prunekern.errors import TraceError
from prunekern.graph.inputs import Call

SECONDS = 5.0         # spent on looking for submodules that can be captured
SHOWN = 3
OWN = str(Path(__file__).parents[1])


def refusal(model: nn.Module, call: Call, errors: list[Exception],
            works: Callable[[nn.Module, Call], bool]) -> TraceError:
    """The TraceError to raise. errors: what each way of capturing raised; works: whether one can be."""
    line = next((found for error in errors for found in [blamed(error)] if found), "")
    text = str(errors[0]).strip()
    first = text.splitlines()[0] if text else ""
    parts = list(_capturable(model, call, works))
    named = "; ".join(f"'{path}' (inputs {inputs})" for path, inputs in parts)
    recipe = f", here {named}" if parts else ", e.g."
    path = parts[0][0] if parts else "backbone"
    return TraceError(
        f"{type(model).__name__} cannot be captured as one graph{': ' + line if line else ''} "
        f"({type(errors[0]).__name__}: {first}). Its forward depends on the data; make that part a function of "
        f"shapes only, or compress the submodules that do not{recipe}: "
        f"prunekern.compress({_spelled(path)}, its_inputs), then put the result's model in their place.", line, parts)


def blamed(error: Exception) -> str:
    """``file.py:12 `the line` `` of the user's own code that an error is about; '' where it is unknown."""
    found = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    found += [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
    for file, line in reversed([f for f in found if not _library(f[0])]):
        return f"{file}:{line} `{linecache.getline(file, int(line)).strip()}`"
    return ""


def _library(file: str) -> bool:
    return "/torch/" in file or file.startswith((OWN, "<"))


def _spelled(path: str) -> str:
    plain = all(part.isidentifier() for part in path.split("."))
    return f"model.{path}" if plain else f"model.get_submodule({path!r})"


def _capturable(model: nn.Module, call: Call, works: Callable[[nn.Module, Call], bool]) -> Iterator[tuple[str, Call]]:
    """The largest submodules that can be captured on what they are given, in at most a few seconds."""
    calls = _inner_calls(model, call)
    sizes = {path: sum(p.numel() for p in model.get_submodule(path).parameters()) for path in calls}
    end, found = time.perf_counter() + SECONDS, list[str]()
    for path in sorted((path for path in calls if sizes[path]), key=lambda path: -sizes[path]):
        if time.perf_counter() > end or len(found) == SHOWN:
            return
        if not any(path.startswith(f"{other}.") for other in found) and works(model.get_submodule(path), calls[path]):
            found.append(path)
            yield path, calls[path]


def _inner_calls(model: nn.Module, call: Call) -> dict[str, Call]:
    """What every submodule with layers of its own is first called with."""
    calls: dict[str, Call] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            given = Call(args, kwargs).map(lambda t: t.detach().clone())
            if not structure.closed((args, kwargs)) and given.named_tensors():
                calls.setdefault(path, given)
        return hook
    handles = [module.register_forward_pre_hook(note(path), with_kwargs=True)
               for path, module in model.named_modules() if path and list(module.children())]
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    given = call.map(lambda t: t.clone())
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, given.args, dict(given.kwargs), tie_weights=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls
