"""Outputs and inputs in every nest that users return: dataclasses, named tuples, None; closed classes are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekern as pk
from prunekern import Target
from prunekern.core import structure
from prunekern.errors import ArtefactError, TraceError
from prunekern.graph.inputs import Call
from prunekern.graph.trace import trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Inner:
    score: Tensor


@dataclass
class Output:
    logits: Tensor
    rest: Any = None


@dataclass
class Given:
    image: Tensor
    scale: float = 2.0
    more: Any = None


class Pair(NamedTuple):
    logits: Tensor
    rest: Any


class Closed:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Net(nn.Module):
    """hard: a forward that holds a width, so the result is a graph module."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any], hard: bool = False) -> None:
        super().__init__()
        self.conv, self.head, self.make, self.hard = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), make, hard

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv(x))
        x = x.view(-1, 8, 36).mean(2) if self.hard else x.mean((2, 3))
        return self.make(self.head(x), x.sum(1))


NESTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": Output, "with None": lambda a, b: Output(a),
    "nested": lambda a, b: {"out": Output(a, [Inner(b), None])},
    "named tuple": Pair, "mixed": lambda a, b: (a, None, [Pair(b, {"n": None, "i": 3})], "text"),
}


@pytest.mark.parametrize("hard", [False, True], ids=["class", "graph"])
@pytest.mark.parametrize("name", NESTS)
def test_outputs_keep_their_nest(name: str, hard: bool, tmp_path: Path) -> None:
    model = Net(NESTS[name], hard).eval()
    result = pk.compress(model, X, Target(layers={"conv": 0.5}))
    assert result.form == ("graph" if hard else "class")
    result.save(tmp_path)
    loaded = pk.load(tmp_path)
    wanted = result.model(X)
    assert type(wanted) is type(model(X))
    assert result.lowered is not None
    assert loaded.lowered is not None
    for found in (loaded.model(X), result.lowered(X), loaded.lowered(X)):
        assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(wanted)
        tensors = [(a, b) for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, wanted)), strict=True)
                   if isinstance(b, Tensor)]
        assert tensors
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in tensors)


def test_dataclasses_are_registered_and_that_is_said() -> None:
    @dataclass
    class Own:
        logits: Tensor

    model = Net(lambda a, b: Own(a)).eval()
    assert any("dataclass Own was registered" in note for note in trace(model, X).notes)
    assert trace(model, X).notes == ()                         # it is known now


def test_a_dataclass_goes_in() -> None:
    class Scaled(Net):
        def forward(self, given: list[Given]) -> Tensor:
            return super().forward(given[0].image * given[0].scale)

    graph = trace(Scaled(lambda a, b: a).eval(), Call(([Given(X)],), {}))
    assert graph.free_batch


def test_what_cannot_be_seen_is_refused() -> None:
    with pytest.raises(TraceError, match=r"Net.forward returns a Closed.*tuples, lists, dicts or dataclasses"):
        trace(Net(lambda a, b: Closed(a)).eval(), X)
    with pytest.raises(TraceError, match="returns no tensor"):
        trace(Net(lambda a, b: None).eval(), X)


def test_structures_of_unknown_classes_are_named() -> None:
    """In a process that has not imported the class; importing it is enough."""
    text = structure.dumps(torch.utils._pytree.tree_structure(Pair(1, {"a": 2})))
    read = ("import sys\nfrom prunekern.core import structure\n{}\n"
            "print(structure.loads(sys.argv[1]).num_leaves)")
    command = [sys.executable, "-c", read.format("import tests.unit.test_structure"), text]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "2"
    found = subprocess.run([sys.executable, "-c", read.format(""), text], capture_output=True, text=True, check=False)
    assert "ArtefactError" in found.stderr
    assert "tests.unit.test_structure.Pair, which this process does not know" in found.stderr
    with pytest.raises(ArtefactError, match=r"no\.such\.Class"):
        structure.loads(text.replace("tests.unit.test_structure.Pair", "no.such.Class"))


def test_inputs_of_every_kind() -> None:
    class Many(Net):
        def forward(self, x: Tensor, table: Tensor, *, mask: Tensor | None = None, flip: bool = False,
                    power: int = 1) -> Tensor:
            x = (x.flip(-1) if flip else x) ** power
            return super().forward(x) + table.sum(0)

    table = torch.randn(5, 3)
    result = pk.compress(Many(lambda a, b: a).eval(), Call((X, table), {"mask": None, "flip": True, "power": 2}),
                         Target(layers={"conv": 0.5}))
    wanted = result.model(X, table, mask=None, flip=True, power=2)
    assert result.lowered is not None
    assert torch.allclose(result.lowered(X, table, mask=None, flip=True, power=2), wanted, atol=1e-5)
    assert result.model(X[:1], table, flip=True, power=2).shape == (1, 3)
