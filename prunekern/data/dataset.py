"""A dataset in memory: images, labels, normalisation, stratified splits, and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekern.errors import DataError

Pair = tuple[Tensor, Tensor]
"""Images (or inputs) and labels, the same length."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images and labels of a classification dataset, wholly in memory.

    `train_images`, `test_images`: uint8 `[N, C, H, W]`; `*_labels`: int64 `[N]`, indices into `classes`.
    `mean`, `std`: per channel, of the full training set's pixels scaled to 0..1.
    `source` says where the data came from; `embedded` is true for the small subset shipped with the package.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    embedded: bool = False

    def __repr__(self) -> str:
        shape = "x".join(str(n) for n in self.train_images.shape[1:])
        return (
            f"Dataset({self.name!r}, train={len(self.train_labels)}, test={len(self.test_labels)}, "
            f"shape={shape}, classes={len(self.classes)}, source={self.source!r})"
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 `[N, C, H, W]` -> float32 of the same shape, `(x / 255 - mean) / std` per channel."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def normalised(self) -> tuple[Tensor, Tensor]:
        """All training images and all test images as normalised float32 tensors."""
        return self.train[0], self.test[0]

    @cached_property
    def train(self) -> Pair:
        """All training images, normalised, and their labels."""
        return self.normalise(self.train_images), self.train_labels

    @cached_property
    def test(self) -> Pair:
        """All test images, normalised, and their labels."""
        return self.normalise(self.test_images), self.test_labels

    def split(self, validation: int | float | None = None, seed: int = 0) -> tuple[Pair, Pair]:
        """A stratified split of the training images into (train, validation), both normalised.

        `validation` is a number of images, or a share between 0 and 1; by default a tenth (6,000 of 60,000).
        The same seed gives the same split on every machine. Raises `DataError` if nothing would be left.
        """
        total = len(self.train_labels)
        wanted = 0.1 if validation is None else validation
        count = round(wanted * total) if isinstance(wanted, float) and wanted < 1 else int(wanted)
        if not 0 < count < total:
            raise DataError(
                f"split of {self.name}: validation={validation!r} leaves nothing on one side of {total} "
                f"training images. Ask for 1 to {total - 1} images, or a share such as 0.1."
            )
        held = stratified(self.train_labels, count, seed)
        rest = torch.ones(total, dtype=torch.bool)
        rest[held] = False
        return self._part(rest.nonzero().flatten()), self._part(held)

    def _part(self, index: Tensor) -> Pair:
        return self.normalise(self.train_images[index]), self.train_labels[index]


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Sorted indices of `count` entries of `labels`, each class by its share (largest remainders), seeded.

    Uses numpy's legacy generator, whose stream is guaranteed never to change.
    """
    values = labels.numpy()
    present, sizes = np.unique(values, return_counts=True)
    exact = sizes * (count / len(values))
    take = np.floor(exact).astype(int)
    for extra in np.argsort(take - exact, kind="stable")[: count - int(take.sum())]:
        take[extra] += 1
    random = np.random.RandomState(seed)
    picked = [
        random.permutation(np.flatnonzero(values == cls))[:number] for cls, number in zip(present, take, strict=True)
    ]
    return torch.from_numpy(np.sort(np.concatenate(picked)).astype(np.int64))


@dataclass(frozen=True, eq=False, repr=False)
class Batches:
    """Batches of tensors in memory, each iteration one pass. With `shuffle` every pass has a new order.

    Rows are gathered with `index_select`: no worker processes, no per-sample Python.
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    shuffle: bool = False
    generator: torch.Generator | None = field(default=None)
    drop_last: bool = False

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"batches: {len(self.images)} images but {len(self.labels)} labels; pass as many of each.")
        if self.batch_size < 1:
            raise DataError(f"batches: batch_size={self.batch_size}; it must be at least 1.")

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Pair]:
        order = torch.randperm(len(self.images), generator=self.generator) if self.shuffle else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            stop = start + self.batch_size
            if order is None:
                yield self.images[start:stop], self.labels[start:stop]
            else:
                yield _rows(self.images, order[start:stop]), _rows(self.labels, order[start:stop])

    def __repr__(self) -> str:
        return f"Batches({len(self.images)} samples, batch_size={self.batch_size}, shuffle={self.shuffle})"


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.to(values.device))


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int = 128,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    *,
    drop_last: bool = False,
) -> Batches:
    """A loader over two tensors: iterable many times, with `len()`, yielding `(images, labels)` batches.

    The order of a shuffled pass comes from `generator` (torch's global one if none is given).
    """
    return Batches(images, labels, batch_size, shuffle, generator, drop_last)


def loader(pair: Pair, batch_size: int = 128, shuffle: bool = False, **options: Any) -> Any:
    """The same as a `torch.utils.data.DataLoader` over a `TensorDataset`, for code that insists on one."""
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(*pair), batch_size=batch_size, shuffle=shuffle, **options)
