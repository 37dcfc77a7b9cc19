"""Programs on disk: JSON that other runners can read, and safetensors. Nothing is ever unpickled.

``program.json`` names its weights file and holds the SHA-256 of both, so that truncation and alteration are
noticed; the weights file is written first, so that a kill in between leaves the older pair intact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from prunekern.core import structure
from prunekern.core.files import write_atomically
from prunekern.core.graph import Dim
from prunekern.core.program import Activation, Epilogue, Program, Slot, Step
from prunekern.errors import ArtefactError, LoweringError

FORMAT, VERSION = "prunekern.program", 1
FILE = "program.json"


def to_json(program: Program) -> dict[str, Any]:
    """The Program without the values of its weights. Raises ArtefactError for structures of outputs or inputs
    that have no JSON form (a class unknown to torch's pytree)."""
    specs = {key: structure.dumps(getattr(program, key)) for key in ("in_spec", "out_spec")}
    return {
        "slots": {name: {"shape": [_dim(d) for d in slot.shape], "dtype": _dtype(slot.dtype)}
                  for name, slot in program.slots().items()},
        "steps": [_step(step) for step in program.steps],
        "weights": {name: {"shape": list(tensor.shape), "dtype": _dtype(tensor.dtype)}
                    for name, tensor in program.weights.items()},
        "inputs": [_leaf(item) for item in program.inputs], "outputs": [_leaf(item) for item in program.outputs],
        **specs, "parameters": list(program.parameters), "batch": program.batch, "notes": list(program.notes),
        "kept": {name: {"axis": axis, "indices": list(indices)} for name, (axis, indices) in program.kept.items()}}


def from_json(data: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Program:
    """The inverse of ``to_json``; checked. Raises ArtefactError, LoweringError."""
    slots = {name: Slot(name, tuple(Dim(*dim) for dim in slot["shape"]), getattr(torch, slot["dtype"]))
             for name, slot in data["slots"].items()}
    program = Program(
        tuple(_read_step(step, slots) for step in data["steps"]), dict(weights),
        tuple(_read_leaf(item, slots) for item in data["inputs"]),
        tuple(_read_leaf(item, slots) for item in data["outputs"]),
        structure.loads(data["in_spec"]), structure.loads(data["out_spec"]), tuple(data["parameters"]),
        {name: (kept["axis"], tuple(kept["indices"])) for name, kept in data["kept"].items()},
        data["batch"], tuple(data["notes"]))
    for name, about in data["weights"].items():
        tensor = weights.get(name)
        if tensor is None or list(tensor.shape) != about["shape"] or _dtype(tensor.dtype) != about["dtype"]:
            raise ArtefactError(f"weight {name!r} is not the {about['dtype']} {about['shape']} that the Program names.")
    program.check()
    return program


def save_program(program: Program, folder: Path) -> None:
    """Write ``program.json`` and the weights it names, each atomically. Raises ArtefactError."""
    body = to_json(program)
    payload = save_tensors({name: tensor.detach().cpu().contiguous().clone()
                            for name, tensor in program.weights.items()})
    digest = hashlib.sha256(payload).hexdigest()
    weights = f"weights-{digest[:12]}.safetensors"
    head = {"format": FORMAT, "version": VERSION, "weights_file": weights, "weights_sha256": digest,
            "sha256": _digest(body), "program": body}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / weights, payload)
        write_atomically(folder / FILE, json.dumps(head, indent=1, allow_nan=False).encode())
        for old in folder.glob("weights-*.safetensors"):
            if old.name != weights:
                old.unlink()
    except OSError as error:
        raise ArtefactError(f"{folder} could not be written ({error.strerror or error}); what was there before is "
                            "intact. Free some space or choose another folder.") from error


def load_program(folder: Path) -> Program:
    """A saved Program. Raises ArtefactError where a file is missing, truncated, altered or of another version."""
    head = _read_head(folder / FILE)
    try:
        file = folder / Path(head["weights_file"]).name
        payload = file.read_bytes()
        if hashlib.sha256(payload).hexdigest() != head["weights_sha256"]:
            raise ArtefactError(f"{file} is not what was saved (its SHA-256 differs): it is truncated or altered; save "
                                "the network again.")
        if _digest(head["program"]) != head["sha256"]:
            raise ArtefactError(f"{folder / FILE} was altered after it was saved; save the network again.")
        return from_json(head["program"], load_tensors(payload))
    except OSError as error:
        raise ArtefactError(f"{folder}: {error.strerror or error}; the weights file is missing. Copy the whole "
                            "folder.") from error
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, LoweringError) as error:
        raise ArtefactError(f"{folder} does not hold a Program that this version reads: {error}.") from error


def _read_head(file: Path) -> dict[str, Any]:
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(f"{file} cannot be read ({error.strerror or error}); pass the folder that was saved to."
                            ) from error
    except ValueError as error:
        raise ArtefactError(f"{file} is truncated or no JSON ({error}); save the network again.") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ArtefactError(f"{file} is no saved Program.")
    if head.get("version") != VERSION:
        raise ArtefactError(f"{file} has version {head.get('version')}, this library reads {VERSION}; use the version "
                            "that wrote it, or save the network again.")
    return head


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _dim(dim: Dim) -> list[int]:
    return [dim.scale, dim.offset]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _leaf(item: Any) -> Any:
    if isinstance(item, Slot):
        return {"slot": item.name}
    if isinstance(item, Dim):
        return {"dim": _dim(item)}
    if item is None or isinstance(item, (bool, int, float, str)):
        return {"value": item}
    raise ArtefactError(f"an argument or output of type {type(item).__name__} has no JSON form.")


def _read_leaf(item: Mapping[str, Any], slots: Mapping[str, Slot]) -> Any:
    if "slot" in item:
        return slots[item["slot"]]
    return Dim(*item["dim"]) if "dim" in item else item["value"]


def _step(step: Step) -> dict[str, Any]:
    end = step.epilogue
    epilogue = {"bias": end.bias, "residual": end.residual.name if end.residual else None,
                "residual_last": end.residual_last,
                "activation": None if end.activation is None else
                [end.activation.kind, *map(_number, end.activation.constants)]}
    return {"op": step.op, "name": step.name, "inputs": [s.name for s in step.inputs],
            "outputs": [s.name for s in step.outputs], "attributes": dict(step.attributes),
            "weights": dict(step.weights), "epilogue": epilogue if end else None, "macs": _dim(step.macs),
            "source": step.source, "place": step.place}


def _number(value: float) -> Any:
    return value if abs(value) < float("inf") else repr(value)      # JSON has no infinity


def _read_step(data: Mapping[str, Any], slots: Mapping[str, Slot]) -> Step:
    end = data["epilogue"] or {}
    activation, residual = end.get("activation"), end.get("residual")
    epilogue = Epilogue(
        end.get("bias"), None if activation is None else Activation(activation[0], tuple(map(float, activation[1:]))),
        None if residual is None else slots[residual], end.get("residual_last", False))
    return Step(data["op"], data["name"], tuple(slots[n] for n in data["inputs"]),
                tuple(slots[n] for n in data["outputs"]), data["attributes"], data["weights"], epilogue,
                Dim(*data["macs"]), data["source"], data["place"])
