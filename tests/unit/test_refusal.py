"""A forward that depends on the data: the line that stops it, and which parts can be compressed all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekern as pk
from prunekern.errors import TraceError
from prunekern.graph.trace import trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        features = self.pooled(self.backbone(x))
        return self.heads[0](features) if features.sum() > 0 else self.heads[1](features)      # the line

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class ByNumpy(Branch):
    """What goes through NumPy would be a constant of the graph."""

    def pooled(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](self.pooled(self.backbone(x)))


class ByNumber(Branch):
    """A scale that is read out of the activations holds for the example only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return self.heads[0](self.pooled(x) / float(x.detach().numpy().max()))


def refused(model: nn.Module) -> str:
    return str(refusal_of(model))


def refusal_of(model: nn.Module) -> TraceError:
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(TraceError) as caught:
        trace(model, X)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before
    return caught.value


def test_the_line_and_the_parts_that_can_be_compressed() -> None:
    model = Branch().eval()
    error = refusal_of(model)
    text = str(error)
    assert "test_refusal.py" in text
    assert error.line in text
    assert error.line.endswith("# the line`")
    assert error.parts[0][0] == "backbone"
    path, inputs = error.parts[-1]
    assert pk.prune(model.get_submodule(path), inputs, pk.Target(macs=0.6)).proof.twin_error < 1e-9
    assert "`return self.heads[0](features) if features.sum() > 0 else self.heads[1](features)      # the line`" in text
    assert "here 'backbone' (inputs args[0]: (2, 3, 8, 8) float32); 'heads." in text
    assert "prunekern.compress(model.backbone, its_inputs)" in text
    model.backbone = pk.prune(model.backbone, X, pk.Target(macs=0.6)).model         # the recipe
    assert model(X).shape == (2, 3)


@pytest.mark.parametrize("kind", [ByNumpy, ByNumber])
def test_a_recording_that_holds_for_the_example_only_is_refused(kind: type[Branch]) -> None:
    text = refused(kind().eval())
    assert "test_refusal.py" in text
    assert ".numpy()" in text


def test_parts_whose_name_is_no_attribute_are_spelled_out() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Branch()])

        def forward(self, x: Tensor) -> Any:
            return self.parts[0](x)

    assert "prunekern.compress(model.get_submodule('parts.0.backbone'), its_inputs)" in refused(Outer().eval())


class Masked(nn.Module):
    """A branch on a mask that the forward makes itself, of ones. spoil: what else happens to the mask."""

    def __init__(self, spoil: Callable[[Tensor, Tensor], Tensor] = lambda mask, x: mask) -> None:
        super().__init__()
        self.embedding, self.spoil = nn.Embedding(9, 6), spoil
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        mask = self.spoil(torch.ones(words.shape[:1]), x)
        return self.body(x) if (mask > 0.5).all() else self.body(x) * mask[:, None, None]


WORDS = torch.tensor([[1, 2, 3], [4, 5, 0]])


def test_a_branch_on_a_constant_is_no_branch() -> None:
    model = Masked().eval()
    graph = trace(model, WORDS)
    assert "aten.mul.Tensor" not in str(graph.fx)
    assert (graph.free_batch, graph.notes) == (True, ())
    assert pk.prune(model, WORDS, pk.Target(macs=0.6)).proof.twin_error < 1e-9


@pytest.mark.parametrize("spoil", [
    lambda mask, x: mask + x.sum() * 1e-9, lambda mask, x: mask.view(-1)[:1].add_(x.sum() * 1e-9) * mask,
    lambda mask, x: mask + torch.from_numpy(x.detach().numpy().mean((1, 2)) * 1e-9)], ids=["sum", "view", "numpy"])
def test_a_branch_on_a_constant_with_values_in_it_is_refused(spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(TraceError):
        trace(Masked(spoil).eval(), WORDS)


def test_a_constant_that_follows_the_batch_is_none() -> None:
    model = Masked(lambda mask, x: mask / mask.sum()).eval()        # all above 0.5 for a batch of one
    with pytest.raises(TraceError):
        trace(model, WORDS[:1])


def test_numbers_that_are_read_elsewhere_while_captured_are_no_answer() -> None:
    """A forward that goes another way while it is captured would be given the answers to other questions."""
    class Aware(Masked):
        def forward(self, words: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and int(words.max()) > 99:
                return self.body(self.embedding(words)) * 0
            return super().forward(words)
    graph = trace(Aware().eval(), WORDS)
    assert "recorded on the example input" in graph.notes[0]
    assert "reads 1 numbers" in graph.notes[1]
    assert "aten.mul.Tensor" not in str(graph.fx)


class Gated(Branch):
    def forward(self, x: Tensor) -> Tensor:
        features = self.pooled(F.relu(self.backbone(x)))
        if features.numpy().shape[0] > 100:
            return features
        return self.heads[0](features)


def test_a_recording_that_holds_is_kept() -> None:
    assert "the branch taken there is assumed" in trace(Gated().eval(), X).notes[0]
