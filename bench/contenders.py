"""Every way to run a network that is compared: the same weights, inputs, precision (fp32) and number of threads.

Each contender is given its best settings, and one call takes an input where that contender wants it and leaves a
finished output. Inputs are converted and bound before the clock starts, for everybody alike.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import importlib.util
import io
import logging
import signal
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from prunekern.backends import BACKENDS, lower
from prunekern.backends.base import Backend
from prunekern.lower.tolerance import error, limit

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders of a run. compile_limit: seconds that one torch.compile may take."""

    device: torch.device
    threads: int
    compile_limit: float = 120.0


@dataclass(frozen=True)
class Runner:
    """A network made ready. ``bind`` prepares an input and gives the call to time; ``read`` makes a tensor of what
    that call returns."""

    bind: Callable[[Tensor], Call]
    read: Callable[[Any], Tensor] = lambda value: value


@dataclass(frozen=True)
class Contender:
    """A way to run a network. ``unavailable`` gives the reason why it cannot take part, or None."""

    name: str
    make: Callable[[nn.Module, Tensor, Setting], Runner]
    unavailable: Callable[[Setting], str | None] = lambda setting: None


@dataclass(frozen=True)
class Checked:
    """A contender held to eager's fp64 result on two inputs; errors are ``max|y - y64| / max|y64|``."""

    error: float
    torch_error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def verify(runner: Runner, model: nn.Module, inputs: tuple[Tensor, ...]) -> Checked:
    """The worst of the inputs, by ``prunekern.lower.tolerance``: twice eager's own error plus its floor."""
    exact = copy.deepcopy(model).double()
    found = []
    for x in inputs:
        with torch.inference_mode():
            ours, own, y64 = runner.read(runner.bind(x)()).clone(), model(x), exact(x.double())
        torch_error = error(own, y64)
        found.append(Checked(error(ours, y64), torch_error, limit(torch_error, own.dtype)))
    return max(found, key=lambda checked: checked.error / checked.limit)


# ---- torch -----------------------------------------------------------------------------------------------------


def _eager(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
    return Runner(lambda x: lambda: model(x))


def _channels_last(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return Runner(lambda x: (lambda y: lambda: model(y))(x.contiguous(memory_format=torch.channels_last)))


def _compiled(mode: str | None = None, **config: Any) -> Callable[[nn.Module, Tensor, Setting], Runner]:
    def make(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
        def call(x: Tensor) -> Any:
            return model(x)
        call.__code__ = call.__code__.replace()         # of its own: no other network's guards are tried before
        compiled = torch.compile(call, dynamic=False, mode=mode)
        try:
            # Set globally, since the tracer has to see it too: as `options` of torch.compile, freezing does nothing.
            with inductor.patch(**config), time_limit(setting.compile_limit), torch.inference_mode(), quiet():
                for _ in range(3):                      # CUDA-graph modes record on the second call
                    compiled(x)
        except OutOfTime:
            raise TimeoutError(f"compilation took more than {setting.compile_limit:.0f} s") from None
        return Runner(lambda x: lambda: compiled(x))
    return make


def _cuda_graph(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
    """Eager's kernels recorded once and replayed; a call copies its input in, as torch.compile's graphs do."""
    static, stream = x.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        output = model(static)

    def bind(x: Tensor) -> Call:
        def call() -> Tensor:
            static.copy_(x)
            graph.replay()
            return output
        return call
    return Runner(bind)


def _lowered(backend: Backend) -> Contender:
    def make(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
        lowered = lower(model, x, backend=backend.name)
        return Runner(lambda x: lambda: lowered(x))

    def unavailable(setting: Setting) -> str | None:
        if setting.device.type not in backend.devices:
            return f"it does not run on {setting.device.type}"
        return backend.unavailable()
    return Contender(f"lowered, {backend.name}", make, unavailable)


# ---- others ----------------------------------------------------------------------------------------------------


def _needs(*modules: str) -> Callable[[Setting], str | None]:
    def unavailable(setting: Setting) -> str | None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None
    return unavailable


def to_onnx(model: nn.Module, x: Tensor) -> bytes:
    """The network in ONNX with the shapes of ``x`` fixed, which is what the runtimes optimise best."""
    with quiet():
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def _onnxruntime(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(to_onnx(model, x), options, providers=["CPUExecutionProvider"])
    source, target = session.get_inputs()[0].name, session.get_outputs()[0].name

    def bind(x: Tensor) -> Call:
        binding = session.io_binding()                 # measured faster than session.run with arrays
        given = x.contiguous().numpy()
        binding.bind_cpu_input(source, given)
        result = torch.empty_like(model(x))
        binding.bind_output(target, "cpu", 0, "float32", tuple(result.shape), result.data_ptr())

        def call(held: Any = given) -> Tensor:        # the binding has the address only
            session.run_with_iobinding(binding)
            return result
        return call
    return Runner(bind)


def _openvino(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
    import openvino as ov
    core = ov.Core()
    compiled = core.compile_model(core.read_model(to_onnx(model, x)), "CPU", {
        "INFERENCE_PRECISION_HINT": "f32",             # the default is bf16 where the CPU has it
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": setting.threads,
        "ENABLE_HYPER_THREADING": True,                # else it may use fewer threads than it was given
        "ENABLE_CPU_PINNING": False})                  # pinned, it waits for whatever else runs on its core
    request = compiled.create_infer_request()

    def bind(x: Tensor) -> Call:
        given = x.contiguous().numpy()

        def call(held: Any = given) -> Any:
            request.infer()
            return request.get_output_tensor(0).data
        request.set_input_tensor(0, ov.Tensor(given, shared_memory=True))
        return call
    return Runner(bind, lambda array: torch.from_numpy(array.copy()))


def contenders(setting: Setting, compile: bool = True) -> tuple[Contender, ...]:
    """Who takes part on a device; eager comes first and is what ratios refer to."""
    ours = [_lowered(backend) for backend in BACKENDS]
    if setting.device.type == "cuda":
        compilers = [Contender(f"torch.compile, {mode}", _compiled(mode))
                     for mode in ("reduce-overhead", "max-autotune")]
        return (Contender("eager", _eager), Contender("channels_last", _channels_last),
                Contender("eager, CUDA graph", _cuda_graph), *(compilers if compile else ()), *ours)
    compilers = [Contender("torch.compile, freezing", _compiled(freezing=True))]
    return (Contender("eager", _eager), Contender("channels_last", _channels_last), *(compilers if compile else ()),
            Contender("ONNX Runtime", _onnxruntime, _needs("onnx", "onnxscript", "onnxruntime")),
            Contender("OpenVINO f32", _openvino, _needs("onnx", "onnxscript", "openvino")), *ours)


# ---- order and quiet ------------------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """Not an Exception, so that no compiler takes it for a bug of its own and carries on."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread at its next Python instruction after so many seconds.

    The signal is simulated: OpenVINO leaves an alternative signal stack behind that is gone once its network is,
    and delivering a real one then ends the process.
    """
    number = getattr(signal, "SIGALRM", signal.SIGINT)
    timer = threading.Timer(seconds, _thread.interrupt_main, (number,))
    timer.daemon = True

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise OutOfTime
    before = signal.signal(number, stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(number, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress lines and warnings of exporters and compilers; what they raise still shows."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch._inductor", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
