"""The doctor names what can go, what cannot, and the very line that holds it."""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern.doctor import Diagnosis, diagnose
from prunekern.errors import InputError, ModelError
from tests.identity import snapshot
from tests.models import make
from tests.zoo import ZOO

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
HERE = Path(__file__)


def line_of(kind: type, text: str) -> str:
    """'file:line' of the first line of a class that has ``text``."""
    lines, start = inspect.getsourcelines(kind)
    return f"{HERE}:{start + next(i for i, line in enumerate(lines) if text in line)}"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


class Sorted(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = self.conv2(x)
        x = x.cumsum(1)
        return self.fc(x.mean((2, 3)))


class Grouped(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, groups=2)


class HardCoded(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.view(-1, 8, 64).mean(2))


class FixedBatch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(2, 3, 8, 8))


class Residual(Plain):
    """conv1 runs together with the input, whose channels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv2(x + self.conv1(x))).mean((2, 3)))


def diagnosis(kind: type[nn.Module], inputs: Any = X, **options: Any) -> Diagnosis:
    torch.manual_seed(0)
    model = kind().eval()
    before = snapshot(model)
    found = diagnose(model, inputs, **options)
    assert snapshot(model) == before
    return found


def test_what_can_go_and_what_stays() -> None:
    found = diagnosis(Plain)
    assert [(r.name, r.op, r.channels, r.free, r.families, r.why) for r in found.layers] == [
        ("conv1", "conv2d", 6, 6, ("conv1",), ""), ("conv2", "conv2d", 8, 8, ("conv2",), ""),
        ("fc", "linear", 5, 0, (), "output of the network")]
    assert [(f.name, f.channels, f.members, f.modules) for f in found.families] == [
        ("conv1", 6, ("conv1.weight[0]", "conv1.bias[0]", "conv2.weight[1]"), ("conv1", "conv2 (in)")),
        ("conv2", 8, ("conv2.weight[0]", "conv2.bias[0]", "fc.weight[1]"), ("conv2", "fc (in)"))]
    assert found.blockers == ()
    assert found.notes == ()


def test_shares_of_cost() -> None:
    found = diagnosis(Plain)
    macs = {"conv1": 6 * 27 * 64, "conv2": 8 * 54 * 64, "fc": 40}
    params = {"conv1": 6 * 27 + 6, "conv2": 8 * 54 + 8, "fc": 45}
    assert {r.name: r.macs for r in found.layers} == pytest.approx({k: v / sum(macs.values()) for k, v in macs.items()})
    assert {r.name: r.params for r in found.layers} == pytest.approx(
        {k: v / sum(params.values()) for k, v in params.items()})
    assert found.free == pytest.approx(1 - 40 / sum(macs.values()))


def test_blocker_has_the_line_of_the_users_code() -> None:
    found = diagnosis(Sorted)
    (blocker,) = found.blockers
    assert blocker.op == "aten.cumsum"
    assert blocker.source == line_of(Sorted, "x.cumsum(1)")
    assert blocker.layers == ("conv2",)
    assert blocker.reason
    rows = {r.name: r for r in found.layers}
    assert rows["conv1"].free == 6
    assert rows["conv2"].free == 0
    assert "cumsum" in rows["conv2"].why
    assert f"{HERE.name}:{blocker.source.rpartition(':')[2]}" in rows["conv2"].why


def test_sizes_that_are_given() -> None:
    found = diagnosis(Residual)
    row = found.layers[0]
    assert (row.name, row.free) == ("conv1", 0)
    assert "size is given" in row.why
    assert line_of(Residual, "x + self.conv1(x)").rpartition(":")[2] in row.why


def test_grouped_rows() -> None:
    found = diagnosis(Grouped)
    (row,) = found.rows
    assert (row.kind, row.rows, row.size, row.free) == ("balanced", 2, 3, 3)
    assert "as many from each row" in str(row)


@pytest.mark.parametrize(("name", "heads", "width"), [("encoder_layer", 4, 4), ("vit", None, None)])
def test_attention_is_named(name: str, heads: int | None, width: int | None) -> None:
    model, args, kwargs = ZOO[name]()
    found = diagnose(model, args or kwargs)
    rows = [row for row in found.rows if row.kind == "attention"]
    assert rows
    attention = next(r for r in model.modules() if hasattr(r, "num_heads") or hasattr(r, "heads"))
    assert rows[0].rows == getattr(attention, "num_heads", getattr(attention, "heads", None))
    assert "scaled_dot_product_attention" in rows[0].where


def test_smallest_reachable_is_reached() -> None:
    found = diagnosis(Plain)
    torch.manual_seed(0)
    least = pk.compress(Plain().eval(), X, pk.Target(layers={"*": 1e-9}), lower=False)
    assert found.minimum == pytest.approx({n: b / a for n, (a, b) in least.plan.costs.items()})
    assert least.model.conv1.out_channels == 1


def test_trial_says_what_would_come_back() -> None:
    plain, hard = diagnosis(Plain).trial, diagnosis(HardCoded).trial
    assert plain is not None
    assert hard is not None
    assert (plain.form, plain.why) == ("class", ())
    assert hard.form == "graph"
    assert "own class cannot run" in hard.why[0]
    assert "8" in hard.why[0]
    before, after = plain.costs["macs"]
    assert 0 < after < before
    assert diagnosis(Plain, trial=False).trial is None


def test_fixed_batch_is_noted() -> None:
    assert any("fixes its batch" in note for note in diagnosis(FixedBatch).notes)


def test_nothing_to_prune() -> None:
    torch.manual_seed(0)
    found = diagnose(nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4))
    assert found.families == ()
    assert found.trial is None
    assert found.minimum == {}
    assert found.free == 0
    assert "nothing can be pruned" in str(found)


def test_residual_stream_is_one_family() -> None:
    model, inputs = make("resnet20")
    found = diagnose(model, inputs)
    stream = found.families[0]
    assert {"conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"} <= set(stream.layers)
    assert stream.macs == pytest.approx(sum(r.macs for r in found.layers if "conv1" in r.families))
    assert found.trial is not None
    assert found.trial.form == "graph"          # option-A shortcuts pad by numbers in the forward


@pytest.mark.parametrize("name", ["se_block", "shufflenet_v1", "two_modalities", "dict_output", "siamese", "cbam",
                                  "recurrent", "einsum", "packed_qkv"])
def test_any_network(name: str) -> None:
    """Figures add up, and the JSON is JSON."""
    model, args, kwargs = ZOO[name]()
    before = snapshot(model)
    found = diagnose(model, args or kwargs)
    assert snapshot(model) == before
    data = json.loads(json.dumps(found.to_json()))
    assert sum(row["macs"] for row in data["layers"]) == pytest.approx(1)
    assert sum(row["params"] for row in data["layers"]) <= 1 + 1e-9
    for row in found.layers:
        assert 0 <= row.free <= row.channels
        assert bool(row.why) == (row.free < row.channels or not row.channels), row
        assert bool(row.families) == (row.free > 0), row
    assert {f.name for f in found.families} == {f.name for f in pk.groups_of(model, args or kwargs)}
    assert str(found)


def test_shown_in_plain_text() -> None:
    text = io.StringIO()
    diagnosis(Sorted).show(file=text)
    for words in ("conv2", "cumsum", "output of the network", HERE.name, "smallest reachable", "your own class"):
        assert words in text.getvalue()


def test_bad_input() -> None:
    with pytest.raises(ModelError, match="training mode"):
        diagnose(Plain(), X)
    with pytest.raises(InputError, match="forward fails"):
        diagnose(Plain().eval(), X[:, :2])
