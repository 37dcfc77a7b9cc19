"""Matrix products and im2col, the two halves of a lowered convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.conftest import Timed
from bench.engines import LOWERED, TORCH, Engine, Ready
from bench.verified import hold
from prunekern import kernels

pytestmark = pytest.mark.benchmark(max_time=0.3, warmup=True, warmup_iterations=20)

# M, K, N: small networks, ResNets, late convolutions; then widths as pruning leaves them.
GEMMS = [(576, 144, 16), (1024, 576, 64), (256, 1152, 128), (49, 512, 2048), (1, 784, 100), (64, 784, 100),
         (1024, 117, 13), (1024, 405, 77), (576, 153, 17), (784, 333, 37)]


def _addmm(linear: nn.Linear, x: Tensor) -> Ready:
    """The same BLAS call as the reference backend's, without anything around it."""
    packed, out = linear.weight.detach().t().contiguous(), x.new_empty(len(x), linear.out_features)
    return Ready(lambda: torch.addmm(linear.bias, x, packed, out=out))


@pytest.mark.parametrize("engine", [TORCH, Engine("addmm", _addmm), *LOWERED], ids=lambda engine: engine.name)
@pytest.mark.parametrize("size", GEMMS, ids=lambda size: "x".join(map(str, size)))
def test_gemm(timed: Timed, size: tuple[int, int, int], engine: Engine) -> None:
    m, k, n = size
    torch.manual_seed(0)
    linear, x = nn.Linear(k, n).eval(), torch.randn(m, k)
    with torch.no_grad():
        ready = engine.make(linear, x)
        hold(ready.call(), linear(x), F.linear(x.double(), linear.weight.double(), linear.bias.double()),
             ready.rows)
    timed(ready.call, group=f"gemm {m}x{k}x{n}", flops=2 * m * k * n)


# batch, height and width with padding, channels, kernel, stride
WINDOWS = [(1, 16, 16, (3, 3), 1), (16, 16, 16, (3, 3), 1), (8, 34, 16, (3, 3), 1), (8, 34, 13, (3, 3), 1),
           (8, 18, 37, (3, 3), 1), (1, 58, 64, (3, 3), 1), (1, 58, 77, (3, 3), 2), (16, 32, 1, (5, 5), 1),
           (1, 230, 3, (7, 7), 2)]


def im2col_cpp(x: Tensor, *geometry: list[int]) -> Callable[[], Tensor]:
    return lambda: torch.ops.prunekern.im2col_nhwc(x, *geometry)


def im2col_ref(x: Tensor, *geometry: list[int]) -> Callable[[], Tensor]:
    return lambda: kernels.im2col_nhwc_ref(x, *geometry)


def unfold(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Callable[[], Tensor]:
    """torch's own im2col: channels first, columns of patches."""
    planes = x.permute(0, 3, 1, 2).contiguous()
    return lambda: F.unfold(planes, kernel, dilation, 0, stride)


@pytest.mark.parametrize("engine", [unfold, im2col_ref, im2col_cpp], ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w[0]}x{w[1]}x{w[1]}x{w[2]}-{w[3][0]}x{w[3][1]}-s{w[4]}")
def test_im2col(timed: Timed, window: tuple[int, int, int, tuple[int, int], int],
                engine: Callable[..., Callable[[], Tensor]]) -> None:
    if engine is im2col_cpp and kernels.unavailable() is not None:
        pytest.skip(str(kernels.unavailable()))
    n, side, c, kernel, stride = window
    torch.manual_seed(0)
    x, geometry = torch.randn(n, side, side, c), (list(kernel), [stride, stride], [1, 1])
    call, taps = engine(x, *geometry), kernel[0] * kernel[1]
    got, planes = call(), F.unfold(x.permute(0, 3, 1, 2), kernel, stride=stride)
    if engine is unfold:
        assert torch.equal(got, planes)
    else:
        rows = planes.unflatten(1, (c, taps)).permute(0, 3, 2, 1).reshape(-1, taps * c)
        assert torch.equal(got, rows)
    name = f"im2col {n}x{side}x{side}x{c}, {kernel[0]}x{kernel[1]}, stride {stride}"
    timed(call, group=name, moved=x.nbytes + planes.nbytes)
