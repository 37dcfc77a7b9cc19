"""Unstructured and N:M masks: exact counts, ties, what is refused; the sparse file bit for bit."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from prunekern.errors import ArtefactError, BackendUnavailable, InputError, ModelError, TargetError
from prunekern.prune import semi_structured, sparse_file
from prunekern.prune.semi_structured import follows, to_semi_structured, unavailable
from prunekern.prune.sparse import Masks, imposed, magnitude, masked, nm, prunable, zeros_of
from prunekern.prune.sparse_file import load_sparse, save_sparse, sizes
from prunekern.train import FixedMasks, fine_tune
from tests.training import blobs, figures, network, same, train
from tests.unit.test_train_resume import StopHereError, kill_after


def small() -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 7, 3), bn=nn.BatchNorm2d(7), flat=nn.Flatten(),
                                     fc1=nn.Linear(7 * 16, 13), fc2=nn.Linear(13, 5)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def raw(value: Tensor) -> bytes:
    return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if value.numel() else b""


# ---- magnitude -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.5, 0.9, 0.999])
def test_each_layer_loses_the_nearest_whole_number(share: float) -> None:
    model = small()
    masks = magnitude(model, share)
    assert masks.removed() == {name: math.floor(share * p.numel() + 0.5) for name, p in prunable(model).items()}
    assert set(masks.kept) == {"conv.weight", "fc1.weight", "fc2.weight"}
    for name, parameter in prunable(model).items():
        size, kept = parameter.detach().abs(), masks.kept[name]
        if 0 < masks.removed()[name] < size.numel():
            assert size[~kept].max() <= size[kept].min()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_globally_the_smallest_anywhere_go(share: float) -> None:
    model = small()
    with torch.no_grad():
        model.fc1.weight *= 3
    masks = magnitude(model, share, scope="global")
    assert masks.zeros == math.floor(share * masks.weights + 0.5)
    sizes = torch.cat([p.detach().abs().reshape(-1) for p in prunable(model).values()])
    kept = torch.cat([mask.reshape(-1) for mask in masks.kept.values()])
    assert sizes[~kept].max() <= sizes[kept].min()
    if share == 0.1:
        assert masks.removed()["fc1.weight"] / 1456 < 0.1 < masks.removed()["conv.weight"] / 189


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_among_equals_the_first_go(scope: str) -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
        model[1].weight.fill_(1.0)
    masks = magnitude(model, 0.5, scope=scope)  # type: ignore[arg-type]
    first, second = (mask.reshape(-1).tolist() for mask in masks.kept.values())
    if scope == "layer":
        assert first == [False] * 4 + [True] * 4
        assert second == [False] * 3 + [True] * 3
    else:
        assert first == [False] * 7 + [True]
        assert all(second)


def test_shares_per_layer_the_first_glob_counts() -> None:
    masks = magnitude(small(), {"fc2": 0.2, "fc*": 0.6})
    assert masks.removed() == {"fc1.weight": 874, "fc2.weight": 13}     # 0.6 * 1456 = 873.6
    assert "conv.weight" not in masks.kept
    assert set(magnitude(small(), 0.5, layers="fc*", ignore="fc2.weight").kept) == {"fc1.weight"}


def test_half_precision_and_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(torch.bfloat16)
    model[1].weight = model[0].weight
    masks = magnitude(model, 0.5)
    assert list(masks.kept) == ["0.weight"]
    made = masked(model, masks)
    assert int((made[1].weight == 0).sum()) == 18
    assert made[0].weight is made[1].weight


def test_the_model_is_never_modified() -> None:
    model = small()
    before = state(model)
    masks = magnitude(model, 0.7)
    made = masked(model, masks)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    for name, kept in masks.kept.items():
        found = made.state_dict()[name]
        assert torch.equal(found[kept], before[name][kept])
        assert raw(found[~kept]) == bytes(4 * int((~kept).sum()))       # plain zeros, no -0.0


    def fails() -> None:
        with imposed(model, masks) as running:
            assert running is model
            assert same(model, made)
            raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_masks_of_zeros_and_text() -> None:
    made = masked(small(), magnitude(small(), 0.5))
    again = zeros_of(made)
    assert again.zeros == sum(int((p == 0).sum()) for p in prunable(made).values())
    assert again.sparsity == pytest.approx(0.5, abs=0.01)
    assert f"{again.zeros:,}" in str(again)
    gone = magnitude(nn.Linear(2, 2), 0.95)
    assert gone.zeros == 4
    assert "nothing is left of weight" in str(gone)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2, math.nan, True, "half", {"fc1": 1.5}, {"fc9": 0.5}])
def test_impossible_shares(share: object) -> None:
    with pytest.raises(TargetError, match="sparsity="):
        magnitude(small(), share)  # type: ignore[arg-type]


def test_what_is_refused() -> None:
    model = small()
    with pytest.raises(TargetError, match=r"layers='fc9' matches no weight; there are: conv\.weight"):
        magnitude(model, 0.5, layers=["fc9"])
    with pytest.raises(TargetError, match="scope='all'"):
        magnitude(model, 0.5, scope="all")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="contradict"):
        magnitude(model, {"fc1": 0.5}, scope="global")
    with pytest.raises(ModelError, match="no weights to prune"):
        magnitude(nn.BatchNorm1d(3), 0.5)
    with pytest.raises(ModelError, match="is not a torch"):
        magnitude(lambda x: x, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="meta device"):
        magnitude(nn.Linear(3, 3, device="meta"), 0.5)
    with pytest.raises(ModelError, match="fit the model they were made for"):
        masked(nn.Linear(3, 3), magnitude(nn.Linear(3, 4), 0.5))
    with torch.no_grad():
        model.fc1.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"fc1\.weight holds values that are not finite"):
        magnitude(model, 0.5)
    assert "fc1.weight" not in magnitude(model, 0.5, ignore=["fc1"]).kept


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("wrap", "remedy"), [
    (nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
    (nn.utils.weight_norm, "remove_weight_norm"), (nn.utils.spectral_norm, "remove_spectral_norm"),
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove")])
def test_weights_that_the_forward_computes(wrap: object, remedy: str) -> None:
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 2))  # type: ignore[operator]
    with pytest.raises(ModelError, match=remedy):
        magnitude(model, 0.5)
    assert list(magnitude(model, 0.5, ignore="0*").kept) == ["1.weight"]


# ---- N:M -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
@pytest.mark.parametrize("width", [4, 7, 8, 13, 1, 2])
def test_nm_keeps_the_largest_of_each_block(n: int, m: int, width: int) -> None:
    layer = nn.Linear(width, 6)
    kept = nm(layer, n, m).kept["weight"]
    for row, mask in zip(layer.weight.detach().abs(), kept, strict=True):
        for start in range(0, width, m):
            block, stays = row[start:start + m], mask[start:start + m]
            expected = min(n, len(block))
            assert int(stays.sum()) == expected
            assert set(stays.nonzero()[:, 0].tolist()) == set(block.topk(expected).indices.tolist())
    assert follows(masked(layer, nm(layer, n, m)).weight, n, m)
    if width >= m:
        assert not follows(layer.weight, n, m)


@pytest.mark.parametrize(("layer", "summed"), [
    (nn.Conv2d(9, 4, 3), lambda w: w.movedim(1, -1)),
    (nn.Conv2d(12, 4, 1, groups=2), lambda w: w.movedim(1, -1)),
    (nn.ConvTranspose2d(9, 4, 3), lambda w: w.movedim(0, -1)),
    (nn.ConvTranspose2d(10, 4, 3, groups=2), lambda w: w.reshape(2, 5, 2, 3, 3).movedim(1, -1)),
], ids=["conv", "grouped", "transposed", "grouped transposed"])
def test_nm_lies_along_what_is_summed_over(layer: nn.Module, summed: object) -> None:
    made = masked(layer, nm(layer))
    assert follows(summed(made.weight), 2, 4)  # type: ignore[operator]
    blocks = summed(made.weight).shape[-1]  # type: ignore[operator]
    per_row = 2 * (blocks // 4) + min(2, blocks % 4)
    assert int((made.weight != 0).sum()) == made.weight.numel() // blocks * per_row


def test_nm_ties_and_numbers() -> None:
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    assert nm(layer).kept["weight"].tolist() == [[False, False, True, True] * 2]
    for n, m in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(InputError, match=f"n={n}, m={m}"):
            nm(layer, n, m)


def test_execution_needs_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    assert "on cpu" in str(unavailable("cpu"))
    with pytest.raises(BackendUnavailable, match="need no GPU"):
        to_semi_structured(model)
    with pytest.raises(ModelError, match="no linear layer"):
        to_semi_structured(nn.Conv2d(3, 3, 3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    assert "sm_70" in str(unavailable("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert unavailable("cuda") is None


def test_layers_that_cannot_run_sparse_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which layers are handed to torch, with its conversion replaced: the real one is in tests/gpu."""
    monkeypatch.setattr(semi_structured, "unavailable", lambda device: None)
    asked: list[tuple[int, ...]] = []

    def convert(weight: Tensor) -> Tensor:
        asked.append(tuple(weight.shape))
        if weight.shape[0] % 32:
            raise RuntimeError("Both dimensions must be a multiple of (32, 64)\nmore")
        return weight
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 5), nn.Linear(64, 64)).half().append(nn.Linear(64, 64))
    masks = nm(model, layers=["0", "1", "3"])
    before = state(model)
    found = to_semi_structured(masked(model, masks))
    assert found.converted == ("0",)
    assert asked == [(64, 64), (5, 64)]
    assert list(found.left) == ["1", "2", "3"]
    for name, word in {"1": "multiple of (32, 64)", "2": "not 2:4", "3": "float32"}.items():
        assert word in found.left[name]
    assert not found.model[0].weight.requires_grad
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ModelError, match="0: its weights are not 2:4"):
        to_semi_structured(model)


# ---- training under masks --------------------------------------------------------------------------------------------


OPTIMIZERS: list[dict[str, Any]] = [
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, {"lr": 0.05, "nesterov": True, "ema": 0.9},
    {"lr": 0.01, "optimizer": "adamw", "weight_decay": 0.1, "clip": 1.0}, {"lr": 0.02, "patience": 2}]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_masks_survive_training(options: dict[str, Any]) -> None:
    model = network()
    masks = magnitude(model, 0.6)
    before = state(model)
    moments: list[bool] = []

    def look(module: nn.Module) -> None:
        moments.append(all(not bool(p.detach()[gone].any()) for p, gone in masks.pairs(module)))
    history = fine_tune(model, masks, blobs(), blobs(30, 2), epochs=4, batch_size=16, progress=False, before_step=look,
                        **options)
    assert moments == [True] * 6 * len(history)
    assert history.epochs[-1].loss < history.epochs[0].loss
    for name, kept in masks.kept.items():
        found = model.state_dict()[name]
        assert not found[~kept].any()
        assert (found[kept] != before[name][kept]).all()


def test_momentum_of_an_earlier_mask_does_not_come_through() -> None:
    """What the gradient alone would not stop: the optimizer moves a weight that has none."""
    model = network()
    masks = magnitude(model, 0.6)
    masks.impose(model)
    keeper = FixedMasks(masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
        parameter.grad = torch.ones_like(parameter)
    keeper.before_step(model)
    for name, parameter in prunable(model).items():
        assert torch.equal(parameter.grad != 0, masks.kept[name])
    optimizer.step()
    assert any(bool(p.detach()[gone].any()) for p, gone in masks.pairs(model))
    keeper.after_step(model)
    assert not any(bool(p.detach()[gone].any()) for p, gone in masks.pairs(model))


def test_the_loop_restores_masks_after_every_step() -> None:
    """Gradients that come in after the masks have cleared them: only what follows the step can put that right."""
    model = network()
    masks = magnitude(model, 0.6)

    def push(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    fine_tune(model, masks, blobs(), epochs=1, lr=0.01, batch_size=16, progress=False, before_step=push)
    assert zeros_of(model).zeros == masks.zeros


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_interrupted_fine_tuning_goes_on_with_its_masks(tmp_path: Path, optimizer: str) -> None:
    options = {"epochs": 4, "lr": 0.02, "optimizer": optimizer, "batch_size": 16, "progress": False}
    masks = magnitude(network(), 0.6)
    whole, parted, again = network(), network(), network()
    expected = fine_tune(whole, masks, blobs(), **options)
    with pytest.raises(StopHereError):
        fine_tune(parted, masks, blobs(), checkpoint=tmp_path / "run", before_step=kill_after(15), **options)
    steps: list[int] = []
    found = fine_tune(again, masks, blobs(), checkpoint=tmp_path / "run", before_step=lambda m: steps.append(1),
                      **options)
    assert len(steps) == 12                  # two of four epochs were done
    assert figures(found) == figures(expected)
    assert same(again, whole)
    assert zeros_of(again).zeros == masks.zeros
    with pytest.raises(ArtefactError, match="other weights"):
        fine_tune(network(), magnitude(network(), 0.5), blobs(), checkpoint=tmp_path / "run", **options)
    looser = magnitude(masked(network(), masks), 0.5)       # starts from the same weights, and lets some grow again
    with pytest.raises(ArtefactError, match="sparsity"):
        fine_tune(masked(network(), masks), looser, blobs(), checkpoint=tmp_path / "run", **options)


def test_other_models_and_unmasked_ones_are_refused() -> None:
    masks = magnitude(network(), 0.6)
    with pytest.raises(InputError, match=r"masks\.impose"):
        train(network(), sparsity=FixedMasks(masks))
    with pytest.raises(ModelError, match="fit the model"):
        fine_tune(nn.Linear(8, 3), masks, blobs(), epochs=1, lr=0.1)


# ---- the file --------------------------------------------------------------------------------------------------------


def thinned(shape: tuple[int, ...], share: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < share, 0.0, value).to(dtype)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.97, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool,
                                   torch.int8], ids=str)
def test_file_is_bit_exact(tmp_path: Path, share: float, dtype: torch.dtype) -> None:
    saved = {"a": thinned((37, 41), share, dtype), "b": thinned((5,), share, dtype, 1),
             "c": thinned((), share, dtype, 2), "d": torch.zeros(0, 3, dtype=dtype),
             "e": thinned((3, 50, 7), share, torch.float32, 3).transpose(0, 1)}
    found = load_sparse(save_sparse(saved, tmp_path / "deep" / "net.safetensors"))
    assert list(found) == list(saved)
    for name, value in saved.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert raw(found[name]) == raw(value)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["net.safetensors"]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 700), max_size=40), st.integers(0, 300))
def test_any_gaps_come_back(gaps: list[int], tail: int) -> None:
    value = torch.zeros(sum(gaps) + len(gaps) + tail)
    at = -1
    for number, gap in enumerate(gaps):
        at += gap + 1
        value[at] = number + 1
    for width in sparse_file.WIDTHS:
        places = value.nonzero()[:, 0].numpy()
        index = sparse_file._coded(sparse_file.np.diff(places, prepend=-1) - 1, width)
        assert sparse_file._positions(index, width, len(places)).tolist() == places.tolist()


def test_signs_of_zero_and_nan_survive(tmp_path: Path) -> None:
    odd = torch.tensor([0.0, -0.0, math.nan, math.inf, 5e-324, 0.0], dtype=torch.float64)
    assert raw(load_sparse(save_sparse({"odd": odd}, tmp_path / "odd"))["odd"]) == raw(odd)


def test_a_network_comes_back_and_is_smaller(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(640, 100))
    made = masked(model, magnitude(model, 0.9))
    path = save_sparse(made, tmp_path / "net")
    fresh = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(640, 100))
    fresh.load_state_dict(load_sparse(path))
    assert same(fresh, made)
    found = sizes(made)
    assert found.sparse == path.stat().st_size < 0.85 * found.gzip < 0.16 * found.dense
    assert zeros_of(fresh).zeros == magnitude(model, 0.9).zeros
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)) / 8
    index = sparse_file._smallest(sparse_file._raw(made[3].weight))
    assert index[0] == "gaps4"
    assert len(index[1]) < 1.1 * entropy * made[3].weight.numel()
    assert sizes(nm_made := masked(model, nm(model))).sparse < sizes(nm_made).gzip


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    # Larger than what deflating looks back on, so that it does not find the second copy by itself.
    model = nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False))
    apart = sizes(model)
    model[1].weight = model[0].weight
    assert sizes(model).sparse < 0.6 * apart.sparse
    assert sizes(model).dense < 0.6 * apart.dense
    found = load_sparse(save_sparse(model, tmp_path / "tied"))
    assert torch.equal(found["1.weight"], model[0].weight)
    view = torch.arange(12.0)
    parts = load_sparse(save_sparse({"all": view, "half": view[:6], "rows": view.view(3, 4)}, tmp_path / "views"))
    assert parts["half"].tolist() == list(range(6))
    assert parts["rows"].shape == (3, 4)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = save_sparse(masked(small(), magnitude(small(), 0.9)), tmp_path / "net")
    whole = path.read_bytes()
    for change in (whole[:-5], whole[:20], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b""):
        path.write_bytes(change)
        with pytest.raises(ArtefactError, match="net"):
            load_sparse(path)
    for at in range(len(whole) // 2, len(whole), 61):           # among them bytes that nothing but the sum would notice
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        with pytest.raises(ArtefactError, match="net"):
            load_sparse(path)
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_sparse(tmp_path / "gone")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ArtefactError, match="format None"):
        load_sparse(path)
    with pytest.raises(ModelError, match=r"no form"):
        save_sparse({"a": torch.zeros(2, 2).to_sparse()}, path)


def test_what_was_there_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_sparse(small(), tmp_path / "net")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtefactError, match="No space left"):
        save_sparse(small(), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]


def test_masks_say_what_they_hold() -> None:
    masks = Masks({"a": torch.tensor([True, False, False, False])})
    assert (masks.weights, masks.zeros, masks.sparsity) == (4, 3, 0.75)
    assert Masks({}).sparsity == 0.0
