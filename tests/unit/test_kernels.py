"""im2col: the C++ operator gives the reference's bits, and the reference gives convolution's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunekern import kernels
from prunekern.errors import InputError

needs_cpp = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))

# batch, height, width, channels, kernel, stride, dilation
GEOMETRIES = [
    (1, 7, 9, 1, (3, 3), (1, 1), (1, 1)),
    (2, 13, 37, 3, (3, 3), (2, 2), (1, 1)),
    (3, 11, 8, 13, (1, 5), (1, 2), (1, 1)),
    (2, 15, 15, 7, (3, 3), (1, 1), (2, 2)),
    (1, 23, 17, 5, (3, 2), (3, 1), (2, 3)),
    (4, 8, 8, 64, (3, 3), (1, 1), (1, 1)),
    (2, 6, 5, 37, (1, 1), (2, 3), (1, 1)),
    (2, 6, 5, 37, (1, 1), (1, 1), (1, 1)),
    (1, 9, 4, 2, (9, 4), (1, 1), (1, 1)),
    (0, 9, 9, 4, (3, 3), (1, 1), (1, 1)),
    (1, 5, 6, 301, (2, 3), (1, 1), (1, 1)),
    (2, 61, 67, 19, (7, 7), (2, 2), (1, 1)),
]


def patches_by_loop(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """One patch at a time, by the definition."""
    rows = []
    out = kernels.output_size(x.shape, kernel, stride, dilation)
    for n in range(x.shape[0]):
        for i in range(out[0]):
            for j in range(out[1]):
                top, left = i * stride[0], j * stride[1]
                taps = [
                    x[n, top + a * dilation[0], left + b * dilation[1]]
                    for a in range(kernel[0])
                    for b in range(kernel[1])
                ]
                rows.append(torch.cat(taps))
    return torch.stack(rows) if rows else x.new_empty(0, kernel[0] * kernel[1] * x.shape[-1])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_cpp_equals_reference(geometry: tuple, dtype: torch.dtype) -> None:
    n, h, w, c, *window = geometry
    x = torch.randn(n, h, w, c, dtype=dtype)
    got = torch.ops.prunekern.im2col_nhwc(x, *window)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, kernels.im2col_nhwc_ref(x, *window))
    assert torch.equal(kernels.im2col_nhwc(x, *window), got)


@pytest.mark.parametrize("geometry", GEOMETRIES[:-1], ids=str)
def test_reference_equals_definition(geometry: tuple) -> None:
    n, h, w, c, *window = geometry
    x = torch.randn(n, h, w, c)
    assert torch.equal(kernels.im2col_nhwc_ref(x, *window), patches_by_loop(x, *window))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_reference_times_weight_is_convolution(rank: int) -> None:
    spatial, kernel = (11, 9, 7)[:rank], (3, 2, 3)[:rank]
    stride, dilation = (2, 1, 1)[:rank], (1, 3, 2)[:rank]
    x = torch.randn(2, *spatial, 5, dtype=torch.float64)
    weight = torch.randn(4, 5, *kernel, dtype=torch.float64)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    want = conv(x.movedim(-1, 1), weight, stride=stride, dilation=dilation).movedim(1, -1)
    patches = kernels.im2col_nhwc(x, kernel, stride, dilation)
    got = patches @ weight.movedim(1, -1).reshape(4, -1).T
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-13, atol=1e-13)


@needs_cpp
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 6, 12, 9).permute(0, 3, 2, 1),
        lambda: torch.randn(2, 9, 24, 6)[:, :, ::2],
        lambda: torch.randn(4, 10, 12, 6)[::2, 1:],
        lambda: torch.randn(1, 9, 12, 1).expand(2, 9, 12, 6),
    ],
    ids=["permuted", "strided", "offset", "expanded"],
)
def test_cpp_takes_inputs_that_are_not_contiguous(make) -> None:
    x, window = make(), ((3, 3), (1, 2), (1, 1))
    assert not x.is_contiguous()
    got = torch.ops.prunekern.im2col_nhwc(x, *window)
    assert torch.equal(got, kernels.im2col_nhwc_ref(x.contiguous(), *window))
    assert torch.equal(got, kernels.im2col_nhwc_ref(x, *window))


@needs_cpp
def test_cpp_is_the_same_with_several_threads() -> None:
    x, window = torch.randn(5, 33, 41, 24), ((3, 5), (2, 1), (1, 2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(torch.ops.prunekern.im2col_nhwc(x, *window), kernels.im2col_nhwc_ref(x, *window))
    finally:
        torch.set_num_threads(threads)


@needs_cpp
def test_dispatch_uses_the_operator_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    reference = kernels.im2col_nhwc_ref
    monkeypatch.setattr(kernels, "im2col_nhwc_ref", lambda *args: calls.append("ref") or reference(*args))
    window = ((3, 3), (1, 1), (1, 1))
    x = torch.randn(1, 5, 5, 2)
    want = reference(x, *window)
    assert torch.equal(kernels.im2col_nhwc(x, *window), want)
    assert calls == []
    kernels.im2col_nhwc(x.half(), *window)
    assert calls == ["ref"]
    monkeypatch.setattr(kernels, "unavailable", lambda: "not here")
    assert torch.equal(kernels.im2col_nhwc(x, *window), want)
    assert calls == ["ref", "ref"]


def test_gradients_flow() -> None:
    x = torch.randn(1, 5, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: kernels.im2col_nhwc(t, (3, 2), (2, 1), (1, 2)), x)


@needs_cpp
def test_operator_passes_opcheck_and_compiles() -> None:
    x = torch.randn(2, 9, 7, 3)
    args = (x, [3, 3], [2, 1], [1, 2])
    torch.library.opcheck(torch.ops.prunekern.im2col_nhwc, args)
    compiled = torch.compile(kernels.im2col_nhwc, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*args), kernels.im2col_nhwc_ref(*args))


@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [
        ((5, 5), ((3,), (1,), (1,)), "one entry of each per spatial dimension"),
        ((1, 5, 5, 2), ((3,), (1, 1), (1, 1)), "one entry of each per spatial dimension"),
        ((1, 5, 5, 5, 2), ((3, 3), (1, 1), (1, 1)), "one entry of each per spatial dimension"),
        ((1, 5, 5, 2), ((3, 3), (0, 1), (1, 1)), "at least 1"),
        ((1, 5, 5, 2), ((3, 3), (1, 1), (1, -1)), "at least 1"),
        ((1, 5, 4, 2), ((3, 3), (1, 1), (1, 2)), r"covers \[3, 5\].*has only \[5, 4\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [kernels.im2col_nhwc, kernels.im2col_nhwc_ref])
def test_wrong_geometry_is_named(function, shape: tuple, window: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(torch.zeros(shape), *window)


@needs_cpp
@pytest.mark.parametrize(
    ("x", "window", "message"),
    [
        (torch.zeros(5, 5, 2), ([3, 3], [1, 1], [1, 1]), "got 3 dimensions"),
        (torch.zeros(1, 5, 5, 2), ([3], [1, 1], [1, 1]), "two entries"),
        (torch.zeros(1, 5, 5, 2), ([3, 3], [1, 0], [1, 1]), "W: kernel 3, stride 0"),
        (torch.zeros(1, 2, 5, 2), ([3, 3], [1, 1], [1, 1]), "H: the window covers 3"),
        (torch.zeros(1, 5, 5, 2, dtype=torch.float16), ([3, 3], [1, 1], [1, 1]), "float32 or float64"),
    ],
    ids=["rank", "entries", "stride", "window", "dtype"],
)
def test_operator_checks_for_itself(x: Tensor, window: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.prunekern.im2col_nhwc(x, *window)


def test_unavailable_tells_why(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(kernels.importlib, "import_module", missing)
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    assert "PRUNEKERN_BUILD=cpp" in kernels._load()
    (tmp_path / "_C.reason").write_text("no C++ compiler was found\n")
    assert kernels._load().endswith("not built: no C++ compiler was found")

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: torch_parallel_for")

    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    assert "undefined symbol" in kernels._load()
