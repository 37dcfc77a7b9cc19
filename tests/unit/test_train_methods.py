"""Options of training: averaged weights, warm-up, clipping, smoothed labels, augmentation, half precision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.errors import ArtefactError, InputError
from prunekern.train import Augment, evaluate, fit
from tests.training import blobs, figures, network, same, train

# --- averaged weights -------------------------------------------------------------------------------------


def by_hand(model: nn.Module, decay: float, **options: Any) -> dict[str, Tensor]:
    """The average of every update's weights, next to a training without one."""
    average = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[dict[str, Tensor]] = []

    def note(module: nn.Module) -> None:  # before a step: what the step before left
        seen.append({name: value.clone() for name, value in module.state_dict().items()})

    train(model, before_step=note, **options)
    statistics = [dict(model.state_dict()) if i + 1 == len(seen) else seen[i + 1] for i in range(len(seen))]
    for count, (now, later) in enumerate(zip(seen, statistics, strict=True), 1):
        share = min(decay, (1 + count) / (10 + count))
        for name, value in average.items():
            # Statistics have moved in this step's forward already, weights move in its step.
            new = now[name] if "running" in name else later[name]
            average[name] = share * value + (1 - share) * new if value.is_floating_point() else new
    return average


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_average_is_what_comes_back(decay: float) -> None:
    raw, averaged = network(), network()
    expected = by_hand(raw, decay, epochs=3)
    train(averaged, epochs=3, ema=decay)
    for name, value in averaged.state_dict().items():
        if name != "1.num_batches_tracked":
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not same(averaged, raw)


def test_the_average_is_what_is_validated() -> None:
    test = blobs(60, seed=5)
    model = network()
    history = train(model, validate=test, epochs=3, ema=0.9)
    assert history.epochs[-1].validation_loss == evaluate(model, test).loss
    raw = train(network(), validate=test, epochs=3)
    assert history.epochs[-1].validation_loss != raw.epochs[-1].validation_loss
    # What trains is not the average: the losses along the way are those without one.
    assert [e.loss for e in history] == [e.loss for e in raw]


def test_the_best_average_is_restored() -> None:
    test = blobs(60, seed=5)
    model = network()
    history = train(model, validate=test, epochs=6, lr=0.3, ema=0.8, restore_best=True)
    assert history.best is not None
    assert evaluate(model, test).accuracy == history.epochs[history.best].validation_accuracy


def test_half_precision_weights_are_averaged_in_single_precision() -> None:
    from prunekern.train import Average

    model = nn.Linear(2, 2).to(torch.bfloat16)
    average = Average(model, 0.999)
    with torch.no_grad():
        for _ in range(300):
            model.weight += 0.01
            average.update(model)
    assert average.values["weight"].dtype == torch.float32
    before = model.weight.clone()
    with average.used(model):
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


# --- rates, gradients, targets ----------------------------------------------------------------------------


def rates(**options: Any) -> list[float]:
    seen: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Spy)
        train(network(), epochs=4, lr=1.0, batch_size=48, weight_decay=0.0, **options)
    return seen


def test_warmup_climbs_and_the_schedule_has_the_rest() -> None:
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates(warmup=1) == pytest.approx([0.1, 0.55, *cosine])
    assert rates(warmup=1.5, schedule="constant") == pytest.approx([0.1, 0.4, 0.7, 1, 1, 1, 1, 1])
    assert rates(warmup=0, schedule="constant") == [1.0] * 8


def test_gradients_are_clipped_before_penalties_and_hooks() -> None:
    norms: list[float] = []

    def note(model: nn.Module) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))

    train(network(), before_step=note, clip=0.01, epochs=1)
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)
    norms.clear()
    train(network(), before_step=note, clip=1e6, epochs=1)
    assert min(norms) > 0.1


def test_smoothed_labels_change_training_but_not_validation() -> None:
    x, y = blobs(48)
    model = network(dropout=0.0)
    scores = model(x)
    expected = 0.8 * nn.functional.cross_entropy(scores, y) + 0.2 * -scores.log_softmax(1).mean()
    history = train(model, (x, y), (x, y), epochs=1, batch_size=48, label_smoothing=0.2)
    assert history.epochs[0].loss == pytest.approx(expected.item(), rel=1e-5)
    assert history.epochs[0].validation_loss == evaluate(model, (x, y)).loss


# --- augmentation -----------------------------------------------------------------------------------------


def numbered(count: int, channels: int = 2, side: int = 6) -> Tensor:
    """Images in which every pixel's value is its own."""
    return torch.arange(1.0, 1 + count * channels * side**2).view(count, channels, side, side)


def test_crops_shift_every_image_by_its_own_offset() -> None:
    images, most = numbered(40), 2
    found = Augment(crop=most)(images, torch.Generator().manual_seed(0))
    offsets = set()
    for image, shifted in zip(images, found, strict=True):
        padded = nn.functional.pad(image, (most,) * 4)
        hits = [(y, x) for y in range(2 * most + 1) for x in range(2 * most + 1)
                if torch.equal(padded[:, y : y + 6, x : x + 6], shifted)]
        assert len(hits) == 1
        offsets |= set(hits)
    assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(5))


def test_flips_mirror_about_half_of_the_images() -> None:
    images = numbered(200, 1, 4)
    found = Augment(flip=True)(images, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(images, found, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, images, found, strict=True))
    assert 70 < sum(mirrored) < 130


def test_training_sees_augmented_images_and_validation_does_not() -> None:
    seen: list[Tensor] = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2 * 36, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return self.layer(x.flatten(1) / 1000)

    images, labels = numbered(8), torch.arange(8) % 3
    fit(Looking(), (images, labels), (images, labels), epochs=2, lr=0.01, augment={"crop": 1, "flip": True},
        batch_size=8, progress=False)
    first, plain, second, _ = seen
    assert not torch.equal(first.sort(0).values, images)
    assert torch.equal(plain, images)
    assert not torch.equal(first.sort(0).values, second.sort(0).values)


def test_an_augmentation_of_ones_own() -> None:
    model, other = network(dropout=0.0), network(dropout=0.0)
    x, y = blobs()
    train(model, (x + 1, y))
    train(other, (x, y), augment=lambda value, generator: value + 1)
    assert same(model, other)


# --- half precision ---------------------------------------------------------------------------------------


def test_bfloat16_on_a_cpu() -> None:
    seen: list[torch.dtype] = []
    model, plain = network(), network()
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    history = train(model, amp="bf16", epochs=4)
    expected = train(plain, epochs=4)
    assert set(seen) == {torch.bfloat16}
    assert model[0].weight.dtype == torch.float32
    assert history.epochs[-1].loss == pytest.approx(expected.epochs[-1].loss, abs=0.1)
    assert history.epochs[-1].loss < history.epochs[0].loss / 2


# --- resuming ---------------------------------------------------------------------------------------------


class StopHereError(Exception):
    """Stands for a kill that the test survives."""


@pytest.mark.parametrize("moment", [3, 7, 13, 23])
@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9},
        {"ema": 0.9, "validate": blobs(30, 2), "restore_best": True},
        {"warmup": 1, "clip": 0.5, "label_smoothing": 0.1},
        {"augment": lambda value, generator: value + torch.randn(value.shape, generator=generator)},
        {"amp": "bf16", "optimizer": "adamw", "ema": 0.5},
    ],
    ids=["ema", "best-ema", "rates", "augment", "bf16"],
)
def test_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, options: dict[str, Any], moment: int) -> None:
    whole, parted = network(), network()
    expected = train(whole, epochs=4, **options)
    count = iter(range(moment))

    def kill(model: nn.Module) -> None:
        if next(count, None) is None:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(parted, epochs=4, before_step=kill, checkpoint=tmp_path / "run", **options)
    parted = network()
    found = train(parted, epochs=4, checkpoint=tmp_path / "run", **options)
    assert figures(found) == figures(expected)
    assert same(parted, whole)
    again = network()
    assert train(again, epochs=4, checkpoint=tmp_path / "run", **options) == found
    assert same(again, whole)


def test_a_checkpoint_with_another_augmentation_is_refused(tmp_path: Path) -> None:
    x, y = torch.randn(12, 1, 6, 6), torch.arange(12) % 3

    def run(crop: int) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        fit(model, (x, y), epochs=1, lr=0.01, augment={"crop": crop}, checkpoint=tmp_path / "run", progress=False)

    run(1)
    with pytest.raises(ArtefactError, match="crop=1, now 2"):
        run(2)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"warmup": 3}, "warmup=3 must be epochs from 0 to fewer"),
        ({"warmup": -1}, "warmup"),
        ({"clip": 0}, "clip=0 must be a positive norm"),
        ({"label_smoothing": 1}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss": lambda output, target: output.sum()}, "default loss"),
        ({"ema": 1.0}, "ema=1.0 must be between 0 and 1"),
        ({"augment": {"rotate": 3}}, "known: crop, flip"),
        ({"augment": {"crop": -1}}, "pixels from 0"),
        ({"augment": {"flip": True}}, r"images \[N, C, H, W\], the batch is \(16, 8\)"),
        ({"augment": 3}, "augment is a int"),
        ({"amp": "fp16"}, "CUDA only"),
        ({"amp": "int8"}, "False, True, 'bf16' or 'fp16'"),
        ({"sparsity": 3}, "sparsity is a int"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], says: str) -> None:
    model, before = network(), network()
    with pytest.raises(InputError, match=says):
        train(model, epochs=3, **options)
    assert same(model, before)
    assert model.training


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [True, "bf16", "fp16"])
def test_mixed_precision_on_cuda(tmp_path: Path, amp: Any) -> None:
    whole, parted = network(), network()
    options = {"device": "cuda", "amp": amp, "epochs": 6, "ema": 0.9, "clip": 1.0}
    history = train(whole, **options)
    assert history.epochs[-1].loss < history.epochs[0].loss / 2
    assert whole[0].weight.device.type == "cpu"
    count = iter(range(20))

    def kill(model: nn.Module) -> None:
        if next(count, None) is None:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(parted, before_step=kill, checkpoint=tmp_path / "run", **options)
    found = train(network(), checkpoint=tmp_path / "run", **options)
    assert [e.loss for e in found] == pytest.approx([e.loss for e in history], rel=1e-2)


@pytest.mark.gpu
def test_augmentation_on_cuda_is_that_of_the_cpu() -> None:
    images = numbered(20)
    here, there = (Augment(2, True)(images.to(place), torch.Generator().manual_seed(1)) for place in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
