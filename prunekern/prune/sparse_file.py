"""Networks with zeros on disk: each tensor in the smallest of three forms, bit for bit what was saved.

* ``dense``: the values as they are;
* ``mask``: one bit for every value, and the values that are not zero;
* ``gaps``: for every value that is not zero how many zeros lie before it, in codes of 2 to 8 bits of which the largest
  says "as many zeros, and no value yet" (the relative index of Han et al., Deep Compression, ICLR 2016, without its
  fillers). From about 70 % zeros on this beats the mask, and comes within some percent of the entropy.

The values of all tensors of a type follow each other, split into planes of first, second, ... bytes: the bytes with
sign and exponent vary little and are deflated, the others as they come. It is one safetensors file of a few tensors.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from prunekern.core.files import write_bytes
from prunekern.errors import ArtefactError, ModelError

FORMAT, VERSION = "prunekern-sparse", 1
WIDTHS = range(2, 9)        # bits of a gap's code
LEVEL = 6                   # of deflate and gzip; 9 takes twice the time for some tenths of a percent
WORTH = 0.97                # a stream is deflated where that leaves less than this of it
Stream = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk of one state: a plain safetensors file, the same through gzip, and the sparse file."""

    dense: int
    gzip: int
    sparse: int

    def __str__(self) -> str:
        return (f"{self.dense:,} bytes dense, {self.gzip:,} through gzip ({self.gzip / self.dense:.1%}), "
                f"{self.sparse:,} sparse ({self.sparse / self.dense:.1%})")


def save_sparse(model: nn.Module | Mapping[str, Tensor], path: str | PathLike[str]) -> Path:
    """Write a model's state (parameters and persistent buffers) to one file, all or nothing; tied tensors once.

    Raises ModelError for a state that is not tensors alone, ArtefactError where the file cannot be written.
    """
    return write_bytes(path, encode(_state(model)))


def load_sparse(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state that ``save_sparse`` wrote, on the CPU: ``model.load_state_dict(load_sparse(path))``.

    Raises ArtefactError for a file that is missing, truncated, altered, or of another kind or version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); pass a file that save_sparse wrote, or save it again."
                            ) from error
    if header.get("format") != FORMAT or header.get("version") != str(VERSION):
        raise ArtefactError(f"{path} has format {header.get('format')!r}, version {header.get('version')!r}; this "
                            f"reads {FORMAT} version {VERSION}.")
    if header.get("sha256") != _digest(parts):
        raise ArtefactError(f"{path} is not what was saved (its SHA-256 differs); save it again.")
    try:
        return _decode(parts)
    except (KeyError, ValueError, TypeError, IndexError, zlib.error) as error:
        raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {error}); save it again.") from error


def sizes(model: nn.Module | Mapping[str, Tensor]) -> Sizes:
    """What the model's state takes on disk, three ways."""
    state = _state(model)
    once: dict[Any, str] = {_place(value, name): name for name, value in reversed(state.items())}
    plain = to_safetensors({name: state[name].cpu().contiguous().clone() for name in once.values()})
    return Sizes(len(plain), len(gzip.compress(plain, LEVEL, mtime=0)), len(encode(state)))


def _state(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ModelError(f"{name} is a {type(value).__name__} without plain values of its own, for which the "
                             "sparse file has no form; save this model with torch.save.")
    return {name: value.detach() for name, value in state.items()}


def _place(value: Tensor, name: str) -> Any:
    """The same for tensors that are one and the same memory."""
    if not value.numel():
        return name
    return value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def encode(state: Mapping[str, Tensor]) -> bytes:
    """The content of the file."""
    streams: Stream = {}
    entries: list[list[Any]] = []
    seen: dict[Any, str] = {}
    for name, value in state.items():
        first = seen.setdefault(_place(value, name), name)
        if first != name:
            entries.append([name, "same", first])
            continue
        form, index, values = _smallest(_raw(value))
        dtype = str(value.dtype).removeprefix("torch.")
        entries.append([name, form, dtype, list(value.shape), len(index), len(values)])
        streams.setdefault("index", []).append(index)
        streams.setdefault(f"values:{dtype}", []).append(values)
    parts = {name: torch.from_numpy(part) for key, stream in streams.items() for name, part in _packed(key, stream)}
    # Deflated, for a network of many small tensors has a long layout.
    layout = zlib.compress(json.dumps(entries, separators=(",", ":")).encode(), 9)
    parts["layout"] = torch.frombuffer(bytearray(layout), dtype=torch.uint8)
    return to_safetensors(parts, {"format": FORMAT, "version": str(VERSION), "sha256": _digest(parts)})


def _raw(value: Tensor) -> np.ndarray:
    """[values, bytes of one]; the sign of a zero is a bit like any other."""
    flat = value.cpu().contiguous().reshape(-1)
    if not flat.numel():
        return np.zeros((0, flat.element_size()), np.uint8)
    return flat.view(torch.uint8).reshape(len(flat), -1).numpy()


def _smallest(raw: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """(form, index bytes, the values it needs): whatever takes least."""
    at = np.flatnonzero(raw.any(axis=1))
    gaps = np.diff(at, prepend=-1) - 1
    bits = {f"gaps{width}": width * int((gaps // (2**width - 1) + 1).sum()) for width in WIDTHS}
    cost = {"dense": (len(raw) - len(at)) * raw.shape[1], "mask": -(-len(raw) // 8),
            **{form: -(-count // 8) for form, count in bits.items()}}
    form = min(cost, key=cost.__getitem__)
    if form == "dense":
        return form, np.zeros(0, np.uint8), raw
    if form == "mask":
        return form, np.packbits(raw.any(axis=1)), raw[at]
    return form, _coded(gaps, int(form.removeprefix("gaps"))), raw[at]


def _coded(gaps: np.ndarray, width: int) -> np.ndarray:
    more = 2**width - 1
    ends = np.cumsum(gaps // more + 1) - 1
    codes = np.full(int(ends[-1]) + 1 if len(ends) else 0, more, np.uint8)
    codes[ends] = gaps % more
    return np.packbits(np.unpackbits(codes[:, None], axis=1)[:, 8 - width:])


def _positions(index: np.ndarray, width: int, count: int) -> np.ndarray:
    """Where the values lie, from the codes of their gaps."""
    more = 2**width - 1
    bits = np.unpackbits(index)
    bits = bits[: len(bits) // width * width].reshape(-1, width)
    codes = np.packbits(np.pad(bits, ((0, 0), (8 - width, 0))), axis=1)[:, 0].astype(np.int64)
    ends = np.flatnonzero(codes != more)[:count]
    if len(ends) != count:
        raise ValueError(f"{count} values, {len(ends)} places")
    # Every code counts its zeros, and one that ends a gap the value after them.
    return np.asarray(np.cumsum(codes + (codes != more))[ends] - 1)


def _packed(key: str, stream: list[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """A stream as (name, bytes), the bytes of one place within a value together where that pays."""
    whole = np.concatenate(stream)
    if not whole.size:
        return []
    if key == "index":
        return [("index", whole)]
    found = []
    for number, plane in enumerate(whole.T):
        plain = np.ascontiguousarray(plane)
        small = zlib.compress(plain.tobytes(), LEVEL)
        deflated = len(small) < WORTH * len(plain)
        found.append((f"{key}:{number}:{'z' if deflated else 'r'}",
                      np.frombuffer(bytearray(small), np.uint8) if deflated else plain))
    return found


def _unpacked(parts: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    planes: dict[str, dict[int, np.ndarray]] = {}
    for key, tensor in parts.items():
        if key.startswith("values:"):
            _, dtype, number, how = key.split(":")
            data = tensor.numpy().tobytes()
            plane = np.frombuffer(zlib.decompress(data) if how == "z" else data, np.uint8)
            planes.setdefault(dtype, {})[int(number)] = plane
    return {dtype: np.stack([found[number] for number in range(len(found))], axis=1)
            for dtype, found in planes.items()}


def _decode(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values, used = _unpacked(parts), dict.fromkeys(("index",), 0)
    index = parts["index"].numpy() if "index" in parts else np.zeros(0, np.uint8)
    state: dict[str, Tensor] = {}
    for name, form, *rest in json.loads(zlib.decompress(parts["layout"].numpy().tobytes())):
        if form == "same":
            state[name] = state[rest[0]]
            continue
        dtype, shape, length, count = rest
        start, first = used["index"], used.get(dtype, 0)
        kind = getattr(torch, dtype)
        width = torch.empty((), dtype=kind).element_size()
        mine = values[dtype][first:first + count] if count else np.zeros((0, width), np.uint8)
        raw = _filled(form, index[start:start + length], mine, math.prod(shape))
        state[name] = torch.from_numpy(raw).reshape(-1).view(kind).reshape(shape)
        used.update({"index": start + length, dtype: first + count})
    return state


def _filled(form: str, index: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    raw = np.zeros((size, values.shape[1]), np.uint8)
    if form == "dense":
        raw[:] = values
    elif form == "mask":
        raw[np.unpackbits(index, count=size).astype(bool)] = values
    else:
        raw[_positions(index, int(form.removeprefix("gaps")), len(values))] = values
    return raw


def _digest(parts: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(name.encode() + b"\0" + parts[name].numpy().tobytes())
    return digest.hexdigest()
