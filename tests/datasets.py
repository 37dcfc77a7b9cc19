"""Hand-made datasets of a few images in every form, and stand-ins for addresses and package managers."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunekern.data import formats
from prunekern.data.catalog import CATALOG, Member, Spec


def idx(values: np.ndarray) -> bytes:
    codes = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
    header = bytes([0, 0, codes[values.dtype.str[1:]], values.ndim])
    sizes = np.array(values.shape, ">i4").tobytes()
    return header + sizes + values.astype(values.dtype.newbyteorder(">")).tobytes()


def idx_files(train: int = 30, test: int = 10) -> dict[str, bytes]:
    random = np.random.default_rng(7)
    files = {}
    for half, count in (("train", train), ("t10k", test)):
        files[f"{half}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28), np.uint8))
        files[f"{half}-labels-idx1-ubyte"] = idx(np.arange(count).astype(np.uint8) % 10)
    return files


def cifar_files(rows: int = 4) -> dict[str, bytes]:
    random = np.random.default_rng(8)
    names = [f"data_batch_{index}.bin" for index in range(1, 6)] + ["test_batch.bin"]
    files = {}
    for name in names:
        records = random.integers(0, 256, (rows, formats.CIFAR_RECORD), np.uint8)
        records[:, 0] %= 10
        files[name] = records.tobytes()
    return files


def specification(name: str, files: dict[str, bytes], **changes: Any) -> Spec:
    members = tuple(Member(key, hashlib.sha256(raw).hexdigest(), len(raw)) for key, raw in files.items())
    return dataclasses.replace(CATALOG[name], members=members, **changes)


def put(folder: Path, files: dict[str, bytes], *, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


def no_address(monkeypatch: pytest.MonkeyPatch, asked: list[str] | None = None) -> None:
    def fail(url: str, timeout: float) -> None:
        if asked is not None:
            asked.append(url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


def clients(monkeypatch: pytest.MonkeyPatch, act: Callable[[list[str], Path], str | None]) -> list[list[str]]:
    """Replace the package managers by `act(command, folder)`, which returns an error text or None."""
    calls: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        assert options["timeout"] > 0
        said = act(command, Path(cwd))
        return subprocess.CompletedProcess(command, 100 if said else 0, stdout=f"noise\n{said or ''}\n")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def as_bins(folder: Path, files: dict[str, bytes]) -> None:
    put(folder, files)


def as_archive(folder: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere"
        archive.addfile(link)  # only regular files count
        for name, raw in {"batches.meta.txt": b"x", **files}.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))


def as_sheets(folder: Path, files: dict[str, bytes]) -> None:
    image = pytest.importorskip("PIL.Image")
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for name, raw in files.items():
        records = np.frombuffer(raw, np.uint8).reshape(-1, formats.CIFAR_RECORD)
        labels["test" if name == "test_batch.bin" else "train"] += records[:, 0].tolist()
        pixels = records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)
        image.fromarray(np.ascontiguousarray(pixels)).save(folder / name.replace(".bin", ".png"))
    for half, values in labels.items():
        (folder / f"{half}_lables.json").write_text(json.dumps(values))
