"""Recurrent layers and cells on the engine: every kind, way and number of threads against fp64, on every instruction
set; what is packed where; what stays an ATen step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.backends import Lowered, lower
from prunekern.backends.cpu import recurrent
from prunekern.backends.cpu.native import Isa, instruction_sets
from prunekern.errors import LoweringError
from prunekern.lower.tolerance import error, limit

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the extension is not built")

KINDS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN,
                         "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKERN_TUNE", "off")


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for each in value for leaf in tensors(each)]


def held(model: nn.Module, *inputs: Tensor, threads: int = 1, **options: Any) -> Lowered:
    """A network on the engine, its outputs held to fp64 beside torch's own."""
    model = model.eval()
    lowered = lower(model, inputs, backend="cpu", num_threads=threads, verify=False, **options)
    with torch.no_grad():
        own = tensors(model(*inputs))
        exact = tensors(model.double()(*(x.double() for x in inputs)))
    model.float()
    for ours, theirs, truth in zip(tensors(lowered(*inputs)), own, exact, strict=True):
        assert error(ours, truth) <= limit(error(theirs, truth), torch.float32)
    return lowered


def native_ops(lowered: Lowered) -> list[str]:
    (placement,) = lowered._placements.values()
    assert not placement.builder.foreign  # type: ignore[attr-defined]
    return [op.op for op in placement.network.recipe.ops]  # type: ignore[attr-defined]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("hidden", "layers", "both", "first", "batch"), [
    (1, 1, False, True, 1), (7, 2, True, True, 3), (16, 1, True, False, 8), (33, 1, False, False, 17),
    (70, 2, False, True, 5)])
def test_layers(monkeypatch: pytest.MonkeyPatch, isa: str, kind: str, hidden: int, layers: int, both: bool, first: bool,
                batch: int) -> None:
    monkeypatch.setenv("PRUNEKERN_ISA", isa)
    torch.manual_seed(0)
    model = KINDS[kind](11, hidden, layers, bidirectional=both, batch_first=first)
    lowered = held(model, torch.randn((batch, 6, 11) if first else (6, batch, 11)))
    assert [step.op for step in lowered.program.steps] == ["recurrent"]         # no step for the zeros it starts from
    assert native_ops(lowered).count("recurrent") == layers * (1 + both)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_given_states(kind: str, bias: bool) -> None:
    torch.manual_seed(1)

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = KINDS[kind](5, 19, 2, bidirectional=True, bias=bias)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return self.layer(x, (h, c) if kind == "lstm" else h)
    lowered = held(Given(), torch.randn(4, 3, 5), torch.randn(4, 3, 19), torch.randn(4, 3, 19))
    assert len(lowered.program.steps[-1].inputs) == (3 if kind == "lstm" else 2)


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
@pytest.mark.parametrize(("batch", "both", "ways"), [
    (1, False, "columns"), (1, True, "directions"), (9, False, "rows")])
def test_ways_of_sharing_work(monkeypatch: pytest.MonkeyPatch, kind: str, batch: int, both: bool, ways: str) -> None:
    """Threads share the columns of every time step, the directions, or the rows of the batch."""
    monkeypatch.setattr(recurrent, "SPLIT_MACS", 1)
    torch.manual_seed(2)
    model = KINDS[kind](24, 150, bidirectional=both, batch_first=True)
    lowered = held(model, torch.randn(batch, 5, 24), threads=2)
    (placement,) = lowered._placements.values()
    recipe = placement.network.recipe  # type: ignore[attr-defined]
    split = [op.fields.get("split", 0) for op in recipe.ops if op.op == "recurrent"]
    assert split == {"columns": [1] * 5, "directions": [0, 0], "rows": [0]}[ways]
    assert [len(group) - 1 for group in recipe.groups] == ([2] if ways == "directions" else [])
    again = [lowered(torch.ones(batch, 5, 24))[0] for _ in range(20)]
    assert all(torch.equal(each, again[0]) for each in again)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda cell: cell.__name__)
def test_cells(cell: Any) -> None:
    torch.manual_seed(3)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(6, 21)

        def forward(self, x: Tensor) -> Any:
            state = self.cell(x[:, 0])
            for i in range(1, 4):
                state = self.cell(x[:, i], state)
            return state
    lowered = held(Loop(), torch.randn(2, 4, 6))
    assert sum(step.op == "recurrent" for step in lowered.program.steps) == 4
    assert "aten" not in {step.op for step in lowered.program.steps}


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_where_it_is(kind: str) -> None:
    torch.manual_seed(4)
    model = KINDS[kind](4, 9, batch_first=True).eval()
    x = torch.randn(3, 5, 4)
    x[1, 2, 0] = torch.nan
    lowered = lower(model, torch.randn(3, 5, 4), backend="cpu", verify=False)
    with torch.no_grad():
        for ours, theirs in zip(tensors(lowered(x)), tensors(model(x)), strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())


def test_a_view_and_a_slice_are_read_where_they_are() -> None:
    torch.manual_seed(5)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.layer = nn.Conv1d(3, 8, 3, padding=1), nn.GRU(8, 12, batch_first=True)
            self.head = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.layer(self.front(x).transpose(1, 2))[0][:, -1])
    native_ops(held(Tagger(), torch.randn(3, 3, 10)))


def test_weights_in_half_the_bytes() -> None:
    torch.manual_seed(6)
    model = nn.LSTM(32, 40, batch_first=True).eval()
    x = torch.randn(2, 7, 32)
    plain, half = (lower(model, x, backend="cpu", weights=weights) for weights in ("fp32", "fp16"))
    assert half.verification is not None
    assert 1e-6 < error(half(x)[0], plain(x)[0]) < 2e-3


def test_panels_hold_all_gates_of_some_units() -> None:
    rows = torch.arange(3 * 5 * 2, dtype=torch.float32).view(15, 2)             # three gates of five units, K = 2
    panels = recurrent.in_panels(rows, 5, 3, 1, Isa("portable", 4, 2))
    assert panels.shape == (2, 12, 2)
    assert torch.equal(panels[0, 4:8], rows[5:9])                               # second gate, units 0 to 3
    assert torch.equal(panels[1, 8], rows[14])                                  # third gate, unit 4
    assert not panels[1, 9:].any()


def test_projections_stay_aten_steps() -> None:
    lowered = lower(nn.LSTM(5, 7, proj_size=3, batch_first=True).eval(), torch.randn(2, 4, 5), backend="cpu")
    assert "aten" in {step.op for step in lowered.program.steps}
    assert "recurrent" not in {step.op for step in lowered.program.steps}


def test_a_wrong_cell_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another nonlinearity is noticed at the step itself."""
    monkeypatch.setitem(recurrent.KINDS, "rnn_tanh", recurrent.KINDS["rnn_relu"])
    with pytest.raises(LoweringError, match="recurrent"):
        lower(nn.RNN(5, 7, batch_first=True).eval(), torch.randn(2, 4, 5), backend="cpu")
