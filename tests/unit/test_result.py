"""Results on disk: saved, loaded both ways, never pickled, replaced whole."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunekern as pk
from prunekern import train as training
from prunekern.errors import ArtefactError, ModelError, TargetError
from prunekern.result import Result
from tests.identity import snapshot


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.max_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1))


class HardCoded(Net):
    """Its own forward cannot run once channels are gone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.max_pool2d(torch.relu(self.bn(self.conv(x))), 2).view(-1, 128))


class Tied(nn.Module):
    """Integer inputs, tied weights, a keyword, a dict out, a transient buffer, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 16)
        self.outer = nn.Linear(16, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, tokens: Tensor, gain: float = 1.0) -> dict[str, Tensor]:
        x = self.embed(tokens)
        x = x + self.drop(self.outer(torch.relu(self.inner(x)))) * gain
        return {"logits": self.head(x) * self.scale, "state": x}


X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4))
TOKENS = torch.arange(8).view(2, 4) + 2


def made(kind: type[nn.Module], inputs: Any = X, **options: Any) -> tuple[nn.Module, Result]:
    torch.manual_seed(1)
    model = kind().eval()
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.endswith(("mean", "var")):
                tensor.uniform_(0.5, 1.5)
    return model, pk.compress(model, inputs, pk.Target(macs=0.5), **options)


def fresh(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(99)
    return kind().eval()


def outputs(model: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(model(*args, **kwargs))


def same(left: Any, right: Any, *args: Any, **kwargs: Any) -> bool:
    pairs = zip(outputs(left, *args, **kwargs), outputs(right, *args, **kwargs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("kind", "form"), [(Net, "class"), (HardCoded, "graph")])
def test_both_ways_back(tmp_path: Path, kind: type[nn.Module], form: str) -> None:
    _, result = made(kind)
    assert result.form == form
    assert result.save(tmp_path / "out") == tmp_path / "out"
    dense = fresh(kind)
    before = snapshot(dense)
    for loaded in (pk.load(tmp_path / "out", model=dense), pk.load(tmp_path / "out")):
        for x in (X, torch.randn(5, 1, 8, 8)):
            assert same(loaded.model, result.model, x)
            assert same(loaded.lowered, result.lowered, x)
        assert {n: (t.shape, t.dtype) for n, t in loaded.model.named_parameters()} == {
            n: (t.shape, t.dtype) for n, t in result.model.named_parameters()}
        assert loaded.plan == result.plan
        assert loaded.steps == result.steps
        assert loaded.report == result.report
        assert loaded.notes == result.notes
        assert not loaded.model.training
    assert snapshot(dense) == before
    assert isinstance(pk.load(tmp_path / "out", model=dense).model, kind if form == "class" else torch.fx.GraphModule)
    assert pk.load(tmp_path / "out").form == "graph"


def test_loaded_networks_train_and_compress_again(tmp_path: Path) -> None:
    _, result = made(Net)
    result.save(tmp_path)
    labels = torch.tensor([0, 1, 2])
    for model in (None, fresh(Net)):
        loaded = pk.load(tmp_path, model).model
        start = loaded.fc.weight.detach().clone()
        training.fit(loaded, (X, labels), epochs=1, lr=0.1, progress=False)
        assert not torch.equal(loaded.fc.weight, start)
        smaller = pk.compress(loaded.eval(), X, pk.Target(macs=0.5))
        assert smaller.plan.costs["macs"][0] == result.plan.costs["macs"][1]


def test_tied_weights_integers_keywords_and_transient_buffers(tmp_path: Path) -> None:
    _, result = made(Tied, {"tokens": TOKENS, "gain": 2.0})
    result.save(tmp_path)
    for model in (None, fresh(Tied)):
        loaded = pk.load(tmp_path, model)
        assert same(loaded.model, result.model, tokens=TOKENS, gain=2.0)
        assert [n for n, _ in loaded.model.named_parameters()].count("embed.weight") == 1
        assert model is None or loaded.model.head.weight is loaded.model.embed.weight
        assert torch.equal(loaded.example.kwargs["tokens"], TOKENS)
        assert loaded.example.kwargs["gain"] == 2.0
        loaded.model.train()
        assert not same(loaded.model, loaded.model, tokens=TOKENS, gain=2.0)     # dropout is alive


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    result = pk.compress(Net().eval().to(dtype), X.to(dtype))
    result.save(tmp_path)
    for model in (None, fresh(Net).to(dtype)):
        loaded = pk.load(tmp_path, model)
        assert {p.dtype for p in loaded.model.parameters()} == {dtype}
        assert same(loaded.model, result.model, X.to(dtype))


def test_training_mode_and_flags_are_kept(tmp_path: Path) -> None:
    model = fresh(Net)
    model.conv.requires_grad_(False)
    result = pk.compress(model, X)
    result.model.train()
    result.save(tmp_path)
    for dense in (None, model):
        loaded = pk.load(tmp_path, dense)
        assert loaded.model.training
        assert {n: p.requires_grad for n, p in loaded.model.named_parameters()} == {
            n: not n.startswith("conv.") for n, _ in model.named_parameters()}


def test_weights_changed_after_compression_are_what_is_saved(tmp_path: Path) -> None:
    _, result = made(Net)
    with torch.no_grad():
        result.model.fc.bias.add_(1)
    result.save(tmp_path)
    assert same(pk.load(tmp_path).model, result.model, X)
    assert same(pk.load(tmp_path, fresh(Net)).model, result.model, X)


def test_result_without_a_lowered_network(tmp_path: Path) -> None:
    _, result = made(Net, lower=False)
    result.save(tmp_path)
    assert pk.load(tmp_path).lowered is None


def test_older_result_with_more_files_is_replaced(tmp_path: Path) -> None:
    made(Net)[1].save(tmp_path)
    _, result = made(HardCoded, lower=False)
    result.save(tmp_path)
    loaded = pk.load(tmp_path)
    assert loaded.lowered is None
    assert same(loaded.model, result.model, X)


def test_steps_and_metrics(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1, 2])
    _, result = made(Net, train=(X, labels), validate=(X, labels), steps=2, fit={"epochs": 1}, recalibrate=True)
    result.save(tmp_path)
    loaded = pk.load(tmp_path)
    assert loaded.steps == result.steps
    assert len(loaded.steps) == 2
    assert loaded.metrics == result.metrics
    assert loaded.proof == result.proof


def test_nothing_is_pickled(tmp_path: Path) -> None:
    made(Net)[1].save(tmp_path)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors"
            assert load_file(path)
        with pytest.raises((pickle.UnpicklingError, EOFError, KeyError, IndexError, ValueError, AttributeError)):
            pickle.loads(path.read_bytes())


def test_the_folder_holds_what_is_named_and_nothing_else(tmp_path: Path) -> None:
    made(Net)[1].save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {*manifest["files"], "manifest.json"}


def test_files_beside_it_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    made(Net)[1].save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    """The class has changed since: another buffer, of which the artefact knows nothing."""
    class Later(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("extra", torch.zeros(2))
    made(Net)[1].save(tmp_path)
    with pytest.raises((ArtefactError, pk.core.plan.PlanError), match=r"extra|another model"):
        pk.load(tmp_path, Later().eval())


def test_fine_tuned_model_is_saved_with_its_own_program(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    x = torch.randn(2, 3, 6, 6)
    result = pk.compress(model, x)
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.mul_(1.5)
    result.model.train()
    result.save(tmp_path)
    assert result.model.training
    back = pk.load(tmp_path)
    torch.testing.assert_close(back.lowered(x), back.model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.model(x), result.model(x), rtol=1e-5, atol=1e-5)


def test_fresh_models_are_in_training_mode_and_load_all_the_same(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    x = torch.randn(2, 3, 6, 6)
    result = pk.compress(make().eval(), x)
    result.save(tmp_path)
    fresh = make()
    back = pk.load(tmp_path, model=fresh)
    assert fresh.training
    assert not back.model.training
    torch.testing.assert_close(back.model(x), result.model(x))
    with pytest.raises(ModelError, match="tuple"):
        pk.load(tmp_path, model=(fresh, x))  # type: ignore[arg-type]


def test_plan_files_names_and_samples_are_taken(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(2, 6)
    pruned = pk.prune(model, x, pk.Target(macs=0.8), ignore="0")
    assert pruned.model[0].out_features == 8
    pruned.plan.save(tmp_path / "plan.json")
    again = pk.apply_plan(model, x, tmp_path / "plan.json")
    torch.testing.assert_close(again.model(x), pruned.model(x))
    assert "linear" in str(pk.lower(model, x).explain()).lower()
    with pytest.raises(TargetError, match=r"Target\(macs=0.5\)"):
        pk.compress(model, x, 0.5)  # type: ignore[arg-type]
