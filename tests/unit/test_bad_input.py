"""What cannot work is refused with a typed error that says where, what and what to do, and the model stays as it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern.core.plan import Plan
from prunekern.errors import (
    ArtefactError,
    InputError,
    ModelError,
    PlanError,
    PrunekernError,
    TargetError,
    TraceError,
    UnknownName,
)
from prunekern.prune.edit import edit_plan
from tests.identity import snapshot

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """conv - bn - relu - conv - relu - pool - linear, on 3x8x8 images."""

    def __init__(self, width: int = 6, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 8, 3, padding=1, groups=groups)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


class Raises(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four channels or nothing")
        return super().forward(x)


class Item(Net):
    """Reads a value out of a tensor: no graph can hold that."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        rows = int(x.abs().sum().item()) % 3 + 1
        return self.fc(torch.relu(self.conv2(x[:, :, :rows])).mean((2, 3)))


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def net(**options: Any) -> Net:
    return Net(**options).eval()


def refused(kind: type[PrunekernError], *words: str, model: Any, call: Callable[[], Any]) -> PrunekernError:
    """``call`` raises exactly ``kind``, its text has every word, and the model is bit-identical."""
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(PrunekernError) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    if before is not None:
        assert snapshot(model) == before
    return caught.value


# ---- the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", ["resnet50", Net, None, 5, lambda x: x],
                         ids=["string", "class", "nothing", "number", "function"])
def test_no_module(thing: Any) -> None:
    for call in (pk.compress, pk.prune, pk.lower, pk.profile, pk.trace, pk.groups_of):
        refused(ModelError, type(thing).__name__, "not a torch.nn.Module", "pass the module itself", model=thing,
                call=lambda call=call: call(thing, X))


def test_model_in_training_mode() -> None:
    model = Net()
    for call in (pk.compress, pk.prune, pk.lower, pk.profile):
        refused(ModelError, "training mode", "model.eval()", model=model, call=lambda call=call: call(model, X))


@pytest.mark.parametrize(("name", "where"), [("conv1.weight", (0, 0, 0, 0)), ("bn.running_var", (2,))])
def test_nan_weights(name: str, where: tuple[int, ...]) -> None:
    model = net()
    dict([*model.named_parameters(), *model.named_buffers()])[name].data[where] = float("nan")
    refused(ModelError, repr(name), "NaN", "repair", model=model, call=lambda: pk.compress(model, X))


def test_infinity_is_no_nan() -> None:
    """A mask of minus infinity is a fine buffer."""
    model = net()
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    assert pk.compress(model, X, lower=False).plan.costs["macs"][1] > 0


def test_meta_model() -> None:
    with torch.device("meta"):
        model = net()
    refused(ModelError, "'conv1.weight'", "meta device", "load the weights", model=model,
            call=lambda: pk.compress(model, X))


def test_model_on_two_devices() -> None:
    model = net()
    model.fc.to("meta")
    refused(ModelError, "'fc.weight'", "meta", model=model, call=lambda: pk.compress(model, X))


def test_inputs_on_another_device() -> None:
    model = net()
    refused(InputError, "args[0]", "is on meta, the model on cpu", ".to(", model=model,
            call=lambda: pk.compress(model, X.to("meta")))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensor() -> None:
    model = net()
    model.register_buffer("codes", torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8))
    refused(ModelError, "'codes'", "quantised", "float model", model=model, call=lambda: pk.compress(model, X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_module() -> None:
    supported = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if not supported:
        pytest.skip("this torch has no quantised engine")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    refused(ModelError, "quantised", "float model", model=model, call=lambda: pk.compress(model, torch.randn(2, 4)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models() -> None:
    scripted = torch.jit.trace(net(), X)
    refused(ModelError, "scripted", "original nn.Module", model=None, call=lambda: pk.compress(scripted, X))


# ---- inputs --------------------------------------------------------------------------------------------------


def test_inputs_missing_and_not_inferable() -> None:
    model = net()
    refused(InputError, "example inputs are missing", "Conv2d", "pass one batch", model=model,
            call=lambda: pk.compress(model))


def test_inputs_that_fail_in_forward() -> None:
    model = Raises().eval()
    error = refused(InputError, "Raises.forward fails", "(2, 3, 8, 8)", "ValueError", "four channels or nothing",
                    "Pass inputs", model=model, call=lambda: pk.compress(model, X))
    chain = "".join(traceback.format_exception(error))
    assert isinstance(error.__cause__, ValueError)
    assert 'raise ValueError("four channels or nothing")' in chain      # the line of the user's own code


@pytest.mark.parametrize("inputs", [torch.randn(2, 3, 8), torch.randn(2, 3, 8, 8, dtype=torch.float64)],
                         ids=["rank", "dtype"])
def test_inputs_the_layers_refuse(inputs: Tensor) -> None:
    model = net()
    if inputs.dim() == 3:
        inputs = torch.randn(2, 5, 8, 8)
    refused(InputError, "Net.forward fails", "RuntimeError", model=model, call=lambda: pk.compress(model, inputs))


@pytest.mark.parametrize("inputs", [(X, X), {"image": X}], ids=["too many", "unknown keyword"])
def test_inputs_that_do_not_fit_the_signature(inputs: Any) -> None:
    model = net()
    refused(InputError, "Net.forward does not take these inputs", "tuple", model=model,
            call=lambda: pk.compress(model, inputs))


@pytest.mark.parametrize("inputs", ["cat.png", 3, (None,)], ids=str)
def test_inputs_without_a_tensor(inputs: Any) -> None:
    model = net()
    refused(InputError, "no tensor", model=model, call=lambda: pk.compress(model, inputs))


def test_empty_loader() -> None:
    model = net()
    refused(InputError, "loader is empty", model=model, call=lambda: pk.compress(model, calibrate=[]))


@pytest.mark.parametrize("kind", [Item, Branch])
def test_data_dependent_control_flow(kind: type[Net]) -> None:
    model = kind().eval()
    refused(TraceError, kind.__name__, "test_bad_input.py", "depends on the data", "compress the submodules",
            model=model, call=lambda: pk.compress(model, X))


# ---- targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.5, 0, -0.5, float("nan"), "half"], ids=str)
@pytest.mark.parametrize("name", ["macs", "params", "bytes", "accuracy"])
def test_target_that_is_no_share(name: str, value: Any) -> None:
    refused(TargetError, f"{name}={value!r}", "(0, 1]", "what remains", model=None,
            call=lambda: pk.Target(**{name: value}))


@pytest.mark.parametrize("share", [1.5, 0, -1])
def test_layer_share_that_is_none(share: float) -> None:
    refused(TargetError, "layers['conv1']", "(0, 1]", model=None, call=lambda: pk.Target(layers={"conv1": share}))


@pytest.mark.parametrize("points", [-1, 101])
def test_drop_that_is_no_number_of_points(points: float) -> None:
    refused(TargetError, f"max_drop={points}", "0 to 100", model=None, call=lambda: pk.Target(max_drop=points))


def test_target_that_asks_for_nothing() -> None:
    refused(TargetError, "asks for nothing", "Target(macs=0.5)", model=None, call=pk.Target)


@pytest.mark.parametrize("name", ["macs", "params", "bytes"])
def test_target_out_of_reach_says_what_is_reachable(name: str) -> None:
    model = net()
    error = refused(TargetError, f"{name}=0.0001", "out of reach", "keeps", "ignore less", model=model,
                    call=lambda: pk.compress(model, X, pk.Target(**{name: 0.0001})))
    reachable = float(str(error).partition(f"{name} 0.")[2].partition(" ")[0]) / 1000
    result = pk.compress(model, X, pk.Target(**{name: reachable + 0.001}), lower=False)
    before, after = result.plan.costs[name]
    assert after / before == pytest.approx(reachable, abs=0.001)


def test_target_out_of_reach_because_of_ignore() -> None:
    model = net()
    refused(TargetError, "macs=0.3", "out of reach", model=model,
            call=lambda: pk.compress(model, X, pk.Target(macs=0.3), ignore=["conv1"]))


def test_contradictory_combinations() -> None:
    refused(TargetError, "one=", "does not combine", model=None, call=lambda: pk.Target(one="conv1", macs=0.5))
    model = net()
    # With conv1 and conv2 whole, nothing can bring the MACs down.
    refused(TargetError, "macs=0.2", "out of reach", model=model, call=lambda: pk.compress(
        model, X, pk.Target(macs=0.2), ignore=["conv1", "conv2"]))
    refused(TargetError, "steps", "shares", model=model,
            call=lambda: pk.compress(model, X, pk.Target(one="conv1"), steps=3))
    plan = edit_plan(pk.groups_of(model, X), remove={"conv1": [0]})
    refused(TargetError, "plan=", "target=", "drop one", model=model,
            call=lambda: pk.compress(model, X, pk.Target(macs=0.5), plan=plan))


def test_accuracy_without_a_way_to_measure_it() -> None:
    model = net()
    for target in (pk.Target(accuracy=0.9), pk.Target(max_drop=1)):
        refused(TargetError, "validate=", model=model, call=lambda target=target: pk.compress(model, X, target))


def test_accuracy_that_the_original_does_not_have() -> None:
    model = net()
    refused(TargetError, "0.9", "above the original", "0.5", model=model,
            call=lambda: pk.compress(model, X, pk.Target(accuracy=0.9), validate=lambda m: 0.5))


def test_combination_whose_accuracy_is_out_of_reach() -> None:
    model = net()
    refused(TargetError, "out of reach", "0.1000", "train=", model=model, call=lambda: pk.compress(
        model, X, pk.Target(macs=0.5, max_drop=1), validate=lambda m: 0.8 if m is model else 0.1))


@pytest.mark.parametrize("number", [0, -1])
def test_steps(number: int) -> None:
    model = net()
    refused(TargetError, f"steps={number}", "at least 1", model=model,
            call=lambda: pk.compress(model, X, steps=number))


@pytest.mark.parametrize("pattern", ["conv3", "backbone.*", ""])
def test_ignore_that_matches_nothing(pattern: str) -> None:
    model = net()
    refused(TargetError, f"ignore={pattern!r}", "conv1, conv2", model=model,
            call=lambda: pk.compress(model, X, ignore=["conv1", pattern]))


def test_layers_that_match_nothing() -> None:
    model = net()
    refused(TargetError, "layers['conv7']", "conv1, conv2", model=model,
            call=lambda: pk.compress(model, X, pk.Target(layers={"conv7": 0.5})))
    refused(TargetError, "one='*'", "names 2", model=model, call=lambda: pk.compress(model, X, pk.Target(one="*")))


def test_nothing_to_prune() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    refused(InputError, "no prunable channels", model=model, call=lambda: pk.compress(model, torch.randn(2, 4)))


# ---- names ---------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_known() -> None:
    model = net()
    refused(UnknownName, "'l3'", "l1", "l2", "taylor", "fpgm", model=model,
            call=lambda: pk.compress(model, X, criterion="l3"))
    for call in (lambda: pk.compress(model, X, backend="tpu"), lambda: pk.lower(model, X, backend="tpu")):
        refused(UnknownName, "'tpu'", "auto", "reference", model=model, call=call)
    for option, known in (("reduction", "mean"), ("normalisation", "gauss"), ("direction", "minimum")):
        refused(UnknownName, option, "'best'", known, model=model,
                call=lambda option=option: pk.compress(model, X, **{option: "best"}))
    refused(TargetError, "ranking='best'", "'global', 'layer'", model=model,
            call=lambda: pk.compress(model, X, ranking="best"))


def test_unknown_backend_is_refused_before_any_work() -> None:
    model, told = net(), []
    refused(UnknownName, "'tpu'", model=model, call=lambda: pk.compress(model, X, backend="tpu", tell=told.append))
    assert told == []


def test_unknown_training_option_is_refused_before_any_work() -> None:
    model, told = net(), []
    data = X, torch.tensor([0, 1])
    refused(InputError, "'epoch'", "epochs", model=model,
            call=lambda: pk.compress(model, train=data, fit={"epoch": 2}, tell=told.append))
    assert "step 1/1: prune" not in told


def test_recalibration_without_data() -> None:
    model = net()
    refused(InputError, "recalibrate=True", "calibrate=", model=model,
            call=lambda: pk.compress(model, X, recalibrate=True))


# ---- plans ---------------------------------------------------------------------------------------------------


def test_plan_of_another_model() -> None:
    model, plan = net(), edit_plan(pk.groups_of(net(width=7), X), remove={"conv1": [0]})
    for call in (lambda: pk.apply_plan(model, X, plan), lambda: pk.compress(model, X, plan=plan)):
        refused(PlanError, plan.graph, "another model", "make a plan for this model", model=model, call=call)


def _edited(model: nn.Module, change: Callable[[dict[str, dict[int, list[Any]]]], None]) -> Plan:
    plan = edit_plan(pk.groups_of(model, X), remove={"conv1": [1]})
    kept = {name: {axis: list(rows) for axis, rows in axes.items()} for name, axes in plan.kept.items()}
    change(kept)
    return plan.edited(kept=kept)


@pytest.mark.parametrize(("change", "words"), [
    (lambda kept: kept["conv1.weight"].update({0: []}), ("plan.kept['conv1.weight'][0]", "at least one")),
    (lambda kept: kept["conv1.weight"].update({0: [0, 99]}), ("plan.kept['conv1.weight'][0]", "0 to 5")),
    (lambda kept: kept["conv1.weight"].update({0: [0, 0]}), ("plan.kept['conv1.weight'][0]", "different")),
    (lambda kept: kept["conv1.weight"].update({0: [0, 1]}), ("conv1", "leave together")),
    (lambda kept: kept.update({"fc.weight": {0: [0, 1]}}), ("must stay", "doctor")),
    (lambda kept: kept.update({"conv9.weight": {0: [0]}}), ("plan.kept['conv9.weight'][0]", "no such axis")),
], ids=["nothing kept", "out of range", "twice", "half a family", "output", "no such layer"])
def test_plan_that_contradicts_itself(change: Any, words: tuple[str, ...]) -> None:
    model = net()
    plan = _edited(model, change)
    refused(PlanError, *words, model=model, call=lambda: pk.apply_plan(model, X, plan))


def test_zero_channels() -> None:
    """No way of asking leaves a layer without channels."""
    model = net()
    groups = pk.groups_of(model, X)
    refused(PlanError, "no channel", "at least one", model=model,
            call=lambda: edit_plan(groups, remove={"conv1": range(6)}))
    small = pk.compress(model, X, pk.Target(layers={"*": 1e-6}), lower=False)
    assert (small.model.conv1.out_channels, small.model.conv2.out_channels) == (1, 1)
    refused(InputError, "no prunable channels", "only one", "doctor", model=small.model,
            call=lambda: pk.compress(small.model, X, pk.Target(layers={"*": 0.5})))


@pytest.mark.parametrize(("remove", "words"), [
    ({"conv9": [0]}, ("'conv9'", "conv1, conv2")),
    ({"conv1": [6]}, ("'conv1'", "channel 6", "0 to 5")),
    ({"conv1": [-1]}, ("channel -1",)),
    ({"conv1": ["0"]}, ("channel '0'",)),
    ({"fc": [0]}, ("channel 0", "must stay", "doctor")),
], ids=str)
def test_edit_that_names_what_is_not_there(remove: Any, words: tuple[str, ...]) -> None:
    model = net()
    groups = pk.groups_of(model, X)
    refused(PlanError, *words, model=model, call=lambda: edit_plan(groups, remove=remove))


def test_edit_of_half_a_row() -> None:
    model = net(groups=2)
    groups = pk.groups_of(model, X)
    refused(PlanError, "as many channels in each group", "[2, 3]", model=model,
            call=lambda: edit_plan(groups, remove={"conv1": [0]}))
    even = edit_plan(groups, remove={"conv1": [0, 5]})
    assert pk.apply_plan(model, X, even).model.conv1.out_channels == 4


def test_edit_that_contradicts_itself() -> None:
    model = net()
    groups = pk.groups_of(model, X)
    refused(PlanError, "remove and keep", "1 of 'conv1'", model=model,
            call=lambda: edit_plan(groups, remove={"conv1": [1]}, keep={"conv1": [1, 2]}))


@pytest.mark.parametrize(("content", "words"), [
    ("{", ("cannot be read",)), ("[]", ("not a prunekern plan",)),
    (json.dumps({"format": "prunekern-plan", "version": 99}), ("version 99", "version 1")),
    (json.dumps({"format": "prunekern-plan", "version": 1, "graph": "x", "kept": 3}), ("damaged",)),
], ids=["no JSON", "no plan", "other version", "damaged"])
def test_plan_file(tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    refused(PlanError, *words, model=None, call=lambda: Plan.load(path))
    refused(PlanError, "gone.json", model=None, call=lambda: Plan.load(tmp_path / "gone.json"))


# ---- artefacts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    folder: Path
    model: nn.Module


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(0)
    model, folder = net(), tmp_path_factory.mktemp("artefact")
    pk.compress(model, X).save(folder)
    return Saved(folder, model)


FILES = ("manifest.json", "plan.json", "weights.safetensors", "graph.json", "graph.safetensors", "report.json",
         "program/program.json", "program/weights-*.safetensors")


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "emptied":
        data = bytearray()
    else:
        data[{"first byte": 0, "middle byte": len(data) // 2, "last byte": -1}[how]] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "emptied", "first byte", "middle byte", "last byte"])
@pytest.mark.parametrize("pattern", FILES)
def test_damaged_artefact(artefact: Saved, tmp_path: Path, pattern: str, how: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artefact.folder, folder)
    (path,) = folder.glob(pattern)
    _damage(path, how)
    for model in (None, artefact.model):
        error = refused(ArtefactError, str(folder), model=artefact.model,
                        call=lambda model=model: pk.load(folder, model))
        assert "save it again" in str(error) or "Result.save" in str(error) or "version" in str(error)


def test_every_file_of_an_artefact_is_tried_above(artefact: Saved) -> None:
    found = {p.relative_to(artefact.folder) for p in artefact.folder.rglob("*") if p.is_file()}
    assert found == {p.relative_to(artefact.folder) for pattern in FILES for p in artefact.folder.glob(pattern)}


def test_every_byte_of_the_manifest_counts(artefact: Saved, tmp_path: Path) -> None:
    """The digests are worth as much as the file that holds them."""
    folder = tmp_path / "copy"
    shutil.copytree(artefact.folder, folder)
    path = folder / "manifest.json"
    good = path.read_bytes()
    whole = json.loads(good)
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 4
        try:
            if json.loads(bad) == whole:
                continue                      # white space
        except ValueError:
            pass
        path.write_bytes(bad)
        with pytest.raises(ArtefactError):
            pk.load(folder)


def test_artefact_of_another_version_or_kind(artefact: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artefact.folder, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 2}))
    refused(ArtefactError, "version 2", "reads", "version 1", model=None, call=lambda: pk.load(folder))
    path.write_text(json.dumps({**manifest, "format": "another"}))
    refused(ArtefactError, "'another'", model=None, call=lambda: pk.load(folder))
    path.write_text("[]")
    refused(ArtefactError, "damaged", model=None, call=lambda: pk.load(folder))


def test_folder_without_an_artefact(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        refused(ArtefactError, str(folder), "no saved result", "Result.save", model=None,
                call=lambda folder=folder: pk.load(folder))


def test_artefact_of_another_model(artefact: Saved) -> None:
    other = net(width=7)
    refused(PlanError, "another model", model=other, call=lambda: pk.load(artefact.folder, other))


# ---- a full disk ---------------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def two(artefact: Saved, tmp_path: Path) -> tuple[Any, Path, Any]:
    """(a new result, the folder of an older one, its outputs)."""
    folder = tmp_path / "out"
    shutil.copytree(artefact.folder, folder)
    new = pk.compress(artefact.model, X, pk.Target(macs=0.3))
    with torch.no_grad():
        return new, folder, pk.load(folder).model(X)


def _still_there(folder: Path, before: dict[str, bytes], outputs: Tensor) -> None:
    assert _files(folder) == before                     # no half-written file is left either
    with torch.no_grad():
        assert torch.equal(pk.load(folder).model(X), outputs)


@pytest.mark.parametrize("survive", [0, 1, 2, 5, 7])
def test_disk_full_while_files_are_put_in_place(two: Any, survive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    new, folder, outputs = two
    before, replace, left = _files(folder), os.replace, [survive]

    def limited(source: Any, target: Any) -> None:
        if Path(target).resolve().is_relative_to(folder) and ".saving-" not in str(target):
            if not left[0]:
                _no_space()
            left[0] -= 1
        replace(source, target)
    monkeypatch.setattr(os, "replace", limited)
    refused(ArtefactError, str(folder), "No space left", "still there", "free some space", model=new.model,
            call=lambda: new.save(folder))
    monkeypatch.undo()
    _still_there(folder, before, outputs)
    new.save(folder)
    assert pk.load(folder).plan.kept == new.plan.kept


@pytest.mark.parametrize("method", ["write_text", "write_bytes", "mkdir"])
def test_disk_full_while_files_are_written(two: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new, folder, outputs = two
    before = _files(folder)
    monkeypatch.setattr(Path, method, _no_space)
    refused(ArtefactError, str(folder), "No space left", model=new.model, call=lambda: new.save(folder))
    monkeypatch.undo()
    _still_there(folder, before, outputs)


def test_folder_that_cannot_be_made(two: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(ArtefactError, str(tmp_path / "file"), "another folder", model=None,
            call=lambda: two[0].save(tmp_path / "file"))


def test_disk_full_while_a_plan_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    groups = pk.groups_of(net(), X)
    first, second = (edit_plan(groups, remove={"conv1": [i]}) for i in (0, 1))
    first.save(path)
    monkeypatch.setattr(os, "replace", _no_space)
    refused(ArtefactError, "plan.json", "No space left", model=None, call=lambda: second.save(path))
    monkeypatch.undo()
    assert Plan.load(path).kept == first.kept
    assert list(tmp_path.iterdir()) == [path]


# ---- what is odd, and yet right ------------------------------------------------------------------------------


def test_no_op_is_said() -> None:
    model = net()
    result = pk.compress(model, X, pk.Target(macs=1.0))
    assert result.plan.costs["macs"][0] == result.plan.costs["macs"][1]
    assert any("nothing was removed" in note for note in result.notes)
    assert any("nothing was removed" in note for note in result.report.notes)
    assert "nothing was removed" in str(result)


def test_frozen_model_is_pruned_and_stays_frozen() -> None:
    model = net()
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    before = snapshot(model)
    result = pk.compress(model, X, pk.Target(macs=0.5))
    assert snapshot(model) == before
    assert result.plan.costs["macs"][1] <= 0.5 * result.plan.costs["macs"][0]
    assert {name: p.requires_grad for name, p in result.model.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()}


def test_hooks_are_kept() -> None:
    model, seen = net(), []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    before = snapshot(model)
    result = pk.compress(model, X, pk.Target(layers={"conv1": 0.5}), lower=False)
    assert result.form == "class"
    seen.clear()
    result.model(X)
    assert seen == [(2, 3, 8, 8)]
    assert snapshot(model) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    before = snapshot(model)
    result = pk.compress(model, X.to(dtype), pk.Target(macs=0.5))
    assert snapshot(model) == before
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.model(X.to(dtype)).dtype == dtype
    assert result.lowered(X.to(dtype)).dtype == dtype
    assert result.plan.costs["macs"][1] <= 0.5 * result.plan.costs["macs"][0]


def test_modes_of_submodules_are_kept() -> None:
    model = net()
    result = pk.compress(model, X, lower=False)
    assert not any(module.training for module in result.model.modules())
