"""What every backend must do: each operator sample, each awkward network and each architecture, lowered, equals
itself in fp64 and fp32, at any batch size, with strided inputs; and survives being saved."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from prunekern.backends import BACKENDS, Lowered, lower
from prunekern.core.rule import OpRule, Sample
from prunekern.graph.inputs import Call
from prunekern.lower.tolerance import error
from prunekern.ops import REGISTRY
from tests.models import make
from tests.weights import randomise_
from tests.zoo import ZOO

USABLE = [b.name for b in BACKENDS if b.unavailable() is None and "cpu" in b.devices]
SAMPLES = REGISTRY.samples()
LIMIT = 1e-11       # fp64, relative to the largest value; deep and normalised networks amplify the last place
SMALL = ("fashion", "lenet", "mlp", "resnet20", "mobilenet_v2", "densenet121", "resnet18")

pytestmark = pytest.mark.parametrize("backend", USABLE)


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    wide = torch.stack((tensor, torch.zeros_like(tensor)), -1)
    assert tensor.numel() < 2 or not wide[..., 0].is_contiguous()
    return wide[..., 0]


def assert_same(ours: Any, theirs: Any, limit: float) -> None:
    left, left_spec = pytree.tree_flatten(ours)
    right, right_spec = pytree.tree_flatten(theirs)
    assert left_spec == right_spec
    for value, expected in zip(left, right, strict=True):
        if isinstance(expected, Tensor):
            assert value.dtype == expected.dtype
            assert error(value, expected) <= limit
        else:
            assert value == expected


def batches(lowered: Lowered) -> tuple[int, ...]:
    return (1, 2, 5) if lowered.program.batch is None else (lowered.program.batch,)


@pytest.mark.parametrize(("rule", "sample"), SAMPLES, ids=[str(sample) for _, sample in SAMPLES])
def test_samples(rule: OpRule, sample: Sample, backend: str) -> None:
    torch.manual_seed(0)
    model = randomise_(sample.build()).double().eval()
    lowered = lower(model, tuple(map(double, sample.inputs(2))), backend=backend)
    for batch in batches(lowered):
        inputs = tuple(map(double, sample.inputs(batch)))
        with torch.no_grad():
            expected = model(*(t.clone() for t in inputs))
        kept = [t.clone() for t in inputs]
        assert_same(lowered(*inputs), expected, LIMIT)
        assert_same(lowered(*map(strided, inputs)), expected, LIMIT)
        assert all(torch.equal(a, b) for a, b in zip(kept, inputs, strict=True)), "an input was written to"


def zoo_call(name: str, batch: int) -> tuple[nn.Module, Call]:
    case = ZOO[name](batch=batch)
    return case.model.double(), Call(case.args, case.kwargs).map(double)


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str, backend: str, tmp_path: Path) -> None:
    model, call = zoo_call(name, 2)
    lowered = lower(model, call, backend=backend)
    lowered.save(tmp_path)
    loaded = Lowered.load(tmp_path, backend=backend)
    for batch in batches(lowered):
        _, call = zoo_call(name, batch)
        with torch.no_grad():
            expected = model(*call.map(Tensor.clone).args, **call.map(Tensor.clone).kwargs)
        ours = lowered(*call.args, **call.kwargs)
        assert_same(ours, expected, LIMIT)
        assert_same(loaded(*call.args, **call.kwargs), ours, 0.0)


@pytest.mark.parametrize("name", SMALL)
def test_architectures(name: str, backend: str, tmp_path: Path) -> None:
    """fp32: held to its tolerance by ``lower`` itself; every operator has a Step of its own kind."""
    model, (x,) = make(name)
    lowered = lower(model, x, backend=backend)
    assert lowered.verification is not None
    assert all(check.passed for check in (*lowered.verification.steps, *lowered.verification.outputs))
    assert not [step for step in lowered.program.steps if step.op == "aten"]
    with torch.no_grad():
        expected = model(x)
    assert error(lowered(x), expected) < 1e-4
    lowered.save(tmp_path)
    assert_same(Lowered.load(tmp_path, backend=backend)(x), lowered(x), 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fashion", "resnet20", "mobilenet_v2"])
def test_half_precision(name: str, dtype: torch.dtype, backend: str) -> None:
    """Held to fp64 by ``lower``; MobileNet's depthwise sums need more than the dtype's own additions."""
    model, (x,) = make(name, batch=2)
    lowered = lower(model.to(dtype), x.to(dtype), backend=backend)
    assert lowered(x.to(dtype)).dtype == dtype
    assert lowered.verification is not None
    assert lowered.verification.torch_error < 0.3       # so that the limit means something


class Calls(TorchFunctionMode):
    """The torch functions that are called, at the Python level."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """The ATen operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["plain_cnn", "depthwise_separable", "resnext", "generator", "conv1d_net",
                                  "conv3d_net", "unet", "layer_norm_mlp"])
def test_no_convolution_or_linear_operator_is_called(name: str, backend: str) -> None:
    model, call = zoo_call(name, 2)
    lowered = lower(model, call, backend=backend, verify=False)
    forbidden = ("conv", "linear", "addmm_", "mkldnn")
    with Calls() as calls, Dispatched() as dispatched:
        lowered(*call.args, **call.kwargs)
    assert dispatched.names or calls.names
    used = {n for n in calls.names | dispatched.names if any(word in n for word in forbidden)}
    assert not used
    with Dispatched() as own:       # the watch itself sees them where they are
        model(*call.args, **call.kwargs)
    assert any("conv" in n or "addmm" in n for n in own.names)


def test_outputs_are_the_callers_own(backend: str) -> None:
    """Nothing a caller does to a result changes a later one, and gradients can be taken through it."""
    model, (x,) = make("lenet", batch=2)
    lowered = lower(model, x, backend=backend)
    first = lowered(x)
    kept = first.clone()
    lowered(torch.randn_like(x))
    assert torch.equal(first, kept)
    first.mul_(0)
    assert torch.equal(lowered(x), kept)
    weight = torch.ones(10, requires_grad=True)
    (lowered(x) * weight).sum().backward()
    assert weight.grad is not None


def test_later_changes_of_the_model_do_not_reach_it(backend: str) -> None:
    model, (x,) = make("lenet")
    lowered = lower(model, x, backend=backend)
    before = lowered(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(lowered(x), before)
    fresh = Lowered(lowered.program, backend)
    assert torch.equal(fresh(x), before)


def test_the_model_is_left_as_it_was(backend: str) -> None:
    model, (x,) = make("resnet20")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lower(model, x, backend=backend)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model.training


def test_one_network_serves_many_threads(backend: str) -> None:
    model, (x,) = make("lenet", batch=3)
    lowered = lower(model, x, backend=backend)
    inputs = [torch.randn_like(x) for _ in range(100)]
    expected = [lowered(each) for each in inputs]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lowered, inputs))
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
