"""Resuming after a kill, histories, curves, seeds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunekern.errors import ArtefactError, InputError
from prunekern.train import Epoch, History, accuracy, seed_everything
from tests.training import blobs, figures, network, same, train

# --- checkpoints ------------------------------------------------------------------------------------------


class StopHereError(Exception):
    """Stands for a kill that the test survives."""


def kill_after(steps: int) -> Callable[[nn.Module], None]:
    count = iter(range(steps))

    def hook(model: nn.Module) -> None:
        if next(count, None) is None:
            raise StopHereError

    return hook


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [3, 6, 20, 29])
def test_interrupted_run_ends_as_if_it_had_not_been(tmp_path: Path, optimizer: Any, steps: int) -> None:
    options = {"epochs": 5, "optimizer": optimizer, "lr": 0.01, "validate": blobs(30, 2), "patience": 5}
    whole, parted, path = network(), network(), tmp_path / "deep" / "run.safetensors"
    expected = train(whole, **options)
    with pytest.raises(StopHereError):
        train(parted, checkpoint=path, before_step=kill_after(steps), **options)
    parted = network()
    done: list[int] = []
    found = train(parted, checkpoint=path, before_step=lambda m: done.append(1), **options)
    assert len(done) == 30 - steps // 6 * 6  # finished epochs are not trained again
    assert figures(found) == figures(expected)
    assert (found.best, found.restored) == (expected.best, expected.restored)
    assert same(parted, whole)


def test_finished_checkpoint_gives_its_result_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first, again = network(), network()
    history = train(first, validate=blobs(30, 2), checkpoint=path, restore_best=True)
    found = train(again, validate=blobs(30, 2), checkpoint=path, restore_best=True, before_step=kill_after(0))
    assert found == history
    assert same(first, again)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_killed_process_resumes(tmp_path: Path) -> None:
    """A real SIGKILL in the middle of the third epoch, in a process of its own."""
    script = f"""
        import os, signal, sys, torch
        sys.path.insert(0, {os.getcwd()!r})
        torch.set_num_threads(1)
        from tests.training import network, train
        count = iter(range(15))
        def hook(model):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
        train(network(), epochs=4, checkpoint={str(tmp_path / "run")!r}, before_step=hook)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole, parted, steps = network(), network(), []
    expected = train(whole, epochs=4)
    found = train(parted, epochs=4, checkpoint=tmp_path / "run", before_step=lambda m: steps.append(1))
    assert len(steps) == 12
    assert figures(found) == figures(expected)
    assert same(parted, whole)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(network(), checkpoint=path)
    model, before = network(1), network(1)
    with pytest.raises(ArtefactError, match="other weights"):
        train(model, checkpoint=path)
    assert same(model, before)
    with pytest.raises(ArtefactError, match=r"lr=0\.05, now 0\.01"):
        train(network(), lr=0.01, checkpoint=path)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(network(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtefactError, match="damaged"):
        train(network(), checkpoint=path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtefactError, match="format None"):
        train(network(), checkpoint=path)


def test_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArtefactError, match="cannot be"):
        train(network(), checkpoint=tmp_path / "file" / "run")


# --- histories --------------------------------------------------------------------------------------------


def test_history_survives_json(tmp_path: Path) -> None:
    history = train(network(), validate=blobs(30, 2))
    text = history.to_json(tmp_path / "history.json")
    assert (tmp_path / "history.json").read_text() == text
    assert History.from_dict(json.loads(text)) == history
    assert history.seconds == sum(epoch.seconds for epoch in history) > 0
    with pytest.raises(ArtefactError, match="not a training history"):
        History.from_dict({"epochs": [{"epoch": 0}]})


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from prunekern.train.curves import draw

    epochs = tuple(Epoch(i, 2.0 - i, 0.5 + i / 10, 2.1 - i, 0.4 + i / 10, 0.1, 1.0) for i in range(3))
    history = History(epochs, 1, True, False)
    loss, share = draw(history).axes
    curves = [[line.get_xydata().tolist() for line in panel.lines] for panel in (loss, share)]
    assert curves[0][0] == [[e.epoch + 1, e.loss] for e in epochs]
    assert curves[0][1] == [[e.epoch + 1, e.validation_loss] for e in epochs]
    assert curves[1][0] == [[e.epoch + 1, 100 * e.train_accuracy] for e in epochs]
    assert curves[1][1] == [[e.epoch + 1, 100 * e.validation_accuracy] for e in epochs]
    assert [point[0] for point in curves[0][2]] == [2, 2]  # the weights kept
    path = history.plot(tmp_path / "curves.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    bare = History(tuple(Epoch(e.epoch, e.loss, None, None, None, e.lr, 1.0) for e in epochs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [len(panel.lines) for panel in draw(bare).axes] == [1, 0]
    with pytest.raises(InputError, match="no epoch"):
        History(()).plot(tmp_path / "none.png")


def test_seed_everything() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(11)
    first = draw()
    seed_everything(11)
    assert draw() == first
    seed_everything(12)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    seed_everything(2**40)
    assert draw() != first


def test_progress_goes_to_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    train(network(), validate=blobs(), progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
def test_cuda_trains_and_comes_back(tmp_path: Path) -> None:
    model = network()
    state = torch.cuda.get_rng_state()
    train(model, epochs=6, device="cuda", amp=True, checkpoint=tmp_path / "run")
    assert model[0].weight.device.type == "cpu"
    assert accuracy(model, blobs(), device=None) > 0.8
    assert torch.equal(torch.cuda.get_rng_state(), state)
