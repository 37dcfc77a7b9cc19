"""What one step of the study left behind, the folder it lies in, and the table of all steps."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from prunekern.core.files import write_bytes, write_text
from prunekern.core.plan import Plan
from prunekern.errors import ArtefactError
from prunekern.prune.prove import Proof
from prunekern.prune.rebuild import fill
from prunekern.recipes.fashion_mnist.network import LAYERS, FashionNet, Widths
from prunekern.train import History

VERSION = 1


@dataclass(frozen=True)
class Record:
    """One row of the table. Number 0 is the original, which has no triplet.

    before, after_pruning, after_retraining: accuracy on the validation split; drop: before minus
    after_retraining, in points, what this step alone cost; total_drop: the same against the original.
    removed: the channels that went, as numbered in the original; widths: what is left. macs: of one image, by
    formula; planned_macs: as the plan predicted them; fvcore_macs: as fvcore counts them (None: not installed).
    """

    number: int
    stage: str
    layer: str
    heuristic: str
    removed: tuple[int, ...]
    widths: Widths
    before: float | None
    after_pruning: float | None
    after_retraining: float
    drop: float | None
    total_drop: float
    accepted: bool
    train: float | None
    test: float
    macs: int
    planned_macs: int
    fvcore_macs: int | None
    params: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self.widths))

    @property
    def left(self) -> int:
        """Channels of the layer that this step worked on."""
        return self.widths[LAYERS.index(self.layer)]


@dataclass(frozen=True)
class Stored:
    """A finished step as its folder holds it. plan: relative to the original; proof: of this step alone.
    seconds: wall time of tracing, slicing, proving."""

    record: Record
    history: History
    plan: Plan
    proof: Proof | None
    seconds: Mapping[str, float]


class Store:
    """The study's folder: a step a subfolder, in which step.json is written last.

    Raises ArtefactError where the folder belongs to a study with other settings, or a file was altered.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self._claim()

    def _claim(self) -> None:
        path = self.folder / "study.json"
        if not path.exists():
            write_text(path, json.dumps(self.identity, indent=1))
            return
        found = _read(path)
        if found != self.identity:
            theirs = found if isinstance(found, dict) else {}
            other = [key for key, value in self.identity.items() if theirs.get(key) != value]
            raise ArtefactError(f"{self.folder} holds a study with other settings ({', '.join(other)}); choose another "
                                "folder with --out, or delete this one to start again.")

    def step(self, number: int) -> Path:
        return self.folder / "steps" / f"{number:03d}"

    def write(self, stored: Stored, model: torch.nn.Module) -> None:
        """Weights first, then the record that vouches for them; the training's checkpoint is no longer needed."""
        folder, number = self.step(stored.record.number), stored.record.number
        data = save({name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()})
        write_bytes(folder / "model.safetensors", data)
        write_text(folder / "step.json", json.dumps({
            "format": "prunekern-study-step", "version": VERSION, "number": number, "sha256": _sha256(data),
            "record": asdict(stored.record), "history": stored.history.to_dict(), "plan": stored.plan.to_json(),
            "proof": None if stored.proof is None else stored.proof.to_json(), "seconds": dict(stored.seconds)},
            indent=1))
        self.checkpoint(number).unlink(missing_ok=True)

    def checkpoint(self, number: int) -> Path:
        """Where the training of a step is written down after every epoch."""
        return self.step(number) / "training.safetensors"

    def read(self, number: int) -> Stored | None:
        """A finished step, or None."""
        path = self.step(number) / "step.json"
        if not path.exists():
            return None
        data = _read(path)
        try:
            record = {**data["record"], "removed": tuple(data["record"]["removed"]),
                      "widths": tuple(data["record"]["widths"])}
            proof = data["proof"] and Proof(**{**data["proof"], "blunt": tuple(data["proof"]["blunt"]),
                                               "notes": tuple(data["proof"]["notes"])})
            found = Stored(Record(**record), History.from_dict(data["history"]), Plan.from_json(data["plan"]), proof,
                           data["seconds"])
            if _sha256((self.step(number) / "model.safetensors").read_bytes()) != data["sha256"]:
                raise ValueError("its weights are not those that were saved")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {error}); delete {path.parent} to make "
                                "this step again.") from error
        return found

    def model(self, record: Record) -> FashionNet:
        """The network that a step left."""
        model = FashionNet(record.widths)
        fill(model, load((self.step(record.number) / "model.safetensors").read_bytes()))
        return model.eval()

    def write_table(self, records: Sequence[Record]) -> None:
        """table.json and table.csv; the same study gives the same bytes."""
        rows = [asdict(record) for record in records]
        write_text(self.folder / "table.json", json.dumps({
            "format": "prunekern-study-table", "version": VERSION, "study": self.identity, "steps": rows}, indent=1))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: " ".join(map(str, value)) if isinstance(value, tuple) else value
                          for key, value in row.items()} for row in rows)
        write_text(self.folder / "table.csv", text.getvalue())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); delete {path.parent} to start again.") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
