"""What a lowered network is held to: rounding passes wherever it is rounding, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from prunekern import trace
from prunekern.backends.exact import Shaken, exactly
from prunekern.backends.lowered import Lowered, lower
from prunekern.backends.verify import _check
from prunekern.errors import LoweringError

EPS = torch.finfo(torch.float32).eps
LEFT = 2.0 ** -10         # of the terms of size 1, after they cancel


class Cancelling(nn.Module):
    """x0 - (1 - LEFT) x1 = LEFT for ones, which fp32 computes without any rounding; then a layer that doubles it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, LEFT - 1.0]]))
            self.first.bias.zero_()
            self.second.weight.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def changed(change: Callable[[Tensor], Tensor]) -> tuple[Lowered, nn.Module]:
    """The lowered network with other numbers in its first layer's weight."""
    model = Cancelling().eval()
    lowered = lower(model, torch.ones(2, 2), backend="reference", verify=False)
    name = lowered.program.steps[0].weights["weight"]
    weights = {**lowered.program.weights, name: change(lowered.program.weights[name].clone())}
    return Lowered(replace(lowered.program, weights=weights), "reference"), model


def test_rounding_passes_where_torchs_own_is_zero_by_luck() -> None:
    """One unit in the last place of a weight is what any order of summation may cost."""
    rounded, model = changed(lambda w: w * torch.tensor([[1.0 + EPS, 1.0]]))
    checks = rounded.verify(model, torch.ones(2, 2)).steps
    assert checks[0].torch_error == 0.0
    assert 1e-5 < checks[0].error <= checks[0].limit < 2e-3


@pytest.mark.parametrize("change", [
    lambda w: w.half().float() + torch.tensor([[2.0 ** -11, 0.0]]), lambda w: w * torch.tensor([[1.0, 0.0]]),
    lambda w: w + 1e-5, lambda w: w.bfloat16().float()], ids=["half", "a tap is lost", "off by 1e-5", "bfloat16"])
def test_more_than_rounding_never_passes(change: Callable[[Tensor], Tensor]) -> None:
    wrong, model = changed(change)
    with pytest.raises(LoweringError, match=r"step 'linear'.*off by"):
        wrong.verify(model, torch.ones(2, 2))


def test_shaken_follows_the_condition_of_each_value() -> None:
    """Terms of 1 that leave LEFT magnify a change of their operands by 1 / LEFT; what is not kept does not count."""
    model = Cancelling().eval()
    graph = trace(model, torch.ones(2, 2))
    names = {"linear", "linear_1"}
    exact, _, _ = exactly(graph, graph.args, graph.kwargs, names)
    assert exact is not None
    shaken = Shaken(graph, graph.args, graph.kwargs, exact, {})
    for name in names:
        assert EPS / LEFT <= shaken.of(name) <= 6 * EPS / LEFT
    assert shaken.of("relu_1") == 0.0
    pair = torch.tensor([[1.0, 1e3]], dtype=torch.float64).expand(2, 2)       # a large value hides a small one
    kept = Shaken(graph, graph.args, graph.kwargs, {"linear": pair[:, :1]}, {"linear": (1, (0,))})
    assert kept.of("linear") > 0.9


def test_indices_that_are_no_indices_are_equal() -> None:
    """An empty list of positions is what the model has, too; one that differs in length is not."""
    none, one = torch.zeros(0, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    assert _check("found", "nonzero", none, none, none, None).passed
    assert not _check("found", "nonzero", one, none, none, None).passed


class ByItsLargest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (2.0 * x.max() + 1.0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_scalar_is_scaled_as_a_scalar(backend: str) -> None:
    x = torch.rand(3, 4)
    lowered = lower(ByItsLargest().eval(), x, backend=backend)
    assert "scale" in {step.op for step in lowered.program.steps}
    torch.testing.assert_close(lowered(x), ByItsLargest()(x))
