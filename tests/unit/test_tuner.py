"""The tuner: what it measures, keeps on disk, and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunekern.backends import lower
from prunekern.backends.cpu import convs
from prunekern.backends.cpu import tuner as tune
from prunekern.backends.cpu.convs import algorithms
from prunekern.errors import InputError, UnknownName
from prunekern.kernels import unavailable
from prunekern.lower.tolerance import error

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no C++ engine: {unavailable()}")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "SECONDS", {"quick": 0.0, "full": 0.0})
    monkeypatch.setattr(tune, "ROUNDS", {"quick": 1, "full": 1})
    return tmp_path / "prunekern" / "tune"


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 13, 3, padding=1), nn.ReLU(),
                          nn.MaxPool2d(2), nn.Conv2d(13, 7, 1)).eval()
    return model, torch.randn(1, 3, 12, 12)


def chosen(**options: Any) -> dict[str, str]:
    model, x = network()
    lowered = lower(model, x, backend="cpu", num_threads=1, **options)
    return {row.step: row.algorithm for row in lowered.explain(x).rows if row.op == "conv"}


def never(*_: Any) -> Any:
    raise AssertionError("measured")


def test_what_was_measured_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = chosen(tune="quick")
    (file,) = cache.iterdir()
    monkeypatch.setattr(tune.Tuner, "run", never)
    assert chosen(tune="quick") == first
    file.write_text('{"choices": 3')
    with pytest.raises(AssertionError, match="measured"):
        chosen(tune="quick")
    with pytest.raises(AssertionError, match="measured"):
        chosen(tune="full")


def test_off_measures_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.Tuner, "run", never)
    assert set(chosen(tune="off")) == {"conv2d", "conv2d_1", "conv2d_2"}
    assert not cache.exists()


def test_the_environment_decides_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.Tuner, "run", never)
    monkeypatch.setenv("PRUNEKERN_TUNE", "off")
    chosen()
    monkeypatch.setenv("PRUNEKERN_TUNE", "full")
    with pytest.raises(AssertionError, match="measured"):
        chosen()


@pytest.mark.parametrize("fastest", ["winograd 2x2", "planar", "im2col"])
def test_each_convolution_gets_what_was_fastest_for_it(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tune.Tuner._per_step

    def rigged(self: tune.Tuner, placement: Any) -> dict[str, float]:
        algorithm = placement.algorithms
        return {step: 1e-9 if algorithm.get(step) == fastest else 1.0 for step in real(self, placement)}
    monkeypatch.setattr(tune.Tuner, "_per_step", rigged)
    monkeypatch.setattr(tune, "GAIN", float("inf"))      # of two mixtures, whichever measures faster
    monkeypatch.setattr(tune.Tuner, "_totals", lambda self, placements: {
        key: float(key != "any") for key in placements})
    found = chosen(tune="quick")
    assert found["conv2d_1"] == fastest


def test_an_algorithm_that_gives_something_else_is_not_run(monkeypatch: pytest.MonkeyPatch,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    """A batch that nobody verified is held to plain matrix products before it runs."""
    model, x = network()
    lowered = lower(model, x, backend="cpu", num_threads=1, tune="quick")
    broken = convs.Algorithm("broken", convs.GEMM.form, convs.GEMM.takes, _without_bias)
    real = algorithms
    for module in (convs, tune):
        monkeypatch.setattr(module, "algorithms", lambda *args: {**real(*args), "broken": broken})
    monkeypatch.setattr(tune.Tuner, "run", lambda self, guess: tune.Tuning({str(i): "broken" for i in range(3)}))
    many = torch.randn(5, 3, 12, 12)
    with torch.no_grad(), caplog.at_level("WARNING", logger="prunekern"):
        assert error(lowered(many), model(many)) < 1e-5
    assert "does not give the network's output" in caplog.text


def _without_bias(builder: Any, step: Any, geometry: Any) -> None:
    convs.GEMM.emit(builder, step.with_epilogue(bias=None), geometry)


def test_forced_algorithms() -> None:
    found = chosen(tune="off", algorithms={"conv2d": "im2col", "conv2d_1": "winograd 2x2"})
    assert (found["conv2d"], found["conv2d_1"]) == ("im2col", "winograd 2x2")


@pytest.mark.parametrize(("options", "message"), [
    ({"tune": "sometimes"}, "full, off, quick"), ({"weights": "fp8"}, "fp16"), ({"speed": 3}, "num_threads")])
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    model, x = network()
    with pytest.raises(UnknownName, match=message):
        lower(model, x, backend="cpu", **options)
    with pytest.raises(InputError, match="at least one thread"):
        lower(model, x, backend="cpu", num_threads=0)
