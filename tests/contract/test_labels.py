"""Which channels live and die together, read off the labels index by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.core.labels import FIXED, Tape, compact, normalise, spread, varying
from prunekern.core.policy import Policy
from prunekern.core.rule import Registry
from prunekern.graph.groups import Groups, find_groups
from prunekern.graph.labels import frozen_report, label
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from tests.pruning import cut, groups_of
from tests.zoo import ZOO
from tests.zoo.branches import channel_shuffle


class Net(nn.Module):
    """Layers by name, and what forward makes of them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


X = torch.randn(2, 3, 4, 4)


def conv(a: int, b: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, **options)


def groups(forward: Callable[..., Any], *inputs: Tensor, **layers: nn.Module) -> Groups:
    return groups_of(Net(forward, **layers).eval(), inputs or (X,))


def axis(found: Groups, name: str, number: int) -> list[Any]:
    return found.labels.axes[name, number].tolist()


def test_issued_and_consumed() -> None:
    found = groups(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 5), b=conv(5, 2))
    channels = axis(found, "a.weight", 0)
    assert len(set(channels)) == 5
    assert FIXED not in channels
    assert axis(found, "a.bias", 0) == channels
    assert axis(found, "b.weight", 1) == channels
    assert axis(found, "a.weight", 1) == [FIXED] * 3          # the input
    assert axis(found, "b.weight", 0) == [FIXED] * 2          # the output
    family, = found
    assert str(family) == "a: 5 channels: a.weight[0], a.bias[0], b.weight[1]"
    assert [(m.name, m.role) for m in family.members] == [("a.weight", "out"), ("a.bias", "vector"), ("b.weight", "in")]
    assert family.groups.tolist() == channels


def test_norms_and_slopes_go_along() -> None:
    found = groups(lambda m, x: m.b(m.p(m.n(m.a(x)))), a=conv(3, 5), n=nn.BatchNorm2d(5), p=nn.PReLU(5), b=conv(5, 2))
    channels = axis(found, "a.weight", 0)
    for name in ("n.weight", "n.bias", "n.running_mean", "n.running_var", "p.weight"):
        assert axis(found, name, 0) == channels


def test_addition_ties_and_broadcast_does_not() -> None:
    tied = groups(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    assert axis(tied, "a.weight", 0) == axis(tied, "b.weight", 0) == axis(tied, "c.weight", 1)
    gated = groups(lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))), a=conv(3, 4), b=conv(3, 1), c=conv(4, 2))
    assert axis(gated, "a.weight", 0) == axis(gated, "c.weight", 1)
    assert ("b.weight", 0) not in gated.labels.axes                # one channel belongs to nobody


def test_adding_the_input_holds_channels_back() -> None:
    found = groups(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 2))
    assert axis(found, "a.weight", 0) == [FIXED] * 3
    assert not len(found)
    assert frozen_report(found.labels) == []                  # natural: no operator is to blame


def test_concatenation_joins_in_order() -> None:
    found = groups(lambda m, x: m.c(torch.cat((m.b(x), m.a(x), x), 1)), a=conv(3, 2), b=conv(3, 4), c=conv(9, 2))
    assert axis(found, "c.weight", 1) == [*axis(found, "b.weight", 0), *axis(found, "a.weight", 0), 0, 0, 0]


def test_split_slices_and_flips_are_executed() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = m.a(x).split([2, 4], 1)
        return m.b(first) + m.c(second.flip(1)) + m.d(m.a(x)[:, 1:4])
    found = groups(forward, a=conv(3, 6), b=conv(2, 2), c=conv(4, 2), d=conv(3, 2))
    a = axis(found, "a.weight", 0)
    assert axis(found, "b.weight", 1) == a[:2]
    assert axis(found, "c.weight", 1) == a[2:][::-1]
    assert axis(found, "d.weight", 1) == a[1:4]
    assert len(set(a)) == 6


def test_every_other_channel_leaves_in_pairs() -> None:
    """Of blocks that leave as a whole, x[:, 1::2] goes on taking the second."""
    found = groups(lambda m, x: m.b(m.a(x)[:, 1::2]), a=conv(3, 6), b=conv(3, 2))
    a = axis(found, "a.weight", 0)
    assert a == [a[0], a[0], a[2], a[2], a[4], a[4]]
    assert axis(found, "b.weight", 1) == a[1::2]


@pytest.mark.parametrize("gone", range(4))
def test_every_other_channel_of_some_is_found_again(gone: int) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(x[:, 3:7:2]) + m.c(x[:, -3::2])
    model = Net(forward, a=conv(3, 8), b=conv(2, 2), c=conv(2, 2)).eval()
    found = groups_of(model, X)
    keep = found.everything()
    keep[found.labels.axes["a.weight", 0][2 * gone]] = False
    assert int(keep[axis(found, "a.weight", 0)].sum()) == 6
    cut(model, found, keep)                                   # raises where it is not proven


def test_flatten_repeats_a_channel_per_pixel() -> None:
    found = groups(lambda m, x: m.fc(m.a(x).flatten(1)), a=conv(3, 4), fc=nn.Linear(64, 2))
    assert axis(found, "fc.weight", 1) == [c for c in axis(found, "a.weight", 0) for _ in range(16)]
    last = groups(lambda m, x: m.fc(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 4), fc=nn.Linear(64, 2))
    assert axis(last, "fc.weight", 1) == axis(last, "a.weight", 0) * 16


def test_depthwise_ties_its_output_to_its_input() -> None:
    found = groups(lambda m, x: m.b(m.d(m.a(x))), a=conv(3, 4), d=conv(4, 8, 3, groups=4), b=conv(8, 2))
    a = axis(found, "a.weight", 0)
    assert axis(found, "d.weight", 0) == [c for c in a for _ in range(2)]
    assert axis(found, "b.weight", 1) == axis(found, "d.weight", 0)
    assert len(found) == 1


def test_grouped_convolution_has_a_table_and_two_constraints() -> None:
    found = groups(lambda m, x: m.b(m.g(m.a(x))), a=conv(3, 6), g=conv(6, 4, groups=2), b=conv(4, 2))
    a, out = axis(found, "a.weight", 0), axis(found, "g.weight", 0)
    assert axis(found, "g.weight", 1) == [a[:3], a[3:]]
    assert [table.tolist() for table in found.labels.balanced] == [[out[:2], out[2:]], [a[:3], a[3:]]]


def test_shared_grouped_weights_read_one_table() -> None:
    """Called on two producers, a weight reads both: they live and die together."""
    found = groups(lambda m, x: m.c(m.g(m.a(x)) - m.g(m.b(x))), a=conv(3, 6), b=conv(3, 6), g=conv(6, 4, groups=2),
                   c=conv(4, 2))
    assert axis(found, "a.weight", 0) == axis(found, "b.weight", 0)


def test_transposed_weights_have_their_inputs_first() -> None:
    found = groups(lambda m, x: m.b(m.t(m.a(x))), a=conv(3, 5), t=nn.ConvTranspose2d(5, 4, 2), b=conv(4, 2))
    assert axis(found, "t.weight", 0) == axis(found, "a.weight", 0)
    assert axis(found, "t.weight", 1) == axis(found, "t.bias", 0) == axis(found, "b.weight", 1)


def test_halves_that_gate_each_other() -> None:
    for gate in (lambda x: F.glu(x, 1), lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid()):
        found = groups(lambda m, x, gate=gate: m.b(gate(m.a(x))), a=conv(3, 6), b=conv(3, 2))
        a = axis(found, "a.weight", 0)
        assert a[:3] == a[3:] == axis(found, "b.weight", 1)


def test_pixel_shuffle_makes_one_channel_of_four() -> None:
    found = groups(lambda m, x: m.fc(F.pixel_shuffle(m.a(x), 2).flatten(1)), a=conv(3, 8), fc=nn.Linear(128, 2))
    a = axis(found, "a.weight", 0)
    assert a == [c for c in dict.fromkeys(a) for _ in range(4)]
    assert axis(found, "fc.weight", 1) == [c for c in dict.fromkeys(a) for _ in range(64)]


def test_channel_shuffle_keeps_rows_rectangular() -> None:
    found = groups(lambda m, x: m.b(channel_shuffle(m.a(x), 2)), a=conv(3, 6), b=conv(6, 2))
    a = axis(found, "a.weight", 0)
    assert a[:3] == a[3:]                                     # the same positions leave every row
    assert axis(found, "b.weight", 1) == [c for c in a[:3] for _ in range(2)]


def test_group_norm_moves_in_groups() -> None:
    found = groups(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 6), n=nn.GroupNorm(3, 6), b=conv(6, 2))
    a = axis(found, "a.weight", 0)
    assert a == [a[0], a[0], a[2], a[2], a[4], a[4]]
    assert axis(found, "n.weight", 0) == a


def test_padded_channels_are_new_and_free() -> None:
    """Option A: zeros around a narrow stream run with the wide one, and only part of it with the narrow."""
    found = groups(lambda m, x: m.c(F.pad(m.a(x), (0, 0, 0, 0, 1, 2)) + m.b(x)), a=conv(3, 3), b=conv(3, 6),
                   c=conv(6, 2))
    assert axis(found, "b.weight", 0)[1:4] == axis(found, "a.weight", 0)
    assert FIXED not in axis(found, "b.weight", 0)


def test_shared_module_shares_its_labels() -> None:
    found = groups(lambda m, x: m.b(m.s(F.relu(m.s(m.a(x))))), a=conv(3, 4), s=conv(4, 4), b=conv(4, 2))
    assert axis(found, "a.weight", 0) == axis(found, "s.weight", 1) == axis(found, "s.weight", 0)


def test_tied_weight_runs_through_both_uses() -> None:
    model, args, _ = ZOO["tied_embedding"]()
    found = groups_of(model, args)
    width = axis(found, "embedding.weight", 1)
    assert axis(found, "fc1.weight", 1) == axis(found, "fc2.weight", 0) == width
    assert axis(found, "embedding.weight", 0) == [FIXED] * 13
    assert ("decoder.weight", 1) not in found.labels.axes      # one name for one tensor


def test_weights_computed_before_use() -> None:
    model, args, _ = ZOO["masked_weight"]()
    found = groups_of(model, args)
    channels = axis(found, "fc1.weight", 0)
    assert axis(found, "mask", 0) == axis(found, "scale", 0) == axis(found, "fc2.weight", 1) == channels


def test_linear_weights_over_tokens() -> None:
    found = groups(lambda m, x: m.b(F.relu(m.a(x))), torch.randn(2, 5, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    assert axis(found, "b.weight", 1) == axis(found, "a.weight", 0)


@pytest.mark.parametrize(("operator", "words"), [
    (lambda x: x.softmax(1), "softmax runs across these channels"),
    (lambda x: x.mean(1, keepdim=True) * x, "reduces across these channels"),
    (lambda x: F.layer_norm(x, x.shape[1:]), "normalises across channels"),
    (lambda x: F.group_norm(x, 1), "normalises across channels"),
    (lambda x: (x.flatten(2) @ x.flatten(2).mT).softmax(1).mean(2)[:, :, None, None], "softmax runs across"),
    (lambda x: torch.special.i0(x.flatten(1)).view(x.shape), "no rule for this operator"),
    (lambda x: F.pad(x.movedim(1, 3), (1, 1, 0, 0), mode="reflect").movedim(3, 1), "copies of channels"),
    (lambda x: torch.sort(x, dim=1).values, "reduces across these channels"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_mixes_channels_holds_them_and_is_named(operator: Callable[[Tensor], Tensor], words: str) -> None:
    """Only the layer in front is held; the report says where, with the line, and why."""
    width = operator(torch.randn(2, 4, 4, 4)).shape[1]
    found = groups(lambda m, x: m.c(m.b(operator(m.a(x)))), a=conv(3, 4), b=conv(width, 5), c=conv(5, 2))
    assert axis(found, "a.weight", 0) == [FIXED] * 4
    assert [family.name for family in found] == ["b"]
    report = frozen_report(found.labels)
    assert any(words in line and "test_labels.py:" in line for line in report), report


def test_a_rule_that_fails_freezes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(node: Any, tape: Tape) -> None:
        raise RuntimeError("no idea")
    rule = REGISTRY.find(torch.ops.aten.relu.default)
    assert rule is not None
    monkeypatch.setattr(type(rule), "label", lambda self, node, tape: broken(node, tape))
    found = groups(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 5), b=conv(5, 2))
    assert axis(found, "a.weight", 0) == [FIXED] * 5
    assert any("its rule cannot handle this call (RuntimeError: no idea)" in line
               for line in frozen_report(found.labels))


def test_without_any_rules_everything_stays() -> None:
    graph = trace(nn.Sequential(conv(3, 5), conv(5, 2)).eval(), X)
    found = find_groups(label(graph, Registry([])))
    assert not len(found)
    assert sum("no rule for this operator" in line for line in frozen_report(found.labels)) == 2


def test_outputs_can_be_let_go() -> None:
    graph = trace(nn.Sequential(conv(3, 5), conv(5, 2)).eval(), X)
    kept, free = (find_groups(label(graph, REGISTRY, policy=Policy(outputs=flag))) for flag in (False, True))
    assert [family.name for family in kept] == ["0"]
    assert [family.name for family in free] == ["0", "1"]


def test_constants_alone_are_no_channels() -> None:
    """Positions in a table that no parameter owns are not offered."""
    model, args, _ = ZOO["positional_embedding"]()
    assert not any("positions" in family.name for family in groups_of(model, args))


def test_names_of_families() -> None:
    model, args, _ = ZOO["res2net"]()
    found = groups_of(model, args)
    assert [f.name for f in found][:3] == ["stem.0", "reduce.0", "reduce.0#2"]
    assert {f.name for f in found.find("reduce.*")} == {"reduce.0", "reduce.0#2", "reduce.0#3", "reduce.0#4"}
    assert found.find("expand")[0].name == "stem.0"           # a layer on the same stream finds it
    assert found.find("nothing") == ()
    assert all(f"{f.name}: {f.channels} channels: " in str(found) for f in found)
    assert len({group for f in found for group in f.groups.tolist()}) == sum(f.channels for f in found)


def test_masks_and_predicted_sizes() -> None:
    found = groups(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 4), b=conv(4, 2))
    keep = found.everything()
    keep[found.families[0].groups[torch.tensor([0, 2])]] = False
    nodes = {node.name: node for node in found.graph.nodes}
    assert found.labels.alive(nodes["relu"], 1, keep).tolist() == [False, True, False, True]
    assert found.labels.alive(nodes["relu"], 2, keep).tolist() == [True] * 4
    mask = found.labels.mask(nodes["relu"], keep)
    assert mask is not None
    assert mask.shape == (1, 4, 1, 1)
    assert found.labels.mask(nodes["conv2d_1"], keep) is None
    assert [str(d) for d in found.labels.dims(nodes["relu"], keep)] == ["N", "2", "4", "4"]
    assert list(found.labels.masked) == [nodes["conv2d"], nodes["conv2d_1"]]


def test_planes() -> None:
    plane = spread(torch.arange(3), 1, (2, 3, 4))
    assert varying(plane) == {1}
    assert compact(plane).shape == (1, 3, 1)
    assert varying(plane.contiguous()) == {0, 1, 2}
    assert varying(normalise(plane.contiguous())) == {1}
    assert varying(normalise(torch.zeros(2, 3, dtype=torch.long))) == frozenset()


def test_unread_parameters_stay_and_are_named() -> None:
    """An auxiliary head that eval() skips: what it would run with is not known."""
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = conv(3, 5), conv(5, 2), nn.Sequential(conv(5, 7), nn.BatchNorm2d(7))

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return (self.b(x), self.aux(x)) if self.training else self.b(x)

    found = groups_of(Auxiliary().eval(), X)
    assert [family.name for family in found] == ["a"]
    assert axis(found, "aux.0.weight", 0) == [FIXED] * 7
    assert any("'aux.0', 'aux.1'" in line and "does not read" in line for line in frozen_report(found.labels))
    plain = groups_of(nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), conv(5, 2)).eval(), X)
    assert frozen_report(plain.labels) == []


@pytest.mark.parametrize("input_first", [True, False])
def test_grouped_weights_that_also_read_the_input_keep_their_table(input_first: bool) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = (x, m.a(x)) if input_first else (m.a(x), x)
        return m.b(torch.relu(m.g(first)) + torch.relu(m.g(second)))
    found = groups(forward, torch.randn(2, 6, 4, 4), a=conv(6, 6), g=conv(6, 4, groups=2), b=conv(4, 2))
    assert axis(found, "g.weight", 1) == [[FIXED] * 3] * 2
    assert axis(found, "a.weight", 0) == [FIXED] * 6
    assert [family.name for family in found] == ["g"]
