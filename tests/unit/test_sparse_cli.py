"""The commands for single weights: weights, scan, sparsify, compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prunekern.prune.semi_structured import follows
from prunekern.prune.sparse_file import load_sparse
from tests.unit.test_cli import Command, done, failed
from tests.unit.test_cli import command as _command

DATA = ("--data", "fashion-mnist")
COMMANDS = ("weights", "scan", "sparsify", "compare")
LAYERS = {"conv1.weight": 54, "conv2.weight": 432, "fc.weight": 80}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    yield from _command.__wrapped__(tmp_path, monkeypatch, capfd)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(command: Command, name: str) -> None:
    text = done(command(name, "--help")).out
    assert "Examples" in text
    assert text.count(f"prunekern {name}") >= 3
    assert max(map(len, text.splitlines())) <= 80


def test_weights(command: Command, tmp_path: Path) -> None:
    run = done(command("weights", "models:net", "--sparsity", "0.75", "--ignore", "fc", "--json", "--out", "r"))
    found = {layer["name"]: layer["zeros"] for layer in run.data["layers"]}
    assert found == {"conv1.weight": 41, "conv2.weight": 324}       # 40.5 goes up
    assert {"index.html", "weights.png", "histograms.png"} <= {path.name for path in (tmp_path / "r").iterdir()}
    text = done(command("weights", "models:net")).out
    assert "conv2.weight" in text


def test_scan(command: Command, tmp_path: Path) -> None:
    run = done(command("scan", "models:net", *DATA, "--samples", "50", "--sparsity", "0.5", "--sparsity", "0.9",
                       "--layer", "conv*", "--checkpoint", "scan.json", "--out", "r", "--json"))
    assert [(p["layer"], p["removed"]) for p in run.data["points"]] == [
        ("conv1.weight", 27), ("conv1.weight", 49), ("conv2.weight", 216), ("conv2.weight", 389)]
    assert "conv2.weight (2/2)" in run.err
    assert (tmp_path / "scan.json").exists()
    assert (tmp_path / "r" / "curves.png").exists()


def test_sparsify_trains_and_saves(command: Command, tmp_path: Path) -> None:
    run = done(command("sparsify", "models:net", "--sparsity", "0.5", *DATA, "--lr", "0.2", "--epochs", "3", "--out",
                       "small", "--checkpoint", "ck", "--json"))
    assert {name: layer["weights"] for name, layer in run.data["layers"].items()} == LAYERS
    assert {name: layer["removed"] for name, layer in run.data["layers"].items()} == {
        name: size // 2 for name, size in LAYERS.items()}
    figures = run.data["accuracies"]
    assert figures["validation, trained"] > figures["validation, pruned"] + 0.1     # which is chance
    assert set(figures) == {"validation, original", "validation, pruned", "validation, trained", "test, original",
                            "test, sparse"}
    state = load_sparse(tmp_path / "small" / "weights.safetensors")
    assert {name: int((state[name] == 0).sum()) for name in LAYERS} == {name: n // 2 for name, n in LAYERS.items()}
    assert run.data["bytes"]["sparse"] < run.data["bytes"]["dense"]
    assert (tmp_path / "small" / "report" / "histograms.png").exists()
    assert (tmp_path / "ck" / "fit.ckpt").exists()
    assert "load_sparse('small/weights.safetensors')" in run.err


def test_sparsify_without_data(command: Command, tmp_path: Path) -> None:
    done(command("sparsify", "models:net", "--nm", "2:4", "--out", "a"))
    state = load_sparse(tmp_path / "a" / "weights.safetensors")
    assert follows(state["fc.weight"])
    assert follows(state["conv2.weight"].movedim(1, -1))
    run = done(command("sparsify", "models:net", "--layer", "fc=0.9", "--layer", "conv*=0.25", "--json"))
    assert {name: layer["removed"] for name, layer in run.data["layers"].items()} == {
        "conv1.weight": 14, "conv2.weight": 108, "fc.weight": 72}
    run = done(command("sparsify", "models:net", "--sparsity", "0.5", "--scope", "global", "--json"))
    assert sum(layer["removed"] for layer in run.data["layers"].values()) == sum(LAYERS.values()) // 2


def test_sparsify_for_a_drop(command: Command, tmp_path: Path) -> None:
    run = done(command("sparsify", "models:net", "--max-drop", "100", *DATA, "--epochs", "0", "--json", "--checkpoint",
                       "ck"))
    assert run.data["sparsity"] == pytest.approx(0.98, abs=0.005)
    assert len(run.data["tried"]) == 1
    assert (tmp_path / "ck" / "scan.json").exists()


@pytest.mark.parametrize(("arguments", "kind", "words"), [
    (("sparsify", "models:net"), "TargetError", ("no target", "--nm")),
    (("sparsify", "models:net", "--sparsity", "0.5", "--nm", "2:4"), "TargetError", ("--sparsity and --nm",)),
    (("sparsify", "models:net", "--sparsity", "1.5"), "TargetError", ("1.5", "[0, 1)")),
    (("sparsify", "models:net", "--nm", "2"), "TargetError", ("--nm '2'", "2:4")),
    (("sparsify", "models:net", "--nm", "4:2"), "InputError", ("n=4, m=2",)),
    (("sparsify", "models:net", "--max-drop", "1"), "TargetError", ("--data",)),
    (("sparsify", "models:net", "--layer", "fc9=0.5"), "TargetError", ("fc9", "conv1.weight")),
    (("weights", "models:net", "--layer", "fc9"), "TargetError", ("fc9", "conv1.weight")),
    (("weights", "models:net", "--sparsity", "0.5", "--scope", "all"), "TargetError", ("'all'", "'global'")),
    (("scan", "models:net", *DATA, "--sparsity", "1"), "TargetError", ("(0, 1)",)),
])
def test_refusals(command: Command, arguments: tuple[str, ...], kind: str, words: tuple[str, ...]) -> None:
    failed(command(*arguments, "--quiet"), kind, *words)


def test_compare(command: Command, tmp_path: Path) -> None:
    run = done(command("compare", "models:net", *DATA, "--macs", "0.5", "--sparsity", "0.9", "--lr", "0.05", "--out",
                       "r", "--json"))
    original, channels, zeros, pattern = run.data["contenders"]
    assert channels["run_macs"] <= original["run_macs"] / 2
    assert zeros["macs"] == pattern["macs"] == original["macs"] > 5 * zeros["useful_macs"]
    assert all(c["test_accuracy"] is not None for c in run.data["contenders"])
    assert channels["accuracy"] > channels["pruned_accuracy"]
    assert "unstructured, 0.9 zeros: train" in run.err
    assert {"index.html", "pareto.png", "curves.png", "latency.png"} <= {p.name for p in (tmp_path / "r").iterdir()}
