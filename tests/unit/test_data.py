"""Datasets: the IDX format, the embedded subset, splits, batches, writing files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunekern import data
from prunekern.core.files import write_atomically
from prunekern.data import embedded, formats
from prunekern.data.dataset import Dataset, stratified
from prunekern.errors import DataError
from tests.datasets import (
    idx,
)

REAL_CACHE = data.cache_folder("fashion-mnist")


# --- formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_is_read_for_every_type(kind: str, zipped: bool) -> None:
    values = (np.arange(24).reshape(2, 3, 4) * 5 - (0 if kind == "u1" else 30)).astype(kind)
    raw = idx(values)
    found = formats.parse_idx(gzip.compress(raw) if zipped else raw)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not an IDX file"),
        (b"<html>", "not an IDX file"),
        (b"\0\0\x07\x01\0\0\0\x01a", "not an IDX file"),
        (b"\0\0\x08\x03\0\0\0\x01", "truncated"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "needs 18 bytes, found 17"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "needs 18 bytes, found 19"),
        (b"\0\0\x08\x01\xff\xff\xff\xff", "needs"),
        (gzip.compress(idx(np.zeros(99, np.uint8)), mtime=0)[:-9], "broken gzip"),
    ],
)
def test_broken_idx_is_refused_by_name(raw: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        formats.parse_idx(raw, "this-file")
    assert "this-file" in str(caught.value)


# --- the embedded subset -------------------------------------------------------------------------------


def test_embedded_subset_is_balanced_licensed_and_small() -> None:
    found = data.load("fashion-mnist", embedded=True)
    assert found.embedded
    assert "embedded" in found.source
    assert found.train_images.shape == (5000, 1, 28, 28)
    assert found.test_images.shape == (1000, 1, 28, 28)
    assert found.train_labels.bincount().tolist() == [500] * 10
    assert found.test_labels.bincount().tolist() == [100] * 10
    folder = Path(embedded.__file__).parent
    assert (folder / embedded.FILE).stat().st_size <= 4 * 2**20
    assert "Zalando SE" in (folder / "LICENSE").read_text()
    assert "MIT" in (folder / "LICENSE").read_text()
    # The full set's statistics must fit the sample: real images, not noise.
    train = found.train[0]
    assert abs(float(train.mean())) < 0.02
    assert abs(float(train.std()) - 1) < 0.02


def test_no_other_set_has_a_subset() -> None:
    with pytest.raises(DataError, match="no subset is shipped"):
        data.load("mnist", embedded=True)


def _full() -> Dataset:
    """A stand-in for the full set: labels in an order of their own, the index written into each image."""
    labels = torch.from_numpy(np.random.RandomState(3).permutation(np.arange(60000) % 10))
    images = torch.zeros(60000, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, :4] = torch.from_numpy(np.arange(60000, dtype=">u4").view(np.uint8).reshape(-1, 4).copy())
    return Dataset("x", images, labels, images[:10000], labels[:10000], (), (0.5,), (0.5,), "made up")


def test_build_is_exactly_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = _full()
    monkeypatch.setattr("prunekern.data.locate.load", lambda name, embedded: full)
    first = embedded.build(tmp_path / "a.npz").read_bytes()
    assert embedded.build(tmp_path / "b.npz").read_bytes() == first
    assert embedded.build(tmp_path / "c.npz", seed=1).read_bytes() != first
    with np.load(tmp_path / "a.npz", allow_pickle=False) as made:
        index, images, labels = made["train_index"], made["train_images"], made["train_labels"]
        assert int(made["seed"]) == embedded.SEED
    assert len(set(index.tolist())) == 5000
    np.testing.assert_array_equal(images[:, 0, :4].copy().view(">u4").ravel(), index)
    np.testing.assert_array_equal(labels, full.train_labels.numpy()[index])


@pytest.mark.skipif(not REAL_CACHE.is_dir(), reason="the full Fashion-MNIST is not in the cache")
def test_shipped_subset_is_what_build_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    full = data.load("fashion-mnist", REAL_CACHE, download=False, embedded=False)
    chosen = embedded.choose(full)
    with np.load(Path(embedded.__file__).with_name(embedded.FILE), allow_pickle=False) as shipped:
        assert set(shipped.files) == set(chosen)
        for key, values in chosen.items():
            np.testing.assert_array_equal(shipped[key], values)


def test_damaged_subset_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / embedded.FILE).write_bytes(b"PK nonsense")
    monkeypatch.setattr(embedded.resources, "files", lambda name: tmp_path)
    with pytest.raises(DataError, match="missing or damaged"):
        embedded.load()


# --- splits, normalisation, batches --------------------------------------------------------------------


@pytest.fixture(scope="module")
def subset() -> Dataset:
    return embedded.load()


def test_normalisation_is_per_channel() -> None:
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    made = Dataset("x", images, torch.zeros(3), images, torch.zeros(3), (), (0.1, 0.2, 0.3), (0.5, 1, 2), "")
    expected = torch.stack([(images[:, c] / 255 - m) / s for c, m, s in ((0, 0.1, 0.5), (1, 0.2, 1), (2, 0.3, 2))])
    torch.testing.assert_close(made.normalised()[0], expected.transpose(0, 1))
    assert made.normalised()[1].dtype == torch.float32


def test_split_is_stratified_disjoint_and_seeded(subset: Dataset) -> None:
    (train, train_labels), (held, held_labels) = subset.split(777, seed=3)
    assert (len(train), len(held)) == (5000 - 777, 777)
    counts = held_labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    # Together they are the training set again, nothing twice: compare the pixels as sorted rows of bytes.
    rows = torch.cat([train, held]).flatten(1).numpy()
    whole = subset.train[0].flatten(1).numpy()
    assert sorted(map(bytes, rows)) == sorted(map(bytes, whole))
    assert torch.equal(subset.split(777, seed=3)[1][0], held)
    assert not torch.equal(subset.split(777, seed=4)[1][0], held)
    assert len(train_labels) == len(train)


@pytest.mark.parametrize(("asked", "count"), [(None, 500), (0.25, 1250), (6, 6), (4999, 4999)])
def test_split_sizes(subset: Dataset, asked: int | float | None, count: int) -> None:
    (_, train_labels), (_, held_labels) = subset.split(asked)
    assert (len(held_labels), len(train_labels)) == (count, 5000 - count)


@pytest.mark.parametrize("asked", [0, 5000, 6000, -1, 0.0])
def test_split_that_leaves_nothing_is_refused(subset: Dataset, asked: float) -> None:
    with pytest.raises(DataError, match="5000 training images"):
        subset.split(asked)


def test_stratified_follows_uneven_shares() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    index = stratified(labels, 10, seed=0)
    assert labels[index].bincount().tolist() == [7, 2, 1]
    assert labels[stratified(labels, 19, seed=0)].bincount().tolist() == [13, 4, 2]  # 13.3, 3.8, 1.9
    assert index.tolist() == sorted(set(index.tolist()))


def test_batches_cover_everything_once_in_a_new_order_each_pass() -> None:
    images, labels = torch.arange(10.0).view(10, 1), torch.arange(10)
    made = data.batches(images, labels, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    passes = [list(made), list(made)]
    orders = [torch.cat([y for _, y in one]).tolist() for one in passes]
    assert [len(y) for _, y in passes[0]] == [4, 4, 2]
    assert len(made) == 3
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]
    assert all(torch.equal(x.flatten(), y.float()) for one in passes for x, y in one)
    same = data.batches(images, labels, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    assert torch.cat([y for _, y in same]).tolist() == orders[0]


def test_batches_in_order_and_dropping_the_last() -> None:
    images, labels = torch.arange(10.0).view(10, 1), torch.arange(10)
    assert torch.cat([y for _, y in data.batches(images, labels, 3)]).tolist() == list(range(10))
    short = data.batches(images, labels, 3, drop_last=True)
    assert [len(y) for _, y in short] == [3, 3, 3]
    assert len(short) == 3


def test_batches_refuse_nonsense() -> None:
    with pytest.raises(DataError, match="3 images but 2 labels"):
        data.batches(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(DataError, match="batch_size=0"):
        data.batches(torch.zeros(3, 1), torch.zeros(3), 0)


def test_loader_is_a_dataloader(subset: Dataset) -> None:
    made = data.loader(subset.test, 300)
    assert isinstance(made, torch.utils.data.DataLoader)
    assert [len(labels) for _, labels in made] == [300, 300, 300, 100]


# --- writing files -------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, fail)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def watch(file: Any) -> None:
        file.write(b"new, first half")
        file.flush()
        assert target.read_bytes() == b"old"
        file.write(b" and second")

    write_atomically(target, watch)
    assert target.read_bytes() == b"new, first half and second"
