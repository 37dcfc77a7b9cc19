"""Linear least squares, drawn towards the weights there are: by normal equations, or by rows where inputs are many.

Both solve min_W E |(W - W0) x - (t - W0 x)|^2 + ridge mean(var x) |W - W0|^2 with x and t centred (which leaves the
bias free), for every group of a layer: W = W0 + (S + l I)^-1 (C - S W0), S and C the covariances of inputs, and of
inputs with targets (He et al. 2017, equation 5, with a ridge); or, the same by the matrix inversion lemma,
W = W0 + X^T (X X^T + n l I)^-1 (T - X W0), of which the matrix is [rows, rows].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

COLUMNS = 4096      # of the inputs that are held in fp64 at a time
NEAR = 1.03         # times the least error on rows held back: of ridges that do about as well the smallest is taken
RIDGES = 10.0 ** torch.arange(6, dtype=torch.float64)      # times the one asked for


class LeastSquares(Protocol):
    """Rows x [rows, groups, k] and t [rows, groups, o] seen so far."""

    centred: bool

    @property
    def rows(self) -> int: ...

    def add(self, x: Tensor, t: Tensor) -> None: ...

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of inputs [groups, k] and of targets [groups, o]; zeros where nothing is centred."""

    @property
    def power(self) -> Tensor:
        """Variances of the targets [groups, o]."""

    def solve(self, old: Tensor, ridge: float) -> Tensor:
        """The weights [groups, k, o] that fit best, given those there are."""

    def with_rows(self, other: Self) -> Self:
        """Both together; neither is to be used afterwards."""

    def left(self, weights: Tensor) -> Tensor:
        """Mean squared errors [groups, o] of weights [groups, k, o] under the best bias (none where not centred)."""


def fitted(seen: LeastSquares, held: LeastSquares, old: Tensor, ridge: float,
           total: Callable[[Tensor], float]) -> tuple[LeastSquares, Tensor]:
    """(all rows, weights [groups, k, o] fitted to them), with the ridge, or tenfold of it as often as rows that were
    held back are fitted clearly better for it; the weights there are, where those fit them best.

    total: sum of errors [groups, o], as they count.
    """
    if not held.rows or not seen.rows:
        seen = seen.with_rows(held)
        return seen, seen.solve(old, ridge)

    def error(weights: Tensor) -> float:
        (x, t), (held_x, held_t) = seen.means, held.means
        off = held_t - t - ((held_x - x)[:, None] @ weights)[:, 0]          # of the bias that is best for the others
        return total(held.left(weights) + off.square())
    tried: list[tuple[float, float]] = []                                   # (error, ridge)
    for lift in (ridge * RIDGES).tolist():
        tried.append((error(seen.solve(old, lift)), lift))
        if len(tried) > 1 and not tried[-1][0] < tried[-2][0]:
            break
    least = min(tried)[0]
    fits = error(old) > least
    seen = seen.with_rows(held)
    return seen, seen.solve(old, min(lift for found, lift in tried if found <= NEAR * least)) if fits else old


class Moments:
    """Sums over rows, in fp64: of inputs, of targets, and of their products; for each group of a layer.

    After ``add(x, t)``, x [rows, groups, k] and t [rows, groups, o]: ``inputs`` [groups, k, k] and ``cross``
    [groups, k, o] are (centred) covariances, ``power`` [groups, o] variances of the targets.
    """

    def __init__(self, centred: bool = True) -> None:
        self.rows, self.centred = 0, centred
        self._sums: list[Tensor] = []
        self._origin: tuple[Tensor, Tensor] | None = None    # sums are taken from there: large means would cancel

    def with_rows(self, other: Moments) -> Moments:
        if not (self.rows and other.rows):
            return self if self.rows else other
        assert self._origin is not None
        assert other._origin is not None
        x, t = ((a - b).double() for a, b in zip(other._origin, self._origin, strict=True))     # how far other's is off
        sx, st, sxx, sxt, stt = other._sums
        n = other.rows
        moved = (sx + n * x, st + n * t,
                 sxx + sx[:, :, None] * x[:, None] + x[:, :, None] * sx[:, None] + n * x[:, :, None] * x[:, None],
                 sxt + sx[:, :, None] * t[:, None] + x[:, :, None] * st[:, None] + n * x[:, :, None] * t[:, None],
                 stt + 2 * t * st + n * t * t)
        self._sums = [a.add_(b) for a, b in zip(self._sums, moved, strict=True)]
        self.rows += n
        return self

    def add(self, x: Tensor, t: Tensor | None = None) -> None:
        x = at_least_single(x)
        t = x[..., :0] if t is None else t.to(x.dtype)
        if not len(x):
            return
        if self._origin is None:
            self._origin = (x.mean(0), t.mean(0)) if self.centred else (torch.zeros_like(x[0]), torch.zeros_like(t[0]))
        x, t = (part - origin for part, origin in zip((x, t), self._origin, strict=True))
        wide, high = x.transpose(0, 1), t.transpose(0, 1)              # [groups, rows, k or o]
        products = (wide.transpose(1, 2) @ wide, wide.transpose(1, 2) @ high)
        new = [part.double() for part in (x.sum(0), t.sum(0), *products, (t * t).sum(0))]
        self._sums = [a.add_(b) for a, b in zip(self._sums, new, strict=True)] if self._sums else new
        self.rows += len(x)

    @property
    def _means(self) -> tuple[Tensor, Tensor]:
        scale = self.rows if self.centred else float("inf")
        return self._sums[0] / scale, self._sums[1] / scale

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        assert self._origin is not None
        x, t = self._means
        return self._origin[0].double() + x, self._origin[1].double() + t

    @property
    def inputs(self) -> Tensor:
        mean = self._means[0]
        return self._sums[2] / self.rows - mean[:, :, None] * mean[:, None]

    @property
    def cross(self) -> Tensor:
        x, t = self._means
        return self._sums[3] / self.rows - x[:, :, None] * t[:, None]

    @property
    def power(self) -> Tensor:
        return self._sums[4] / self.rows - self._means[1].square()

    def solve(self, old: Tensor, ridge: float) -> Tensor:
        spread = self.inputs
        pull = self.cross - spread @ old
        lift = ridge * spread.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        spread.diagonal(dim1=1, dim2=2).add_(lift[:, None])
        return old + solved(spread, pull)

    def left(self, weights: Tensor) -> Tensor:
        drawn = (weights * (self.inputs @ weights)).sum(1) - 2 * (weights * self.cross).sum(1)
        return (drawn + self.power).clamp(min=0)


class Rows:
    """The rows themselves, for layers of more inputs than rows: products of inputs would not fit."""

    def __init__(self, centred: bool = True) -> None:
        self.centred = centred
        self._parts: list[tuple[Tensor, Tensor]] = []

    @property
    def rows(self) -> int:
        return sum(x.shape[1] for x, _ in self._parts)

    def with_rows(self, other: Rows) -> Rows:
        self._parts += other._parts
        return self

    def add(self, x: Tensor, t: Tensor) -> None:
        x = at_least_single(x)
        self._parts.append((x.transpose(0, 1), t.to(x.dtype).transpose(0, 1)))      # [groups, rows, k or o]

    def _all(self) -> tuple[Tensor, Tensor]:
        if len(self._parts) > 1:
            self._parts = [(torch.cat([x for x, _ in self._parts], 1), torch.cat([t for _, t in self._parts], 1))]
        return self._parts[0]

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        x, t = (part.mean(1, dtype=torch.float64) for part in self._all())
        return (x, t) if self.centred else (torch.zeros_like(x), torch.zeros_like(t))

    @property
    def power(self) -> Tensor:
        return (self._all()[1] - self.means[1][:, None]).square().mean(1)

    def solve(self, old: Tensor, ridge: float) -> Tensor:
        x, mean = self._all()[0], self.means[0]
        square = x.new_zeros(len(x), x.shape[1], x.shape[1], dtype=torch.float64)
        for start in range(0, x.shape[2], COLUMNS):
            columns = slice(start, start + COLUMNS)
            part = x[:, :, columns].double() - mean[:, None, columns]
            square += part @ part.transpose(1, 2)
        lift = ridge * square.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-30) / x.shape[2]
        square.diagonal(dim1=1, dim2=2).add_(lift[:, None])
        pull = solved(square, self._errors(old))
        new = [x[:, :, start:start + COLUMNS].double().transpose(1, 2) @ pull
               - mean[:, start:start + COLUMNS, None] * pull.sum(1, keepdim=True)
               for start in range(0, x.shape[2], COLUMNS)]
        return old + torch.cat(new, 1)

    def left(self, weights: Tensor) -> Tensor:
        return self._errors(weights).square().mean(1)

    def _errors(self, weights: Tensor) -> Tensor:
        x, t = self._all()
        error = t.double()
        for start in range(0, x.shape[2], COLUMNS):
            error = error - x[:, :, start:start + COLUMNS].double() @ weights[:, start:start + COLUMNS]
        return error - error.mean(1, keepdim=True) if self.centred else error


def at_least_single(x: Tensor) -> Tensor:
    """Sums of half precision overflow."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def solved(square: Tensor, right: Tensor) -> Tensor:
    """square^-1 right, for positive definite matrices; by elimination where rounding has made them less."""
    factor, failed = torch.linalg.cholesky_ex(square)
    return torch.linalg.solve_ex(square, right)[0] if bool(failed.any()) else torch.cholesky_solve(right, factor)
