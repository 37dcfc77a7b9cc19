"""The stratified Fashion-MNIST subset that is shipped with the package: 5,000 training and 1,000 test images.

`subset.npz` holds `train_images` uint8 `[5000, 28, 28]`, `train_labels` uint8 `[5000]`, `test_images`,
`test_labels`, the indices of the images in the full set (`train_index`, `test_index`, int32) and the `seed`
that chose them. It is made by `build`, exactly reproducibly. Licence: MIT, see LICENSE in this folder.
"""

from __future__ import annotations

import io
import os
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunekern.core.files import write_atomically
from prunekern.data.catalog import spec
from prunekern.data.dataset import Dataset, stratified
from prunekern.errors import DataError

SEED = 20170828
"""The default seed of the choice."""
TRAIN, TEST = 5000, 1000
FILE = "subset.npz"


def load() -> Dataset:
    """The embedded subset. Raises `DataError` if the installed file is missing or damaged."""
    path = resources.files(__name__) / FILE
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        parts = [
            torch.from_numpy(arrays[f"{half}_{kind}"]) for half in ("train", "test") for kind in ("images", "labels")
        ]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: missing or damaged ({error}). Reinstall prunekern.") from error
    entry = spec("fashion-mnist")
    return Dataset(
        entry.name,
        parts[0].unsqueeze(1),
        parts[1].long(),
        parts[2].unsqueeze(1),
        parts[3].long(),
        entry.classes,
        entry.mean,
        entry.std,
        f"embedded subset of Fashion-MNIST ({len(parts[1])} training and {len(parts[3])} test images)",
        embedded=True,
    )


def choose(full: Dataset, seed: int = SEED) -> dict[str, np.ndarray[Any, Any]]:
    """The subset's arrays, chosen from the full set: the same number of each class, seeded."""
    train = stratified(full.train_labels, TRAIN, seed)
    test = stratified(full.test_labels, TEST, seed)
    return {
        "train_images": full.train_images[train, 0].numpy(),
        "train_labels": full.train_labels[train].to(torch.uint8).numpy(),
        "test_images": full.test_images[test, 0].numpy(),
        "test_labels": full.test_labels[test].to(torch.uint8).numpy(),
        "train_index": train.to(torch.int32).numpy(),
        "test_index": test.to(torch.int32).numpy(),
        "seed": np.array(seed, np.int64),
    }


def build(target: str | os.PathLike[str] | None = None, seed: int = SEED) -> Path:
    """Make the subset's file again from the full Fashion-MNIST, and return its path.

    `target` is the .npz to write (by default the package's own). Raises `DataError` if the full set
    cannot be had.
    """
    from prunekern.data.locate import load as load_dataset

    path = Path(target) if target is not None else Path(__file__).with_name(FILE)
    arrays = choose(load_dataset("fashion-mnist", embedded=False), seed)
    return write_atomically(path, lambda file: _write_npz(file, arrays))


def _write_npz(file: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """An .npz at the strongest compression, with fixed dates: the bytes depend on the arrays alone."""
    with zipfile.ZipFile(file, "w") as archive:
        for key, values in arrays.items():
            entry = zipfile.ZipInfo(f"{key}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            buffer = io.BytesIO()
            np.save(buffer, values, allow_pickle=False)
            archive.writestr(entry, buffer.getvalue(), compresslevel=9)
