"""Every pass keeps what a Program computes (fp64), and does what it is for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.backends import Lowered
from prunekern.core.program import Program
from prunekern.graph.trace import trace
from prunekern.lower.build import build
from prunekern.lower.channels import drop_dead_channels
from prunekern.lower.dead import drop_dead_steps
from prunekern.lower.fold import fold_after, fold_before
from prunekern.lower.fuse import fuse
from prunekern.lower.passes import PASSES, optimise
from prunekern.lower.tolerance import error
from tests.weights import randomise_

Pass = Callable[[Program], Program]


class Net(nn.Module):
    """Modules by name and a forward over them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward
        randomise_(self.double().eval())

    def forward(self, *args: Tensor) -> Tensor:
        return self.run(self, *args)


def raw(net: nn.Module, *inputs: Tensor) -> Program:
    return build(trace(net, tuple(t.double() for t in inputs)))


def hold(net: nn.Module, program: Program, *shapes: tuple[int, ...]) -> None:
    """The Program computes what the network does, at a batch size that was not traced."""
    inputs = tuple(torch.randn(3, *shape, dtype=torch.float64) for shape in shapes)
    with torch.no_grad():
        assert error(Lowered(program)(*inputs), net(*inputs)) < 1e-13


def ops(program: Program) -> list[str]:
    return [step.op for step in program.steps]


CONVS = {
    "conv": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "conv without bias": lambda: nn.Conv2d(6, 8, 3, bias=False),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2),
    "transposed grouped": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False),
}


@pytest.mark.parametrize("name", CONVS)
def test_batch_norm_folds_into_the_convolution_before_it(name: str) -> None:
    conv = CONVS[name]()
    net = Net(lambda m, x: m.bn(m.conv(x)), conv=conv, bn=nn.BatchNorm2d(conv.out_channels))
    program = raw(net, torch.randn(2, 6, 7, 7))
    folded = fold_after(program)
    assert ops(program)[-1] == "scale"
    assert ops(folded) == [ops(program)[0]]
    hold(net, folded, (6, 7, 7))


def test_batch_norm_folds_into_a_linear_layer_and_scalars_chain() -> None:
    net = Net(lambda m, x: (m.bn(m.fc(x)) * 2 - 1) / 4, fc=nn.Linear(5, 7), bn=nn.BatchNorm1d(7))
    folded = fold_after(raw(net, torch.randn(2, 5)))
    assert ops(folded) == ["linear"]
    hold(net, folded, (5,))


def test_layer_scale_on_the_last_axis_folds_into_a_linear_layer_over_tokens() -> None:
    net = Net(lambda m, x: m.fc(x) * m.gamma.weight[0], fc=nn.Linear(5, 7), gamma=nn.Linear(7, 1))
    folded = fold_after(raw(net, torch.randn(2, 4, 5)))
    assert ops(folded) == ["linear"]
    hold(net, folded, (4, 5))


def test_a_scale_on_another_axis_is_not_folded() -> None:
    net = Net(lambda m, x: m.fc(x) * m.gamma.weight[0].view(4, 1), fc=nn.Linear(5, 7), gamma=nn.Linear(4, 1))
    folded = fold_after(raw(net, torch.randn(2, 4, 5)))
    assert ops(folded) == ["linear", "scale"]
    hold(net, folded, (4, 5))


@pytest.mark.parametrize("between", [F.relu, lambda y: y])
def test_nothing_folds_past_a_second_reader_or_an_activation(between: Callable[[Tensor], Tensor]) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(between(y)) + y
    net = Net(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    folded = fold_after(raw(net, torch.randn(2, 3, 6, 6)))
    assert "scale" in ops(folded)
    hold(net, folded, (3, 6, 6))


def test_a_convolution_used_twice_gets_weights_of_its_own_for_each_norm() -> None:
    net = Net(lambda m, x: m.b1(m.conv(x)) + m.b2(m.conv(x.flip(2))), conv=nn.Conv2d(3, 4, 3), b1=nn.BatchNorm2d(4),
              b2=nn.BatchNorm2d(4))
    folded = fold_after(raw(net, torch.randn(2, 3, 6, 6)))
    convs = [step for step in folded.steps if step.op == "conv"]
    assert len({step.weights["weight"] for step in convs}) == 2
    assert "scale" not in ops(folded)
    hold(net, folded, (3, 6, 6))


@pytest.mark.parametrize(("conv", "goes"), [
    (nn.Conv2d(6, 8, 3), True), (nn.Conv2d(6, 8, 3, groups=2), True), (nn.Conv2d(6, 8, 3, padding=1), False),
    (nn.ConvTranspose2d(6, 8, 3), False)], ids=["unpadded", "grouped", "padded", "transposed"])
def test_a_norm_folds_forward_where_no_zero_padding_lies_between(conv: nn.Module, goes: bool) -> None:
    net = Net(lambda m, x: m.conv(m.bn(x)), conv=conv, bn=nn.BatchNorm2d(6))
    folded = fold_before(raw(net, torch.randn(2, 6, 7, 7)))
    assert ("scale" not in ops(folded)) == goes
    hold(net, folded, (6, 7, 7))


def test_a_mere_scale_folds_forward_through_padding() -> None:
    net = Net(lambda m, x: m.conv(x * 3), conv=nn.Conv2d(6, 8, 3, padding=1, groups=2))
    folded = fold_before(raw(net, torch.randn(2, 6, 7, 7)))
    assert ops(folded) == ["conv"]
    hold(net, folded, (6, 7, 7))


def test_residual_then_activation_is_one_epilogue_on_the_later_convolution() -> None:
    net = Net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    fused = fuse(raw(net, torch.randn(2, 3, 5, 5)))
    assert ops(fused) == ["conv", "conv"]
    assert str(fused.steps[1].epilogue) == f"bias + add {fused.steps[0].output.name} + relu"
    hold(net, fused, (3, 5, 5))


def test_residual_after_the_activation_keeps_its_order() -> None:
    net = Net(lambda m, x: x + F.silu(m.a(x)), a=nn.Conv2d(4, 4, 1))
    fused = fuse(raw(net, torch.randn(2, 4, 5, 5)))
    assert ops(fused) == ["conv"]
    assert str(fused.steps[0].epilogue) == f"bias + silu + add {fused.input_slots[0].name}"
    hold(net, fused, (4, 5, 5))


def test_an_activation_after_activation_and_residual_stays_a_step() -> None:
    net = Net(lambda m, x: F.relu(x + F.silu(m.a(x))), a=nn.Conv2d(4, 4, 1))
    fused = fuse(raw(net, torch.randn(2, 4, 5, 5)))
    assert ops(fused) == ["conv", "activation"]
    hold(net, fused, (4, 5, 5))


def test_a_broadcast_add_and_a_value_with_two_readers_are_not_fused() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return F.relu(y) + y + y.mean((2, 3), keepdim=True)
    net = Net(forward, a=nn.Conv2d(4, 4, 1))
    fused = fuse(raw(net, torch.randn(2, 4, 5, 5)))
    assert ops(fused).count("binary") == 2
    assert not fused.steps[0].epilogue.activation
    hold(net, fused, (4, 5, 5))


def test_the_add_whose_other_operand_comes_later_moves_behind_it() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return y + F.max_pool2d(x, 3, 1, 1)
    net = Net(forward, a=nn.Conv2d(4, 4, 1))
    fused = fuse(raw(net, torch.randn(2, 4, 5, 5)))
    assert ops(fused) == ["pool", "conv"]
    hold(net, fused, (4, 5, 5))


def test_dead_steps_go_and_a_fused_value_that_is_returned_stays() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        m.a(x).relu()
        return m.a(x)
    net = Net(forward, a=nn.Conv2d(4, 4, 1))
    program = drop_dead_steps(raw(net, torch.randn(2, 4, 5, 5)))
    assert ops(program) == ["conv"]
    hold(net, program, (4, 5, 5))


# ---- channels ----------------------------------------------------------------------------------------------


def zero_rows(layer: nn.Module, *channels: int) -> None:
    with torch.no_grad():
        layer.weight[list(channels)] = 0.0


def zero_columns(layer: nn.Module, *channels: int) -> None:
    with torch.no_grad():
        layer.weight[:, list(channels)] = 0.0


def widths(program: Program) -> list[int]:
    return [step.output.shape[1].offset for step in program.steps if step.op in ("conv", "conv_transpose", "linear")]


def shrink(net: nn.Module, *shape: int) -> Program:
    program = drop_dead_channels(fuse(fold_before(fold_after(raw(net, torch.randn(2, *shape))))))
    hold(net, program, shape)
    return program


@pytest.mark.parametrize(("padding", "expected"), [(0, [5, 4]), (1, [8, 4])])
def test_constant_channels_go_into_the_next_bias_unless_padding_lies_between(padding: int, expected: list[int]) -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv2d(3, 8, 3, bias=True), b=nn.Conv2d(8, 4, 3, padding=padding))
    zero_rows(net.a, 1, 4, 7)
    with torch.no_grad():
        net.a.bias.abs_().add_(0.1)      # relu keeps them above zero
    assert widths(shrink(net, 3, 9, 9)) == expected


def test_a_channel_that_is_constantly_zero_passes_padding() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3, padding=1))
    zero_rows(net.a, 1, 4, 7)
    with torch.no_grad():
        net.a.bias[1], net.a.bias[4], net.a.bias[7] = -1.0, 0.0, 2.0
    assert widths(shrink(net, 3, 9, 9)) == [6, 4]


def test_unread_channels_go_even_where_padding_lies_between() -> None:
    net = Net(lambda m, x: m.b(F.silu(m.bn(m.a(x)))), a=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8),
              b=nn.Conv2d(8, 4, 3, padding=1))
    zero_columns(net.b, 0, 2)
    program = shrink(net, 3, 9, 9)
    assert widths(program) == [6, 4]
    assert program.kept[program.steps[0].output.name] == (1, (1, 3, 4, 5, 6, 7))


def test_through_pooling_flatten_and_a_linear_layer() -> None:
    net = Net(lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 3, 2, 1).flatten(1)), a=nn.Conv2d(3, 8, 3),
              b=nn.Linear(8 * 16, 5))
    zero_rows(net.a, 0, 5)
    with torch.no_grad():
        net.a.bias.fill_(0.7)
    assert widths(shrink(net, 3, 9, 9)) == [6, 5]


def test_average_pooling_with_padding_keeps_a_constant_channel() -> None:
    net = Net(lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1).flatten(1)), a=nn.Conv2d(3, 8, 3), b=nn.Linear(8 * 16, 5))
    zero_rows(net.a, 0, 5)
    with torch.no_grad():
        net.a.bias.fill_(0.7)
    assert widths(shrink(net, 3, 9, 9)) == [8, 5]


def test_through_a_depthwise_convolution_and_a_mean() -> None:
    net = Net(lambda m, x: m.c(F.relu(m.dw(m.a(x))).mean((2, 3))), a=nn.Conv2d(3, 8, 1),
              dw=nn.Conv2d(8, 16, 3, padding=1, groups=8), c=nn.Linear(16, 5))
    zero_rows(net.a, 2, 3)
    with torch.no_grad():
        net.a.bias[2], net.a.bias[3] = 0.0, 1.0     # the second one is not constant behind the padding
    program = shrink(net, 3, 6, 6)
    assert widths(program) == [7, 14, 5]
    assert program.steps[1].attributes["groups"] == 7


def test_a_chain_of_layers_shrinks_all_along() -> None:
    net = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=nn.Linear(5, 6), b=nn.Linear(6, 7), c=nn.Linear(7, 3))
    zero_columns(net.c, 0, 1)            # two units of b are unread; then what only they read in a is unread too
    with torch.no_grad():
        net.b.weight[2:, 4] = 0.0
    assert widths(shrink(net, 5)) == [5, 5, 3]


def test_a_dead_layer_keeps_one_channel() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(5, 6), b=nn.Linear(6, 7))
    zero_rows(net.a, *range(6))
    assert widths(shrink(net, 5)) == [1, 7]


@pytest.mark.parametrize("join", [lambda a, b: a + b, lambda a, b: torch.cat((a, b), 1)], ids=["add", "cat"])
def test_channels_that_meet_others_stay(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = Net(lambda m, x: join(m.a(x), m.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    zero_rows(net.a, 1)
    assert widths(shrink(net, 3, 5, 5)) == [4, 4]


def test_outputs_of_the_network_keep_their_channels() -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Linear(5, 6))
    zero_rows(net.a, 1)
    assert widths(shrink(net, 5)) == [6]


def test_macs_shrink_with_the_weights() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1))
    zero_columns(net.b, 0, 2)
    program = shrink(net, 3, 6, 6)
    assert program.macs(1) == 16 * 6 * 27 + 16 * 4 * 6


@pytest.mark.parametrize("each", PASSES, ids=lambda each: each.__name__)
def test_every_pass_alone_and_twice_keeps_a_whole_network(each: Pass) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(m.bn(m.a(x)))
        y = y + F.silu(m.b(y) * 2)
        return m.fc(F.avg_pool2d(y, 2).flatten(1))
    net = Net(forward, a=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), b=nn.Conv2d(8, 8, 3, padding=1, groups=2),
              fc=nn.Linear(8 * 9, 5))
    zero_rows(net.a, 3)
    program = raw(net, torch.randn(2, 3, 6, 6))
    once = each(program)
    hold(net, once, (3, 6, 6))
    hold(net, each(once), (3, 6, 6))
    hold(net, each(optimise(program)), (3, 6, 6))
