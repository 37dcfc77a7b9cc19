"""Whole networks by the CUDA kernels, on the host: every step held to fp64, by every way of running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.backends import known, lower
from prunekern.backends.cuda.placement import CudaPlacement
from prunekern.backends.lowered import Lowered
from prunekern.core.rule import OpRule, Sample
from prunekern.errors import BackendUnavailable, UnknownName
from prunekern.graph.inputs import Call
from prunekern.lower.tolerance import error
from prunekern.ops import REGISTRY
from tests.cuda import host
from tests.models import make
from tests.weights import randomise_
from tests.zoo import ZOO

SAMPLES = REGISTRY.samples()


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "cuda" is the host's."""
    others = tuple(backend for backend in known.BACKENDS if backend.name != "cuda")
    monkeypatch.setattr(known, "BACKENDS", (*others, host.backend()))


def placement(lowered: Lowered, *inputs: Tensor) -> CudaPlacement:
    found = lowered.placement(lowered.signature(inputs))
    assert isinstance(found, CudaPlacement)
    return found


WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "graph": ({"whole": "never"}, "graph"), "launches": ({"whole": "never", "graph": False}, "launches"),
    "whole": ({"whole": "always"}, "one launch")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["fashion", "lenet", "mlp"])
def test_networks_by_every_way_of_running_them(name: str, way: str) -> None:
    options, expected = WAYS[way]
    model, (x,) = make(name, batch=3)
    lowered = lower(model, x, backend="cuda", **options)
    native = placement(lowered, x).parts[0].native
    assert native is not None
    assert native.way == expected
    for _ in range(2):      # memory that the first call left behind must not matter
        x = torch.randn_like(x)
        with torch.no_grad():
            assert error(lowered(x), model(x)) < 2e-6


def test_deeper_networks() -> None:
    model, (x,) = make("resnet20")
    lowered = lower(model, x, backend="cuda", whole="never")
    assert not placement(lowered, x).refusals
    algorithms = set(placement(lowered, x).algorithms.values())
    assert {"implicit GEMM", "GEMM"} <= algorithms


@pytest.mark.parametrize("name", ["fashion", "lenet"])
@pytest.mark.parametrize("algorithm", ["im2col", "implicit GEMM"])
def test_algorithms_that_were_asked_for(name: str, algorithm: str) -> None:
    model, (x,) = make(name)
    convs = {step.name: algorithm for step in lower(model, x, backend="reference").program.steps if step.op == "conv"}
    lowered = lower(model, x, backend="cuda", algorithms=convs, whole="never")
    found = placement(lowered, x).algorithms
    wanted = "im2col + GEMM" if algorithm == "im2col" else algorithm
    assert {found[step] for step in convs} == {wanted}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["graph", "whole"])
def test_half_precision(dtype: torch.dtype, way: str) -> None:
    """By tensor cores (on the host: by their layouts, spelt out)."""
    model, (x,) = make("fashion", batch=2)
    lowered = lower(model.to(dtype), x.to(dtype), backend="cuda", **WAYS[way][0])
    assert not placement(lowered, x.to(dtype)).refusals
    assert lowered(x.to(dtype)).dtype == dtype


def test_the_faster_way_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host either may be; without measuring it is the graph."""
    model, (x,) = make("mlp")
    ways = []
    for tune in ("quick", "off"):
        monkeypatch.setenv("PRUNEKERN_TUNE", tune)
        lowered = lower(model, x, backend="cuda")
        native = placement(lowered, x).parts[0].native
        assert native is not None
        ways.append(native.way)
        with torch.no_grad():
            assert error(lowered(x), model(x)) < 2e-6
    assert ways[0] in ("graph", "one launch")
    assert ways[1] == "graph"


def test_tf32_is_only_used_where_it_is_asked_for() -> None:
    model, (x,) = make("lenet", batch=8)
    exact = model.double()(x.double())
    errors = {precision: error(lower(model.float(), x, backend="cuda", precision=precision)(x), exact)
              for precision in ("ieee", "tf32")}
    assert errors["ieee"] < 2e-6 < 2e-5 < errors["tf32"] < 1e-2


@pytest.mark.parametrize(("rule", "sample"), SAMPLES, ids=[str(sample) for _, sample in SAMPLES])
def test_samples(rule: OpRule, sample: Sample) -> None:
    """``lower`` holds every step to fp64; a sample whose steps are all refused proves nothing of the kernels."""
    torch.manual_seed(0)
    model, inputs = randomise_(sample.build()).eval(), sample.inputs(2)
    lowered = lower(model, inputs, backend="cuda")
    refused = placement(lowered, *(x for x in inputs if isinstance(x, Tensor))).refusals
    for step in lowered.program.steps:
        floats = all(slot.dtype == torch.float32 for slot in (*step.reads, *step.outputs))
        if floats and step.op not in ("aten", "recurrent", "resize"):
            assert step.name not in refused, refused[step.name]


@pytest.mark.parametrize("name", ["resnext", "generator", "conv1d_net", "conv3d_net", "unet", "vit", "gqa_flag",
                                  "rope_gqa", "window_attention", "class_attention", "layer_norm_mlp", "learned_state"])
def test_awkward_networks(name: str) -> None:
    case = ZOO[name](batch=2)
    lowered = lower(case.model, Call(case.args, case.kwargs), backend="cuda")
    with torch.no_grad():
        assert error(lowered(*case.args, **case.kwargs), case.model(*case.args, **case.kwargs)) < 1e-4


# Channels in and out, kernel, stride, padding, dilation, groups, size of the image.
GEOMETRIES = [(3, 5, 3, 1, 1, 1, 1, 9), (13, 37, (3, 1), 2, (1, 0), 1, 1, 11), (16, 8, 5, 1, 4, 2, 2, 9),
              (9, 6, 3, 3, 2, 1, 3, 10), (7, 14, 3, 1, 1, 1, 7, 8), (12, 12, 3, 2, 1, 1, 12, 9),
              (40, 72, 1, 1, 0, 1, 1, 7), (1, 1, 7, 1, 0, 1, 1, 7)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d], ids=["conv", "transposed"])
def test_convolutions_of_odd_geometry(geometry: tuple[Any, ...], kind: type[nn.Module]) -> None:
    """Odd channels (not whole vectors of 16 bytes), strides, padding beyond the window, groups."""
    i, o, kernel, stride, padding, dilation, groups, size = geometry
    layer = kind(i, o, kernel, stride, padding if kind is nn.Conv2d else 0, dilation=dilation, groups=groups)
    model = nn.Sequential(randomise_(layer), nn.GELU(), randomise_(kind(o, i, 1))).eval()
    lowered = lower(model, torch.randn(2, i, size, size), backend="cuda", whole="never")
    assert lowered.verification is not None
    assert not placement(lowered, torch.randn(2, i, size, size)).refusals


def test_a_misaligned_input_is_moved_first() -> None:
    model, (x,) = make("mlp", batch=2)
    lowered = lower(model, x, backend="cuda")
    wide = torch.zeros(x.numel() + 1)
    shifted = wide[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16
    assert shifted.is_contiguous()
    assert torch.equal(lowered(shifted), lowered(x))


def test_out_and_many_batches() -> None:
    model, (x,) = make("lenet", batch=4)
    lowered = lower(model, x, backend="cuda")
    for batch in (1, 4, 7):
        given, out = torch.randn(batch, *x.shape[1:]), torch.empty(batch, 10)
        assert lowered(given, out=out) is out
        assert torch.equal(out, lowered(given))


def test_errors_name_the_step_and_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = make("lenet")
    with pytest.raises(UnknownName, match="precision"):
        lower(model, x, backend="cuda", precision="fp8")
    with pytest.raises(UnknownName, match="tiles"):
        lower(model, x, backend="cuda", tiles=3)
    monkeypatch.setenv("PRUNEKERN_CUDA_SYNC", "1")
    native = placement(lower(model, x, backend="cuda"), x).parts[0].native
    assert native is not None
    assert native.way == "launches"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from prunekern.backends.cuda import CudaBackend
    monkeypatch.setattr(known, "BACKENDS", (CudaBackend(), *known.BACKENDS[:1]))
    with pytest.raises(BackendUnavailable, match=r"backend 'cuda' cannot run here: .*(CUDA|extension)"):
        lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), backend="cuda")


def test_a_saved_network_comes_back(tmp_path: Path) -> None:
    model, (x,) = make("fashion")
    lowered = lower(model, x, backend="cuda")
    lowered.save(tmp_path)
    assert torch.equal(Lowered.load(tmp_path, backend="cuda")(x), lowered(x))
