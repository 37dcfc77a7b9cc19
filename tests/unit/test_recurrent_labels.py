"""Recurrent layers lose hidden units: every kind and way, packed sequences, states from everywhere."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from prunekern import Target, lower, profile, prune
from prunekern.core.labels import Tape
from prunekern.errors import ProofError
from prunekern.graph.labels import frozen_report
from prunekern.ops import REGISTRY
from prunekern.prune.oneshot import Pruned
from prunekern.prune.portable import from_data, state_of, to_data
from prunekern.prune.rewrite import rewrite
from tests.pruning import cut, groups_of, random_choice
from tests.tolerances import assert_equal_fp64

KINDS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN,
                         "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}
HALF = Target(layers={"*": 0.5})


class Net(nn.Module):
    """A linear layer, a recurrent one, and a linear layer on what ``use`` says: y, h (of the last layer) or c."""

    def __init__(self, layer: nn.RNNBase, use: str = "y") -> None:
        super().__init__()
        self.first, self.rnn, self.use = nn.Linear(5, layer.input_size), layer, use
        outputs = layer.hidden_size if use == "c" else layer.proj_size or layer.hidden_size
        self.last = nn.Linear(outputs * (1 + layer.bidirectional if use == "y" else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y, states = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        if self.use == "y":
            return self.last(y if self.rnn.batch_first else y.transpose(0, 1))
        h, c = states if isinstance(states, tuple) else (states, None)
        return self.last((c if self.use == "c" else h)[-1])


def halved(model: nn.Module, *inputs: Tensor) -> Pruned:
    return prune(model.eval(), inputs, HALF, criterion="l2")


@pytest.mark.parametrize("use", ["y", "h"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "both", "bias", "first"), [
    (1, False, True, True), (1, True, False, False), (2, False, False, True), (2, True, True, False)])
def test_half_of_every_family(kind: str, layers: int, both: bool, bias: bool, first: bool, use: str) -> None:
    net = Net(KINDS[kind](6, 8, layers, bias=bias, bidirectional=both, batch_first=first), use)
    result = halved(net, torch.randn(2, 4, 5))
    assert result.proof.form == "class"
    assert result.proof.teeth > 0.5                     # the last state is that of one direction
    assert (result.model.rnn.input_size, result.model.rnn.hidden_size) == (3, 4)  # type: ignore[union-attr]
    before, after = result.plan.costs["macs"]
    assert after < 0.4 * before
    assert profile(result.model, torch.randn(2, 4, 5), batch=1).total.macs == after
    inputs = torch.randn(3, 4, 5)
    for backend in ("reference", "cpu") if (kind, use) == ("gru", "y") else ():
        lowered = lower(result.model, inputs, backend=backend)
        torch.testing.assert_close(lowered(inputs), result.model(inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use", ["y", "h", "c"])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (1, True), (2, True)])
def test_projection_keeps_fewer_outputs_than_units(layers: int, both: bool, use: str) -> None:
    net = Net(nn.LSTM(6, 5, layers, bidirectional=both, proj_size=4, batch_first=True), use).eval()
    groups = groups_of(net, torch.randn(2, 4, 5))
    sizes = set()
    for seed in range(8):
        rnn = cut(net, groups, random_choice(groups, seed)).model.rnn
        assert 1 <= rnn.proj_size < rnn.hidden_size  # type: ignore[union-attr]
        assert rnn.weight_hr_l0.shape == (rnn.proj_size, rnn.hidden_size)  # type: ignore[union-attr]
        sizes.add((rnn.proj_size, rnn.hidden_size))  # type: ignore[union-attr]
    assert len(sizes) > 1


class Packed(nn.Module):
    """Sequences of unequal lengths."""

    def __init__(self, ordered: bool, use: str, layer: nn.RNNBase) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, 6), layer
        self.last, self.ordered, self.use = nn.Linear(16, 3), ordered, use

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=self.ordered)
        y, states = self.rnn(packed)
        if self.use == "h":
            h = states[0] if isinstance(states, tuple) else states
            return self.last(torch.cat((h[-2], h[-1]), 1))
        return self.last(pad_packed_sequence(y, batch_first=True)[0].sum(1))


@pytest.mark.parametrize("use", ["y", "h"])
@pytest.mark.parametrize(("ordered", "kind"), [(True, "lstm"), (False, "lstm"), (False, "gru")])
def test_packed_sequences(ordered: bool, kind: str, use: str) -> None:
    lengths = torch.tensor([5, 4, 2] if ordered else [2, 5, 4])
    net = Packed(ordered, use, KINDS[kind](6, 8, 2, bidirectional=True, batch_first=True))
    result = halved(net, torch.randint(0, 20, (3, 5)), lengths)
    assert result.proof.form == "class"
    assert (result.model.embedding.embedding_dim, result.model.rnn.hidden_size) == (3, 4)  # type: ignore[union-attr]
    assert len(result.model.embedding.weight) == 20                     # type: ignore[union-attr,arg-type]
    result.model(torch.randint(0, 20, (2, 7)), torch.tensor([7, 1]))    # nothing of the example is built in
    lowered = lower(result.model, (torch.randint(0, 20, (3, 5)), lengths), backend="reference")
    inputs = torch.randint(0, 20, (3, 5)), lengths
    torch.testing.assert_close(lowered(*inputs), result.model(*inputs), atol=1e-5, rtol=1e-4)


class Given(nn.Module):
    """States that come from outside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(5, 6), layer, nn.Linear(8, 3)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNCellBase):
            return self.last(self.layer(self.first(x), state))
        return self.last(self.layer(self.first(x), state.transpose(0, 1).contiguous())[0])


@pytest.mark.parametrize(("layer", "x", "state"), [(nn.GRU(6, 8, batch_first=True), (2, 4, 5), (2, 1, 8)),
                                                    (nn.GRUCell(6, 8), (2, 5), (2, 8))])
def test_states_from_outside_hold_their_units(layer: nn.Module, x: tuple[int, ...], state: tuple[int, ...]) -> None:
    groups = groups_of(Given(layer).eval(), (torch.randn(x), torch.randn(state)))
    assert [family.name for family in groups] == ["first"]
    assert any("comes from outside" in line for line in frozen_report(groups.labels))


class Literal(nn.Module):
    """Zeros of a literal size and of the usual dtype, on another device perhaps."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(6, 8, 2, dropout=0.5, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(2, x.size(0), 8).to(x.device)
        return self.last(self.rnn(x, (h, torch.zeros_like(h)))[0][:, -1])


def test_graph_form_is_a_module_like_any_other(tmp_path: Any) -> None:
    """Dropout between layers follows train(), zeros follow double(), and all of it can be written down."""
    result, x = halved(Literal(), torch.randn(2, 5, 6)), torch.randn(3, 5, 6)
    assert result.proof.form == "graph"
    assert result.proof.dtype == "float64"
    model = result.model
    torch.testing.assert_close(model(x), model(x), atol=0, rtol=0)
    model.train()
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    bare = rewrite(result.groups.labels, result.keep, copy.deepcopy(model), REGISTRY, layers=False)
    again = from_data(json.loads(json.dumps(to_data(bare))), state_of(bare))
    torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    assert again.train()(x).shape == (3, 3)
    assert_equal_fp64(copy.deepcopy(model).double()(x.double()), model(x).double(), 1e-5)


def test_proof_hears_what_goes_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that are gone must not count a time step later: a reference that lets them is not what was sliced."""
    net, x = Net(nn.GRU(6, 8, batch_first=True)).eval(), torch.randn(2, 4, 5)
    groups = groups_of(net, x)
    keep = random_choice(groups, 1)
    assert not bool(keep.all())
    cut(net, groups, keep)
    finish = Tape.give_list

    def unmasked(tape: Tape, node: Any, items: Any) -> None:
        tape.masked.pop(node, None)
        finish(tape, node, items)
    monkeypatch.setattr(Tape, "give_list", unmasked)
    loose = groups_of(net, x)
    with pytest.raises(ProofError):
        cut(net, loose, random_choice(loose, 1))
