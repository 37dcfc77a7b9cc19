"""The user's class keeps working: sizes that its forward reads from attributes follow what was cut.

The dense model is run once more with its integers traced. Every call that takes sizes is compared with its place in
the graph, where labels say what each size becomes; so each attribute behind a size gets its new value, whatever it
is called and however the forward computes with it. What no attribute holds is hard-coded, and is named.
"""

from __future__ import annotations

import linecache
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from prunekern.core.graph import Dim, Graph, at, owner, source
from prunekern.core.rule import Registry
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.graph.parts import Parts
from prunekern.prune.counting import count
from prunekern.prune.rewrite import NewSizes
from prunekern.prune.slice import slice_module
from prunekern.prune.slim import slim
from prunekern.prune.traced import (
    Agreements,
    Leaf,
    Origin,
    Traced,
    is_settings,
    known,
    like,
    origin_of,
    plain,
    shallow,
    traced_copy,
)

Equation = tuple[Origin, int]           # what a number is computed from, what it must become
Place = tuple[str, str]                 # (path of the module whose forward makes a call, file:line in the forward)
MANY = 4                                # of the sizes of one line that are quoted
MOST = 1 << 16                          # the largest attribute that is solved for by trying


@dataclass(frozen=True)
class Sized:
    """One operator of the graph: its integer arguments and the sizes of its result(s), before and after slicing."""

    given: tuple[int, ...]
    wanted: tuple[int, ...]
    shape: Any
    new_shape: Any

    def becomes(self) -> Iterator[tuple[int, int]]:
        """Every number of the call with the one that takes its place."""
        if len(self.given) == len(self.wanted):
            yield from zip(self.given, self.wanted, strict=True)
        yield from zip(_flat(self.shape), _flat(self.new_shape), strict=True)


@dataclass(frozen=True)
class Demand:
    """A number at a call, in the forward of the module at ``path``, that must become another (or stay)."""

    path: str
    line: str
    origin: Origin | None
    old: int
    new: int


@dataclass
class Observation:
    """What one run of the dense model showed."""

    leaves: dict[Leaf, int] = field(default_factory=dict)
    demands: list[Demand] = field(default_factory=list)
    agreed: Agreements = field(default_factory=list)


def slice_class(model: nn.Module, groups: Groups, keep: Tensor, registry: Registry) -> nn.Module:
    """``slice_module``, with every attribute that the forward takes sizes from set to what it needs, and attention
    modules that torch's own class cannot express switched to one that can, and norms that lost channels to ones that
    count them.

    Settings that modules share are changed in place where all agree, else copied for the module that differs.
    """
    sliced: nn.Module = slice_module(model, groups, keep, registry)
    if not isinstance(sliced, Parts):
        slim(sliced, groups.labels, keep)
        seen = observe(model, groups, keep, registry)
        if seen is not None:
            apply(sliced, solve(seen), seen.leaves)
        count(sliced, groups.labels, keep, registry)
    return sliced


def hard_coded(model: nn.Module, groups: Groups, keep: Tensor, registry: Registry) -> list[str]:
    """The sizes in the model's own forwards that no attribute can set, one line of source each:
    ``Block (net.py:41 `x.view(-1, 512)`: 512 -> 256)``, what the forward would give and what it should."""
    model = model if groups.graph.module is None else groups.graph.module
    seen = None if isinstance(model, Parts) else observe(model, groups, keep, registry)
    if seen is None:
        return []
    new = solve(seen)
    lines: dict[str, dict[str, None]] = {}
    for demand in seen.demands:
        if demand.origin is not None and (now := demand.origin.value(new)) != demand.new:
            file, _, line = demand.line.rpartition(":")
            text = " ".join(linecache.getline(file, int(line or 0)).split())
            kind = type(model.get_submodule(demand.path)).__qualname__
            lines.setdefault(f"{kind} ({demand.line} `{text}`", {})[f"{now} -> {demand.new}"] = None
    return [f"{line}: {', '.join(list(changes)[:MANY])}{', ...' if len(changes) > MANY else ''})"
            for line, changes in lines.items()]


# ---- what the graph wants ------------------------------------------------------------------------------------------

class Wanted:
    """The sizes at every place of a graph. ``needed``: whether any call changes what no rule sets by itself."""

    def __init__(self, model: nn.Module, groups: Groups, keep: Tensor, registry: Registry) -> None:
        self.labels, self.keep, self.registry, self.model = groups.labels, keep, registry, model
        self.sizes = NewSizes(groups.labels, keep)
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.calls = [node for node in groups.graph.nodes if node.op == "call_function"]
        self.needed = any(given != wanted for given, wanted in map(self._numbers, self.calls))

    def tables(self) -> tuple[dict[Place, list[Sized]], dict[tuple[Place, Any], Any]]:
        """(the operators at each place, (place, shape of a result) -> its shape after slicing, None where in doubt)."""
        sized: dict[Place, list[Sized]] = defaultdict(list)
        shapes: dict[tuple[Place, Any], Any] = {}
        batch = self.labels.graph.batch
        for node in self.calls:
            old, new = at(self.labels.graph.dims[node.name], batch), at(self.labels.dims(node, self.keep), batch)
            place = self._path(node), source(node)
            sized[place].append(Sized(*self._numbers(node), old, new))
            key = place, _hashable(old)
            shapes[key] = new if shapes.get(key, new) == new else None
        return sized, shapes

    def _path(self, node: fx.Node) -> str:
        path = owner(node)[0]
        module = self._module(path)
        return path if module is None else self.paths[id(module)]

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def _numbers(self, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The integers that a call is given, and those it needs; none where its module's attributes follow a rule."""
        graph, rule = self.labels.graph, self.registry.find(node.target)
        given = tuple(_numbers(graph, (node.args, node.kwargs)))
        call = rule.rewrite(node, self.sizes) if rule is not None else None
        if rule is None or call is None:
            return given, given
        by_rule, module = rule.attributes(node, graph.shape), self._module(owner(node)[0])
        if by_rule and all(getattr(module, name, None) == value for name, value in by_rule.items()):
            return (), ()
        return given, tuple(_numbers(graph, call[1:]))


def _numbers(graph: Graph, value: Any) -> Iterator[int]:
    """The integers among a call's arguments, in order; sizes computed in the graph as they are at its batch."""
    if isinstance(value, fx.Node):
        size = graph.dims.get(value.name)
        value = size.at(graph.batch) if isinstance(size, Dim) else None
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(graph, item)
    elif isinstance(value, dict):
        yield from _numbers(graph, tuple(value.values()))


def _flat(shape: Any) -> Iterator[int]:
    if isinstance(shape, (list, tuple)):
        for item in shape:
            yield from _flat(item)
    elif isinstance(shape, int):
        yield shape


def _hashable(shape: Any) -> Any:
    return tuple(map(_hashable, shape)) if isinstance(shape, (list, tuple)) else shape


# ---- what the forward does -----------------------------------------------------------------------------------------

def observe(model: nn.Module, groups: Groups, keep: Tensor, registry: Registry) -> Observation | None:
    """Run the dense model once with its numbers traced; None where no call of its own changes its sizes."""
    model = model if groups.graph.module is None else groups.graph.module
    wanted = Wanted(model, groups, keep, registry)
    if not wanted.needed:
        return None
    graph, seen = groups.graph, Observation()
    ghost, leaves = traced_copy(model, seen.agreed)
    seen.leaves.update(leaves)
    call = Call(graph.args, graph.kwargs)
    call = (call.resized(graph.batch) if graph.free_batch else call).map(lambda t: t.clone())
    watch = _Watch(seen, *wanted.tables())
    for _, tensor in call.named_tensors():
        watch.shapes_of[tensor] = tuple(tensor.shape)
    for node in graph.nodes:
        name = graph.fqn(node)
        if name is not None:
            watch.shapes_of[graph.tensors[name]] = at(groups.labels.dims(node, keep), graph.batch)
    for path, module in ghost.named_modules():
        watch.follow(path, module)
    try:
        with torch.no_grad(), watch:
            ghost(*call.args, **dict(call.kwargs))
    except Exception:        # a forward that insists on plain ints: what was seen until then counts
        pass
    return seen


SHAPE = torch.Tensor.shape.__get__      # type: ignore[attr-defined]


class _Watch(TorchFunctionMode):
    """Sees every torch function that a forward calls, with the integers it passes."""

    def __init__(self, seen: Observation, sized: Mapping[Place, list[Sized]],
                 shapes: Mapping[tuple[Place, Any], Any]) -> None:
        super().__init__()
        self.seen, self.sized, self.shapes = seen, sized, shapes
        self.stack: list[str] = []
        self.shapes_of: Any = WeakIdKeyDictionary()       # tensor -> its shape after slicing

    def follow(self, path: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self.stack.append(path), prepend=True)
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        self.stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers: list[int] = []
        args, kwargs = plain(args, numbers), plain(kwargs or {}, numbers)
        if func == SHAPE or func is torch.Tensor.size:
            size = self._size(args[0])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return size if func == SHAPE or dim is None else size[dim]
        result = func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else [
            out for out in result if isinstance(out, Tensor)] if isinstance(result, (list, tuple)) else []
        if outputs and self.stack:
            line, inner = _here()
            place = self.stack[-1], line
            shape = tuple(result.shape) if isinstance(result, Tensor) else tuple(tuple(out.shape) for out in outputs)
            self._demand(place, inner, numbers, shape)
            self._remember(place, outputs, shape)
        return result

    def _size(self, tensor: Tensor) -> torch.Size:
        """A shape whose numbers say what they become."""
        new = self.shapes_of.get(tensor) or (None,) * tensor.dim()
        return torch.Size([Traced(old, None if fresh is None else known(fresh), self.seen.agreed)
                           for old, fresh in zip(tensor.shape, new, strict=True)])

    def _remember(self, place: Place, outputs: list[Tensor], shape: Any) -> None:
        pieces = self.shapes.get((place, shape)) if isinstance(shape[0] if shape else 0, tuple) else None
        for i, out in enumerate(outputs):
            new = self.shapes.get((place, tuple(out.shape))) if pieces is None else pieces[i]
            if new is not None:
                self.shapes_of[out] = tuple(new)

    def _demand(self, place: Place, line: str, numbers: list[int], shape: Any) -> None:
        candidates = self.sized.get(place, [])
        same = [item for item in candidates if item.given == tuple(numbers)]
        exact = [item for item in same if len(item.wanted) == len(numbers)]
        near = [item for item in candidates if _hashable(item.shape) == shape] or candidates
        for i, number in enumerate(numbers):
            choices = {item.wanted[i] for item in exact} or {
                new for item in near for old, new in item.becomes() if old == number}
            if len(choices) == 1 and (same or isinstance(number, Traced)):
                self.seen.demands.append(Demand(place[0], line, origin_of(number), int(number), choices.pop()))
        for item in same if not exact else ():             # pieces that were even and are no more
            pairs = set(item.becomes())
            self.seen.demands += [Demand(place[0], line, known(old), old, new) for old, new in sorted(pairs)
                                  if sum(other == old for other, _ in pairs) > 1]


def _here() -> tuple[str, str]:
    """The innermost line outside torch of a function called 'forward', which is what a trace records, and of any
    function: ``file:line`` each."""
    inner, frame = "", sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if "/torch/" not in code.co_filename:
            inner = inner or f"{code.co_filename}:{frame.f_lineno}"
            if code.co_name == "forward":
                return f"{code.co_filename}:{frame.f_lineno}", inner
        frame = frame.f_back  # type: ignore[assignment]
    return "", inner


# ---- what the attributes become ------------------------------------------------------------------------------------

def solve(seen: Observation) -> dict[Leaf, int]:
    """The new value of every number that some size is made of, where all that is known leaves one.

    First what is a size itself, then what makes up sizes together with others, then what the forward compared.
    """
    direct: dict[Leaf, set[int]] = defaultdict(set)
    equations: list[Equation] = []
    for demand in seen.demands:
        if demand.origin is not None and demand.origin.leaf is not None:
            direct[demand.origin.leaf].add(demand.new)
        elif demand.origin is not None and demand.origin.leaves:
            equations.append((demand.origin, demand.new))
    found = {leaf: next(iter(choices)) for leaf, choices in direct.items() if len(choices) == 1}
    torn = {leaf for leaf, choices in direct.items() if len(choices) > 1}
    _propagate(seen.leaves, found, torn, equations)
    _guess(seen.leaves, found, torn, equations)
    _propagate(seen.leaves, found, torn, [(left - right, 0) for left, right in seen.agreed])
    return found


def _propagate(old: Mapping[Leaf, int], found: dict[Leaf, int], torn: set[Leaf], equations: list[Equation]) -> None:
    """Solve equations with one number left to find, until none has."""
    while True:
        left: dict[Leaf, list[Equation]] = defaultdict(list)
        for origin, wanted in equations:
            missing = [leaf for leaf in origin.leaves if leaf not in found]
            if len(missing) == 1 and missing[0] not in torn:
                left[missing[0]].append((origin, wanted))
        if not left:
            return
        for leaf, mine in left.items():
            value = _value(leaf, old[leaf], found, mine)
            if value is None:
                torn.add(leaf)
            else:
                found[leaf] = value


def _guess(old: Mapping[Leaf, int], found: dict[Leaf, int], torn: set[Leaf], equations: list[Equation]) -> None:
    """Equations with several numbers left to find: one of them changes, the largest that can; the proof decides."""
    for origin, wanted in equations:
        missing = sorted((leaf for leaf in origin.leaves if leaf not in found), key=lambda leaf: -old[leaf])
        if torn & origin.leaves or len(missing) < 2 or origin.value(found) == wanted:
            continue
        for leaf in missing:
            mine = [pair for pair in equations if leaf in pair[0].leaves]
            value = _value(leaf, old[leaf], found, mine)
            if value is not None:
                found[leaf] = value
                break


def _value(leaf: Leaf, old: int, found: Mapping[Leaf, int], equations: list[Equation]) -> int | None:
    """What a number must be for all equations: what it was where that will do, else the smallest that does."""
    value: int
    for value in (old, *range(1, min(old, MOST))):
        try:
            if all(origin.value({**found, leaf: value}) == wanted for origin, wanted in equations):
                return value
        except ZeroDivisionError:
            continue
    return None


def apply(sliced: nn.Module, new: Mapping[Leaf, int], old: Mapping[Leaf, int]) -> None:
    """Write new values into the modules of a sliced copy."""
    modules = dict(sliced.named_modules())
    shared: dict[int, dict[tuple[Any, ...], set[int]]] = defaultdict(lambda: defaultdict(set))
    for (path, way), value in new.items():
        holder = vars(modules[path]).get(way[0])
        if is_settings(holder):
            shared[id(holder)][way[1:]].add(value)
    for (path, way), value in new.items():
        own: dict[str, Any] = modules[path].__dict__
        if value == old[path, way] or way[0] not in own or _get(own[way[0]], way[1:]) != old[path, way]:
            continue
        in_place = len(shared.get(id(own[way[0]]), {}).get(way[1:], ())) == 1
        own[way[0]] = _with(own[way[0]], way[1:], value, in_place)


def _get(value: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        value = vars(value).get(key) if is_settings(value) else value[key]
    return value


def _with(value: Any, way: tuple[Any, ...], new: int, in_place: bool) -> Any:
    """A value with one number in it replaced; objects are changed themselves where ``in_place``, else copied."""
    if not way:
        return new
    key, rest = way[0], way[1:]
    if isinstance(value, dict):
        return {**value, key: _with(value[key], rest, new, in_place)}
    if isinstance(value, (list, tuple)):
        items = list(value)
        items[key] = _with(items[key], rest, new, in_place)
        return like(value, items)
    target: Any = value if in_place else shallow(value)
    vars(target)[key] = _with(vars(value)[key], rest, new, in_place)
    return target
