"""Every way to run a network that is compared: the same weights, inputs and number of threads.

Each contender is given its best settings, and one call takes an input where that contender wants it and leaves a
finished output. Inputs are converted and bound before the clock starts, for everybody alike. Contenders compute in
fp32, except those whose ``precision`` says something else: they are compared among themselves only.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from bench import cuda_peers
from bench.isolation import OutOfTime, own_signal_stack, quiet, time_limit
from bench.verified import allowed, error_rows
from prunekern.backends import BACKENDS, lower
from prunekern.backends.base import Backend
from prunekern.errors import BackendUnavailable
from prunekern.lower.tolerance import error

Call = Callable[[], object]
DTYPES = {"fp32": torch.float32, "fp16 weights": torch.float32, "bf16": torch.bfloat16,     # of the arithmetic
          "tf32": torch.float32, "fp16": torch.float16}
OPT_IN: dict[str, dict[str, dict[str, Any]]] = {                # backend -> precision -> options of ``lower``
    "cpu": {"fp16 weights": {"weights": "fp16"}, "bf16": {"dtype": "bf16"}},
    **{name: {"tf32": {"precision": "tf32"}, "fp16": {}} for name in ("triton", "cuda")}}     # fp16: the model is in it
ON_GPU = ("fp32", "tf32", "fp16")                               # leagues there; each has its peers


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders of a run. compile_limit: seconds that one torch.compile may take."""

    device: torch.device
    threads: int
    compile_limit: float = 120.0


@dataclass(frozen=True)
class Runner:
    """A network made ready. ``bind`` prepares an input and gives the call to time; ``read`` makes a tensor of what
    that call returns; ``rows`` are those of the tolerance table that it falls under on an input."""

    bind: Callable[[Tensor], Call]
    read: Callable[[Any], Tensor] = lambda value: value
    rows: Callable[[Tensor], Iterable[str]] = lambda x: ()


@dataclass(frozen=True)
class Contender:
    """A way to run a network. ``key``: its name on the command line. ``ours``: it is this library, not a peer.
    ``unavailable`` gives the reason why it cannot take part, or None."""

    key: str
    name: str
    make: Callable[[nn.Module, Tensor, Setting], Runner]
    unavailable: Callable[[Setting], str | None] = lambda setting: None
    precision: str = "fp32"
    ours: bool = False
    on_gpu: bool = False

    @property
    def league(self) -> str:
        """Those that ask for less precision than fp32 are compared among themselves; on GPUs, each precision is."""
        return self.precision if self.on_gpu or self.precision == "fp32" else "opt-in"

    @property
    def held_to(self) -> str:
        """The precision in which eager says how far off is right; ours are held to fp32 where they are given fp32."""
        return self.precision if not self.ours or (self.on_gpu and self.precision == "fp16") else "fp32"


@dataclass(frozen=True)
class Checked:
    """A contender held to eager's fp64 result on two inputs; errors are ``max|y - y64| / max|y64|`` over ``samples``
    of the batch. seconds: what the second call took."""

    error: float
    torch_error: float
    limit: float
    samples: int
    seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


PEER = 5e-5         # deep networks in fp32 were seen at 1e-5; with tf32 or bf16 anywhere, at 1e-3
WORK = 16e9         # multiply-accumulates that one verification does in fp64 (but two samples always)


@dataclass(frozen=True)
class Truth:
    """What a network gives for some samples of each input: in fp64, and how far eager is from that in each precision.

    picked: which samples of a batch, the first and the last among them. Contenders run the whole batch; that samples
    do not depend on each other (no network in eval mode makes them) lets eager, in fp64, run these alone.
    """

    inputs: tuple[Tensor, ...]
    picked: Tensor
    exact: tuple[Tensor, ...]
    torch_errors: dict[str, tuple[float, ...]]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: nn.Module, inputs: tuple[Tensor, ...], macs: int,
           precisions: Sequence[str] = ("fp32",)) -> Truth:
        """macs: of the network, for one sample."""
        batch = len(inputs[0])
        count = min(batch, max(2, int(WORK / max(1, macs))))
        picked = torch.linspace(0, batch - 1, count).round().long()
        some = [x[picked.to(x.device)] for x in inputs]
        wide = copy.deepcopy(model).double()
        exact = tuple(wide(x.double()) for x in some)
        errors = {}
        for precision in precisions:
            narrow = copy.deepcopy(model).to(DTYPES[precision])
            with cuda_peers.arithmetic(precision):
                errors[precision] = tuple(error(narrow(x.to(DTYPES[precision])), y64)
                                          for x, y64 in zip(some, exact, strict=True))
        return cls(inputs, picked, exact, errors)

    @torch.inference_mode()
    def hold(self, runner: Runner, contender: Contender) -> Checked:
        """The worst of the inputs, by ``prunekern.lower.tolerance``: eager's own error in that precision, some times
        over, and a floor. Ours are held to eager in fp32 and to their rows of the table, whatever they round. Peers
        pass up to ``PEER`` in any case: in which order they sum is their affair."""
        found, precision = [], contender.held_to
        for x, y64, own in zip(self.inputs, self.exact, self.torch_errors[precision], strict=True):
            call = runner.bind(x)
            start = time.perf_counter()
            result = runner.read(call())
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
            seconds = time.perf_counter() - start
            whole = len(result) == len(x)
            ours = result[self.picked.to(result.device)] if whole else result       # else: wrong, and error() says so
            found.append((error(ours, y64), own, seconds))
        rows = tuple(runner.rows(self.inputs[0]))
        least = 0.0 if contender.ours else PEER
        held = [Checked(e, own, max(least, allowed(own, DTYPES[precision], rows)), len(self.picked),
                        found[-1][2]) for e, own, _ in found]
        return max(held, key=lambda checked: checked.error / checked.limit)


# ---- torch -----------------------------------------------------------------------------------------------------


def _eager(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
    return Runner(lambda x: lambda: model(x))


def _channels_last(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return Runner(lambda x: (lambda y: lambda: model(y))(x.contiguous(memory_format=torch.channels_last)))


def _on_gpu(make: Callable[..., Any], precision: str, takes_input: bool) -> Callable[..., Runner]:
    def ready(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
        return Runner(make(model, x, precision) if takes_input else make(model, precision))
    return ready


def _compiled_on_gpu(precision: str) -> Callable[[nn.Module, Tensor, Setting], Runner]:
    """torch.compile's best: max-autotune, CUDA graphs, channels last."""
    def make(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
        with cuda_peers.arithmetic(precision):
            inner = _compiled("max-autotune")(cuda_peers.narrowed(model, precision),
                                              cuda_peers.converted(x, precision), setting)

        def bind(x: Tensor) -> Call:
            call = inner.bind(cuda_peers.converted(x, precision))

            def run() -> object:        # the flag is one of the compiled code's guards
                with cuda_peers.arithmetic(precision):
                    return call()
            return run if precision == "tf32" else call
        return Runner(bind)
    return make


def _compiled(mode: str | None = None, **config: Any) -> Callable[[nn.Module, Tensor, Setting], Runner]:
    def make(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
        def call(x: Tensor) -> Any:
            return model(x)
        call.__code__ = call.__code__.replace()         # of its own: no other network's guards are tried before
        compiled = torch.compile(call, dynamic=False, mode=mode)
        try:
            # Set globally, since the tracer has to see it too: as `options` of torch.compile, freezing does nothing.
            # The number of threads is compiled in, and must be part of what a cached result is found by.
            with (inductor.patch({"cpp.threads": setting.threads, **config}), time_limit(setting.compile_limit),
                  torch.inference_mode(), quiet()):
                for _ in range(3):                      # CUDA-graph modes record on the second call
                    compiled(x)
        except OutOfTime:
            raise TimeoutError(f"compilation took more than {setting.compile_limit:.0f} s") from None
        return Runner(lambda x: lambda: compiled(x))
    return make


def _lowered(backend: Backend, precision: str = "fp32", /, **options: Any) -> Contender:
    """options: of ``lower``, for a precision that has to be asked for."""
    on_gpu = backend.devices[0] == "cuda"

    def make(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
        half = on_gpu and precision == "fp16"
        given = (copy.deepcopy(model).half(), x.half()) if half else (model, x)
        lowered = lower(*given, backend=backend.name, verify=False, **options)       # held to fp64 by Truth, as all
        return Runner(lambda x: (lambda y: lambda: lowered(y))(x.half() if half else x),
                      rows=lambda x: error_rows(lowered, x.half() if half else x))

    def unavailable(setting: Setting) -> str | None:
        if setting.device.type not in backend.devices:
            return f"it does not run on {setting.device.type}"
        try:
            backend.configured(**options)
        except BackendUnavailable as error:
            return str(error)
        return backend.unavailable()
    name = f"lowered, {backend.name}" + ("" if precision == "fp32" else f", {precision}")
    return Contender(backend.name, name, make, unavailable, precision, ours=True, on_gpu=on_gpu)


# ---- others ----------------------------------------------------------------------------------------------------


def _needs(*modules: str) -> Callable[[Setting], str | None]:
    def unavailable(setting: Setting) -> str | None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None
    return unavailable


@lru_cache(maxsize=3)
def to_onnx(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """The network in ONNX for inputs of this very shape, which is what the runtimes optimise best."""
    with quiet():
        program = torch.onnx.export(model, (torch.zeros(shape),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def _onnxruntime(model: nn.Module, x: Tensor, setting: Setting) -> Runner:
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(to_onnx(model, tuple(x.shape)), options, providers=["CPUExecutionProvider"])
    source, target = session.get_inputs()[0].name, session.get_outputs()[0].name

    def bind(x: Tensor) -> Call:
        binding = session.io_binding()                 # measured faster than session.run with arrays
        given = x.contiguous().numpy()
        binding.bind_cpu_input(source, given)
        result = torch.empty([size if isinstance(size, int) else len(x) for size in session.get_outputs()[0].shape])
        binding.bind_output(target, "cpu", 0, "float32", tuple(result.shape), result.data_ptr())

        def call(held: Any = given) -> Tensor:        # the binding has the address only
            session.run_with_iobinding(binding)
            return result
        return call
    return Runner(bind)


def _openvino(model: nn.Module, x: Tensor, setting: Setting, precision: str = "f32") -> Runner:
    import openvino as ov
    core = ov.Core()
    with own_signal_stack():
        compiled = core.compile_model(core.read_model(to_onnx(model, tuple(x.shape))), "CPU", {
            "INFERENCE_PRECISION_HINT": precision,         # the default is bf16 where the CPU has it
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


def _openvino_bf16(setting: Setting) -> str | None:
    missing = _needs("onnx", "onnxscript", "openvino")(setting)
    if missing is not None:
        return missing
    import openvino as ov
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this CPU has no bf16 instructions"
    return None


PEERS = {
    "cpu": (Contender("eager", "eager", _eager), Contender("channels_last", "channels_last", _channels_last),
            Contender("compile", "torch.compile, freezing", _compiled(freezing=True)),
            Contender("onnxruntime", "ONNX Runtime", _onnxruntime, _needs("onnx", "onnxscript", "onnxruntime")),
            Contender("openvino", "OpenVINO f32", _openvino, _needs("onnx", "onnxscript", "openvino")),
            Contender("openvino-bf16", "OpenVINO bf16", partial(_openvino, precision="bf16"), _openvino_bf16, "bf16")),
    "cuda": (Contender("eager", "eager", _eager, on_gpu=True), *(
        Contender(key, title if precision == "fp32" else f"{title}, {precision}", make, needs, precision, on_gpu=True)
        for precision in ON_GPU for key, title, make, needs in (
            ("channels_last", "channels_last", _on_gpu(cuda_peers.eager, precision, False), lambda setting: None),
            ("cuda-graph", "eager, CUDA graph", _on_gpu(cuda_peers.recorded, precision, True), lambda setting: None),
            ("compile", "torch.compile, max-autotune", _compiled_on_gpu(precision), lambda setting: None),
            ("tensorrt", "TensorRT", _on_gpu(cuda_peers.tensorrt, precision, True), _needs("torch_tensorrt"))))),
}


def contenders(setting: Setting, peers: Sequence[str] | None = None, backends: Sequence[str] | None = None,
               precisions: Sequence[str] | None = None) -> tuple[Contender, ...]:
    """Who takes part on a device.

    peers: keys of PEERS, None for all; eager is always there, first, and is what ratios in print refer to.
    backends: this library's, by name; None for the best that runs on the device. Their opt-in precisions take part
    where a peer's does. precisions: None for all; eager, in fp32, is there in any case.
    """
    taking = [peer for peer in PEERS[setting.device.type] if peers is None or peer.key in ("eager", *peers)]
    if backends is None:
        able = (backend.name for backend in BACKENDS if _lowered(backend).unavailable(setting) is None)
        backends = [next(able)]
    ours = [contender for backend in BACKENDS if backend.name in backends for contender in _modes(backend)]
    leagues = {contender.league for contender in taking}
    everybody = (*taking, *[contender for contender in ours if contender.league in leagues])
    return tuple(c for c in everybody if precisions is None or c.key == "eager" or c.precision in precisions)


def _modes(backend: Backend) -> list[Contender]:
    """A backend in fp32, and in each precision that has to be asked for."""
    return [_lowered(backend), *[_lowered(backend, precision, **options)
                                 for precision, options in OPT_IN.get(backend.name, {}).items()]]
