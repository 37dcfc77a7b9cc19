"""Writes down the operators that a forward calls on tensors without values, whole (``conv2d``, ``linear``), with the
module and the line that called each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

ASKED = frozenset((torch.ops.prim.device.default,))      # of a tensor; not part of what is computed


class Unclear(Exception):
    """This recording cannot tell what the forward does in general."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of a recording: how many came before it."""

    number: int


@dataclass(frozen=True, slots=True)
class Step:
    """One call. args, kwargs: with a Ref for every tensor. results: the Ref of every tensor that it gave, None for
    anything else; ``several`` where they came in a tuple or list. values: the tensors, without values.
    stack: the modules whose forward was running, as torch.export keeps them; line: of the user's code."""

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Ref | None, ...]
    several: bool
    values: tuple[Any, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    stack: dict[str, tuple[str, str]]
    line: str


@dataclass
class Recording:
    """given: the tensors there are before the first call. constants: those that came to light on the way, with the path
    of the module whose forward had them."""

    given: list[Tensor]
    steps: list[Step] = field(default_factory=list)
    constants: dict[Ref, tuple[str, Tensor]] = field(default_factory=dict)


class Recorder(ProxyTorchDispatchMode):
    """Records every call between entering and leaving it, above autograd and decompositions, where torch.export does
    (only modes of this base class are let in there).

    given: the fake tensors of state and inputs; fixed: how many of them, from the first, must not be written to;
    limit: calls after which it gives up. Raises Unclear where a recording would say too little.
    """

    def __init__(self, given: list[Tensor], fixed: int, limit: int) -> None:
        super().__init__(None, "fake", pre_dispatch=True)  # type: ignore[arg-type]
        self.recording, self.limit = Recording(given), limit
        self.modules: dict[int, tuple[str, str]] = {}
        self.stack: dict[str, tuple[str, str]] = {}
        self._calls: dict[str, int] = {}
        self._refs = {id(tensor): Ref(number) for number, tensor in enumerate(given)}
        self._count, self._kept = len(given), list[Any](given)     # kept, so that no id is used twice
        self._same: dict[Ref, list[int]] = {}                      # other objects that are the same memory
        self._fixed = {storage(tensor) for tensor in given[:fixed]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ASKED:
            return func(*args, **kwargs)
        if not isinstance(func, OpOverload):
            raise Unclear(f"{func} runs a graph of its own")
        if len(self.recording.steps) >= self.limit:
            raise Unclear("more calls than at another batch")
        if torch._C._is_any_autocast_enabled():
            raise Unclear("autocasting")
        noted = self.refs(args), {key: self.refs(value) for key, value in kwargs.items()}
        mutable = func._schema.is_mutable
        before = self._writable(*args[:1]) if mutable else None
        result = func(*args, **kwargs)
        if mutable and before != (args[0].shape, args[0].stride()):
            raise Unclear(f"{func} changes the shape of its argument in place")
        several = isinstance(result, (tuple, list))
        values = tuple(result) if several else (result,)
        if any(isinstance(value, Tensor) for value in values):
            self._note(func, *noted, values, several)
        elif several or mutable:
            raise Unclear(f"{func} gives no tensor")
        return result

    def _note(self, func: OpOverload, args: Any, kwargs: Any, values: tuple[Any, ...], several: bool) -> None:
        old = self._refs.get(id(values[0]))
        results = tuple(self._new(value) if isinstance(value, Tensor) else None for value in values)
        if old in self._same and results[0] is not None:       # written in place: so are they
            self._same[results[0]] = self._same.pop(old)
            self._refs.update(dict.fromkeys(self._same[results[0]], results[0]))
        shapes = tuple(tuple(value.shape) if isinstance(value, Tensor) else None for value in values)
        self.recording.steps.append(Step(func, args, kwargs, results, several, values, shapes, dict(self.stack),
                                         user_line()))

    def _writable(self, written: Any = None) -> Any:
        if not isinstance(written, FakeTensor) or storage(written) in self._fixed:
            raise Unclear("state is written to, or what is written to is not the first argument")
        return written.shape, written.stride()

    def _new(self, value: Any) -> Ref:
        if not isinstance(value, FakeTensor):
            raise Unclear("a tensor with values is made of tensors without")
        return self._track(value)

    def _track(self, tensor: Tensor) -> Ref:
        ref = Ref(self._count)
        self._count += 1
        self._refs[id(tensor)] = ref
        self._kept.append(tensor)
        return ref

    def _aliased(self, tensor: FakeTensor) -> Ref:
        """The recorded tensor that is the same memory, seen the same way: ``x.data`` is x, and what a factory like
        ``torch.zeros`` returns is another object than the call below it made."""
        same = _view(tensor)
        for other in reversed(self._kept):
            if isinstance(other, FakeTensor) and storage(other) == same[0] and _view(other) == same:
                return self._refs[id(other)]
        raise Unclear("a tensor that no recorded call made")

    def refs(self, value: Any) -> Any:
        """A Ref for every tensor in an argument or in the outputs. A tensor that has values is a constant."""
        if isinstance(value, Tensor):
            ref = self._refs.get(id(value))
            if ref is None and isinstance(value, FakeTensor):
                ref = self._refs[id(value)] = self._aliased(value)
                self._same.setdefault(ref, []).append(id(value))
                self._kept.append(value)
            elif ref is None:
                if type(value) not in (Tensor, nn.Parameter):
                    raise Unclear(f"a {type(value).__name__}")
                ref = self._track(value)
                self.recording.constants[ref] = [("", ""), *self.stack.values()][-1][0], value
            return ref
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.refs, value)) if type(value) in (list, tuple) else list(map(self.refs, value))
        return value

    def run(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the forward returns; its calls are recorded."""
        with self._following(model), enable_python_dispatcher(), self:
            return model(*args, **kwargs)

    @contextlib.contextmanager
    def _following(self, model: nn.Module) -> Iterator[None]:
        """While it holds, calls are ascribed to the modules of ``model`` whose forward is running."""
        self.modules = {id(module): (path, f"{type(module).__module__}.{type(module).__qualname__}")
                        for path, module in reversed(list(model.named_modules()))}
        usual: Callable[..., Any] = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            known = self.modules.get(id(module))
            if known is None:
                return usual(module, *args, **kwargs)
            key = f"{known[0]}@{self._calls.setdefault(known[0], 0)}"        # tells one call of a module from the next
            self._calls[known[0]] += 1
            self.stack[key] = known
            try:
                return usual(module, *args, **kwargs)
            finally:
                del self.stack[key]
        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = usual  # type: ignore[method-assign]


def storage(tensor: Tensor) -> int:
    """What tells whether two tensors share memory."""
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return (storage(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.is_conj(),
            tensor.is_neg())


def user_line() -> str:
    """The innermost line outside torch of a function called 'forward', in the form of a traceback, as torch.export
    writes it down; '' where none is running."""
    frame = sys._getframe(3)
    while frame.f_code is not Recorder.run.__code__:            # which called the forward
        if frame.f_code.co_name == "forward" and "/torch/" not in frame.f_code.co_filename:
            return f'File "{frame.f_code.co_filename}", line {frame.f_lineno}, in forward'
        frame = frame.f_back  # type: ignore[assignment]
    return ""
