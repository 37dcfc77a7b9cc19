"""What ``compress`` returns, on disk and back: safetensors and JSON, checked on the way in, never pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunekern.backends import Lowered, lower
from prunekern.core import structure
from prunekern.core.files import replace_all
from prunekern.core.plan import Plan
from prunekern.errors import ArtefactError, LoweringError, ModelError, UnsupportedOp
from prunekern.graph.inputs import Call
from prunekern.ops import REGISTRY
from prunekern.prune.oneshot import groups_of
from prunekern.prune.portable import from_data, state_of, to_data
from prunekern.prune.prove import Proof
from prunekern.prune.rebuild import rebuild
from prunekern.prune.rewrite import rewrite
from prunekern.prune.schedule import Step
from prunekern.report import Report
from prunekern.train.evaluate import kept_modes

FORMAT, VERSION = "prunekern-result", 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Result:
    """A compressed network.

    model:   an nn.Module, smaller: fine-tune it, export it. ``form`` is 'class' (the user's own) or 'graph'
             (rewritten; ``notes`` say why).
    plan:    what was kept of the original. steps: every pruning step with its proof; ``proof`` is the last.
    lowered: the same network as planned GEMMs; None where lowering was not asked for. It holds the weights of that
             moment: after fine-tuning ``model``, lower it again (``save`` does so by itself).
    report:  ``.show()`` in a terminal, ``.save(folder)`` as HTML, JSON and PNG.
    example: the inputs it was traced on.
    """

    model: nn.Module
    plan: Plan
    form: str
    steps: tuple[Step, ...]
    example: Call
    report: Report
    lowered: Lowered | None = None
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def proof(self) -> Proof | None:
        return self.steps[-1].proof if self.steps else None

    def __str__(self) -> str:
        rows = [f"{type(self.model).__name__} ({'your class' if self.form == 'class' else 'rewritten graph'})"]
        rows += [f"  {what}: {before:,} -> {after:,} ({after / before:.1%})"
                 for what, (before, after) in self.plan.costs.items() if before]
        rows += [f"  {name}: {value}" for name, value in self.metrics.items()]
        rows += [f"  {self.proof}"] if self.proof else []
        return "\n".join(rows + [f"  note: {note}" for note in self.notes])

    def save(self, folder: str | Path) -> Path:
        """Write plan, weights, graph, lowered Program and report data below ``folder``; the manifest comes last.

        Everything is written beside its place first, so a full disk or a kill leaves an older result as it
        was. Raises ArtefactError where something could not be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        except OSError as error:
            raise _unwritten(folder, error) from error
        try:
            notes = self._fill(stage)
            files = sorted(p for p in stage.rglob("*") if p.is_file())
            manifest = {"format": FORMAT, "version": VERSION, "form": self.form, "notes": [*self.notes, *notes],
                        "inputs": _inputs_data(self.example), "steps": [step.to_json() for step in self.steps],
                        "metrics": dict(self.metrics), "training": self.model.training,
                        "files": {p.relative_to(stage).as_posix(): _digest(p.read_bytes()) for p in files}}
            manifest = json.loads(json.dumps(manifest, default=str))
            (stage / MANIFEST).write_text(json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1))
            replace_all({folder / p.relative_to(stage): p for p in (*files, stage / MANIFEST)})
        except OSError as error:
            raise _unwritten(folder, error) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return folder

    def _fill(self, stage: Path) -> list[str]:
        notes = []
        (stage / "plan.json").write_text(json.dumps(self.plan.to_json(), indent=1))
        (stage / "weights.safetensors").write_bytes(save_tensors(_plain(self.model.state_dict())))
        (stage / "report.json").write_text(self.report.to_json())
        with kept_modes(self.model, train=False):
            groups = groups_of(self.model, self.example)
            graph = rewrite(groups.labels, groups.everything(), self.model, REGISTRY, layers=False)
            lowered = self._lowered_now()
        try:
            (stage / "graph.json").write_text(json.dumps(to_data(graph)))
            (stage / "graph.safetensors").write_bytes(save_tensors(_plain(state_of(graph))))
        except (UnsupportedOp, ArtefactError) as error:
            notes.append(f"the graph form is not saved, load with the model class: {error}")
        if lowered is not None:
            lowered.save(stage / "program")
        return notes

    def _lowered_now(self) -> Lowered | None:
        """The lowered network of the weights as they are: the model may have been fine-tuned since."""
        if self.lowered is None:
            return None
        try:
            self.lowered.verify(self.model, *self.example.args, **self.example.kwargs)
            return self.lowered
        except LoweringError:
            return lower(self.model, self.example, backend=self.lowered.asked)


def load(path: str | Path, model: nn.Module | None = None, *, backend: str = "auto") -> Result:
    """A saved result. With a fresh dense ``model`` (the class it was made from) that is copied, shrunk to the
    saved plan and filled; without, the rewritten graph module comes back.

    Raises ArtefactError (missing, truncated or altered files, another version), PlanError (``model`` is not
    the network the plan was made for).
    """
    folder = Path(path)
    manifest = _manifest(folder)
    with _reading(folder):
        plan, example = Plan.from_json(_json(folder, "plan.json")), _inputs_from(manifest["inputs"])
        steps = tuple(Step.from_json(step) for step in manifest["steps"])
        report = Report.from_json((folder / "report.json").read_text())
        weights = load_tensors((folder / "weights.safetensors").read_bytes())
    if model is not None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"model is a {type(model).__name__}, not a torch.nn.Module; pass the dense model itself.")
        with kept_modes(model, train=False):        # a fresh model is in training mode
            groups = groups_of(model, example.map(lambda t: t.to(_device(model))), policy=plan.policy)
            module, form = rebuild(model, groups, plan, manifest["form"], weights), str(manifest["form"])
    elif "graph.json" in manifest["files"]:
        with _reading(folder):
            tensors = load_tensors((folder / "graph.safetensors").read_bytes())
            module, form = from_data(_json(folder, "graph.json"), tensors), "graph"
    else:
        raise ArtefactError(f"{folder} holds no graph form; pass a fresh dense model: load(path, model=...).")
    module.train(bool(manifest["training"]))
    lowered = Lowered.load(folder / "program", backend) if "program/program.json" in manifest["files"] else None
    return Result(module, plan, form, steps, example, report, lowered, tuple(manifest["notes"]), manifest["metrics"])


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise ArtefactError(f"{folder} holds no saved result (no {MANIFEST}); pass the folder that Result.save wrote.")
    with _reading(folder):
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ArtefactError(f"{path} has format {manifest['format']!r}, version {manifest['version']!r}; this "
                                f"prunekern reads {FORMAT} version {VERSION}; load it with the one that saved it.")
        if manifest.pop("sha256") != _seal(manifest):
            raise ArtefactError(f"{path} is not what was saved (truncated or altered); save it again.")
        for name, digest in manifest["files"].items():
            if _digest((folder / name).read_bytes()) != digest:
                raise ArtefactError(f"{folder / name} is not what was saved (truncated or altered); save it again.")
        return dict(manifest)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Whatever goes wrong while files are understood, the artefact is to blame."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        raise ArtefactError(f"{folder} is incomplete or damaged ({type(error).__name__}: {error}); "
                            "save it again.") from error


def _seal(manifest: Mapping[str, Any]) -> str:
    """The digest of a manifest, however it is laid out."""
    return _digest(json.dumps(manifest, sort_keys=True).encode())


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies; safetensors refuses memory that is shared."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _unwritten(folder: Path, error: OSError) -> ArtefactError:
    return ArtefactError(f"{folder} could not be written: {error}. What was there before is still there; free "
                         "some space or choose another folder.")


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def _inputs_data(call: Call) -> dict[str, Any]:
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    described = [{"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch."),
                  **({} if leaf.is_floating_point() else {"values": leaf.reshape(-1).tolist()})}
                 if isinstance(leaf, Tensor) else {"value": leaf} for leaf in leaves]
    return {"leaves": described, "spec": structure.dumps(spec)}


def _inputs_from(data: Mapping[str, Any]) -> Call:
    """Example inputs again: floats drawn at random (only their shape matters), all else as it was."""
    generator = torch.Generator().manual_seed(0)

    def leaf(item: Mapping[str, Any]) -> Any:
        if "value" in item:
            return item["value"]
        dtype, shape = getattr(torch, item["dtype"]), item["shape"]
        if "values" in item:
            return torch.tensor(item["values"], dtype=dtype).reshape(shape)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    spec = structure.loads(data["spec"])
    args, kwargs = pytree.tree_unflatten([leaf(item) for item in data["leaves"]], spec)
    return Call(tuple(args), kwargs)
