"""Layers as matrix products at sampled positions, and least squares over the rows: against torch and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.graph.trace import trace
from prunekern.prune import contractions as module
from prunekern.prune import leastsquares
from prunekern.prune.contractions import Contraction, contractions
from prunekern.prune.leastsquares import LeastSquares, Moments, Rows, fitted

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 4, 5, 2, 1), (3, 17)),
    (nn.Conv1d(4, 6, 4, dilation=3, padding="same", groups=2), (4, 20)),
    (nn.Conv2d(3, 5, 3), (3, 7, 9)),
    (nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), (1, 2), bias=False), (3, 9, 8)),
    (nn.Conv2d(4, 6, (4, 3), padding="same"), (4, 6, 7)),
    (nn.Conv2d(4, 6, 3, padding="valid", groups=2), (4, 6, 7)),
    (nn.Conv2d(6, 6, 3, 2, 1, groups=6), (6, 8, 8)),
    (nn.Conv2d(4, 8, 5, padding=2, groups=4), (4, 5, 5)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 6)),
    (nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), (3, 6, 6)),
    (nn.Conv2d(3, 4, 1, 2), (3, 5, 5)),
    (nn.Conv3d(2, 4, (2, 3, 1), (1, 2, 1), (1, 1, 0), groups=2), (2, 4, 5, 3)),
    (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3, bias=False), (7, 5)),
    (nn.Linear(5, 3), (2, 4, 5)),
]


def met(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Contraction, Tensor, Tensor, Tensor, Tensor | None]:
    """(contraction, what it reads, its output, weight, bias): what it reads follows padding nodes in front."""
    torch.manual_seed(0)
    layer = layer.double().eval()
    graph = trace(layer, (torch.randn(2, *shape).double(),))
    (made,) = contractions(graph).values()
    x = torch.randn(3, *shape).double()
    read, mode = x, getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        read = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # type: ignore[operator, arg-type]
    return made, read, layer(x).detach(), layer.weight.detach(), layer.bias  # type: ignore[operator, return-value]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize("rows", [7, 10**6])
def test_weights_times_inputs_are_outputs(layer: nn.Module, shape: tuple[int, ...], rows: int) -> None:
    made, x, y, weight, bias = met(layer, shape)
    assert (made.weight, made.bias) == ("weight", None if bias is None else "bias")
    size = made.output(tuple(x.shape), tuple(weight.shape))
    assert size == tuple(y.shape)
    at = made.positions(size, rows, torch.Generator().manual_seed(1))
    read, given = made.inputs(x, size, at, tuple(weight.shape[2:])), made.outputs(y, at)
    w = weight.reshape(made.groups, -1, weight[0].numel())
    product = torch.einsum("rgk,gok->rgo", read, w).flatten(1) + (0 if bias is None else bias.detach())
    assert torch.allclose(product, given, atol=1e-12)
    whole = y.numel() // len(weight)
    assert len(given) == whole if rows > whole else rows <= len(given) < whole
    values = torch.arange(3.0).view(3, *[1] * (y.dim() - 1)).expand_as(y)
    assert torch.equal(made.outputs(values, at)[:, 0].long(), made.rows_of(size, at))


def test_inputs_are_those_of_unfold() -> None:
    made, x, y, weight, _ = met(nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 1), (1, 2)), (4, 9, 8))
    size = tuple(y.shape)
    at = made.positions(size, 10**6, torch.Generator())
    patches = F.unfold(x, (3, 2), (1, 2), (1, 1), (2, 1))
    assert torch.equal(made.inputs(x, size, at, tuple(weight.shape[2:]))[:, 0], patches.transpose(1, 2).flatten(0, 1))


def test_positions_differ_between_images_and_do_not_repeat() -> None:
    made, _, y, _, _ = met(nn.Conv2d(3, 5, 3), (3, 12, 12))
    at = made.positions(tuple(y.shape), 60, torch.Generator().manual_seed(0))
    assert at.shape == (3, 20)
    assert all(len(set(row.tolist())) == 20 for row in at)
    assert not torch.equal(at[0].sort()[0], at[1].sort()[0])


@pytest.mark.parametrize(("layer", "shape"), [LAYERS[3], LAYERS[13]], ids=str)
def test_parts_of_positions_are_all_of_them_and_stay_small(layer: nn.Module, shape: tuple[int, ...],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, y, weight, _ = met(layer, shape)
    at = made.positions(tuple(y.shape), 10**6, torch.Generator())
    monkeypatch.setattr(module, "BYTES", 300)
    parts = list(made.parts(at, weight[0].numel()))
    assert len(parts) > 1
    assert torch.equal(torch.cat(parts, -1), at)
    assert all(part.numel() * weight[0].numel() * 4 <= 300 for part in parts)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.twice, self.computed = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("fixed", torch.randn(4, 4))
        self.tied = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.plain(x)))
        x = F.linear(x, self.computed.weight * self.scale, self.computed.bias)
        x = F.linear(x, self.fixed) + self.tied(torch.zeros(1, dtype=torch.long))  # type: ignore[arg-type]
        return F.linear(x, self.tied.weight)


def test_layers_whose_weights_are_shared_computed_or_buffers_are_left_out() -> None:
    graph = trace(Several().eval(), (torch.randn(2, 4),))
    assert [made.weight for made in contractions(graph).values()] == ["plain.weight"]


# ---- least squares -----------------------------------------------------------------------------------------


def problem(rows: int = 200, k: int = 6, o: int = 3, groups: int = 2, far: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, groups, k, generator=generator).double() * torch.linspace(0.3, 2, k) + 1 + far
    t = torch.einsum("rgk,gko->rgo", x, torch.randn(groups, k, o, generator=generator).double())
    return x, t + 0.3 * torch.randn(rows, groups, o, generator=generator) + 5


@pytest.mark.parametrize("centred", [True, False])
def test_moments_are_those_of_stacked_rows(centred: bool) -> None:
    x, t = problem()
    moments = Moments(centred)
    for piece in (slice(0, 50), slice(50, 51), slice(51, 51), slice(51, 200)):
        moments.add(x[piece], t[piece])
    for group in range(2):
        a, b = x[:, group].numpy(), t[:, group].numpy()
        if centred:
            a, b = a - a.mean(0), b - b.mean(0)
        assert np.allclose(moments.inputs[group], a.T @ a / 200)
        assert np.allclose(moments.cross[group], a.T @ b / 200)
        assert np.allclose(moments.power[group], (b * b).mean(0))
        want = (x[:, group].mean(0), t[:, group].mean(0)) if centred else (torch.zeros(6), torch.zeros(3))
        assert all(np.allclose(mine[group], other) for mine, other in zip(moments.means, want, strict=True))


def test_moments_of_single_precision_do_not_cancel() -> None:
    """A spread of 1 around a mean of 1000: squares in single precision are off by as much."""
    x = problem(far=1000.0)[0]
    moments = Moments()
    for piece in x.float().split(40):
        moments.add(piece, torch.zeros(len(piece), 2, 1))
    want = torch.stack([torch.cov(x[:, group].T, correction=0) for group in range(2)])
    assert torch.allclose(moments.inputs, want, atol=1e-3)
    assert moments.inputs.dtype == torch.float64


def brute(x: np.ndarray[Any, Any], t: np.ndarray[Any, Any], old: np.ndarray[Any, Any], lift: float,
          centred: bool) -> np.ndarray[Any, Any]:
    """min |W x - t|^2 / n + lift |W - W0|^2 as one least-squares problem of stacked rows."""
    if centred:
        x, t = x - x.mean(0), t - t.mean(0)
    n, k = x.shape
    rows = np.vstack([x / np.sqrt(n), np.sqrt(lift) * np.eye(k)])
    return np.asarray(np.linalg.lstsq(rows, np.vstack([t / np.sqrt(n), np.sqrt(lift) * old]), rcond=None)[0])


@pytest.mark.parametrize("kind", [Moments, Rows])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("rows", [200, 4])
def test_solutions_are_those_of_stacked_rows(kind: Any, centred: bool, rows: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leastsquares, "COLUMNS", 4)
    x, t = problem(rows)
    seen: LeastSquares = kind(centred)
    for piece in (slice(0, 3), slice(3, rows)):
        seen.add(x[piece], t[piece])
    old = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double()
    found, left = seen.solve(old, 0.05), seen.left(old)
    for group in range(2):
        a, b = x[:, group].numpy(), t[:, group].numpy()
        centre = a - a.mean(0) if centred else a
        want = brute(a, b, old[group].numpy(), 0.05 * (centre**2).mean(), centred)
        assert np.allclose(found[group], want, atol=1e-8)
        errors = b - a @ old[group].numpy()
        assert np.allclose(left[group], errors.var(0) if centred else (errors**2).mean(0))


@pytest.mark.parametrize("kind", [Moments, Rows])
def test_rows_put_together(kind: Any) -> None:
    x, t = problem()
    one, two, whole = kind(), kind(), kind()
    one.add(x[:120], t[:120])
    two.add(x[120:130] + 3, t[120:130] - 2)
    two.add(x[130:] + 3, t[130:] - 2)
    whole.add(torch.cat((x[:120], x[120:] + 3)), torch.cat((t[:120], t[120:] - 2)))
    both = one.with_rows(two)
    assert both.rows == whole.rows == 200
    old = torch.zeros(2, 6, 3).double()
    assert torch.allclose(both.solve(old, 0.1), whole.solve(old, 0.1))
    assert torch.allclose(both.left(old), whole.left(old))
    assert torch.allclose(both.means[1], whole.means[1])
    assert torch.allclose(both.power, whole.power)


def noisy(rows: int, noise: float, kind: Any = Moments) -> tuple[LeastSquares, LeastSquares, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    true = torch.randn(1, 30, 2, generator=generator).double()
    seen, held = kind(), kind()
    for part, count in ((seen, rows), (held, rows // 3 + 1)):
        x = torch.randn(count, 1, 30, generator=generator).double()
        t = torch.einsum("rgk,gko->rgo", x, true)
        part.add(x, t + noise * torch.randn(t.shape, generator=generator).double())
    return seen, held, true, true + 0.1 * torch.randn(true.shape, generator=generator).double()


@pytest.mark.parametrize("kind", [Moments, Rows])
def test_the_ridge_grows_where_rows_are_few_and_noisy(kind: Any) -> None:
    """40 rows of noise 1 say less of 30 weights than weights that are 0.1 off; 3000 say more."""
    def total(errors: Tensor) -> float:
        return float(errors.sum())

    seen, held, true, old = noisy(40, 1.0, kind)
    plain = float((seen.solve(old, 1e-3) - true).square().mean())
    whole, found = fitted(seen, held, old, 1e-3, total)
    assert whole.rows == 54
    assert float((found - true).square().mean()) < 1.1 * float((old - true).square().mean()) < 0.2 * plain
    seen, held, true, old = noisy(3000, 0.1, kind)
    _, found = fitted(seen, held, old, 1e-3, total)
    assert float((found - true).square().mean()) < 2e-5


def test_rows_held_back_are_met_with_the_bias_of_the_others() -> None:
    x, t = problem()
    seen, held, old = Moments(), Moments(), torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double()
    seen.add(x[:150], t[:150])
    held.add(x[150:] + 2, t[150:])
    met: list[Tensor] = []
    fitted(seen, held, old, 1e-3, lambda errors: (met.append(errors), float(errors.sum()))[1])
    error = torch.einsum("rgk,gko->rgo", x, old) - t
    want = (error[150:] + 2 * old.sum(1) - error[:150].mean(0)).square().mean(0)
    assert torch.allclose(met[-1], want)


def test_without_rows_held_back_the_ridge_is_the_one_asked_for() -> None:
    seen, _, _, old = noisy(40, 1.0)
    want = seen.solve(old, 0.2)
    assert torch.equal(fitted(seen, Moments(), old, 0.2, lambda errors: float(errors.sum()))[1], want)
