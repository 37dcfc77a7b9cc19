"""Every formula for multiply-accumulates against two counters that others wrote, and against real GEMMs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.core.rule import OpRule, Sample
from prunekern.cost import Profile, profile
from prunekern.graph.inputs import Call
from prunekern.graph.trace import trace
from prunekern.ops import REGISTRY
from prunekern.ops.elementwise import Pair
from tests.counters import Count, flopcounter_count, fvcore_count
from tests.models import ARCHITECTURES, make
from tests.zoo import ZOO

BLIND = {
    "aten::_convolution_mode",
    "aten::baddbmm",
    "aten::scaled_dot_product_attention",
    "aten::lstm",
    "aten::gru",
    "aten::rnn_tanh",
    "aten::rnn_relu",
}
"""Contractions that fvcore lists as unsupported and counts as 0. The first is a convolution whose padding is
a string: FlopCounterMode and the GEMM below say what it really costs."""

FVCORE_NAMES = {
    "conv_transpose": "conv",
    "conv": "conv",
    "linear": "linear",
    "matmul": "matmul",
    "mm": "mm",
    "bmm": "bmm",
    "addmm": "addmm",
    "einsum": "einsum",
}
"""Start of our operator's name -> fvcore's name, longer ones first."""

NETWORKS = ("fashion", "lenet", "vgg16", "resnet18", "resnet50", "resnet56", "mobilenet_v2", "densenet121")


def samples() -> list[Any]:
    return [
        pytest.param(rule, sample, id=f"{type(rule).__name__}-{sample}")
        for rule, sample in REGISTRY.samples()
    ]


@contextmanager
def visible_gemms() -> Iterator[None]:
    """On CPU an LSTM is one fused oneDNN call, of which FlopCounterMode sees nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch about a TF32 switch that nobody touched
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def both(model: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Count, Count]:
    with visible_gemms():
        return fvcore_count(model, args, kwargs), flopcounter_count(model, args, kwargs)


# ---- one operator ----


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("rule", "sample"), samples())
def test_formula_is_what_both_counters_say(rule: OpRule, sample: Sample, batch: int) -> None:
    model, inputs = sample.build().eval(), sample.inputs(batch)
    ours = profile(model, inputs)
    fvcore, flopcounter = both(model, inputs)
    assert ours.batch == batch
    assert ours.uncounted == ()
    assert ours.macs == flopcounter.total
    assert ours.total.fvcore_flops == fvcore.total
    # fvcore charges einsum for summing one operand, although nothing is multiplied: the zero is right.
    if not BLIND & set(fvcore.unsupported) and str(sample) != "einsum of one":
        assert ours.macs == fvcore.contractions


WIDTHS = (1, 13, 37)


@pytest.mark.parametrize(
    "build",
    [
        *(lambda i=i, o=o: nn.Conv2d(i, o, 3, padding=1, bias=o == 13) for i in WIDTHS for o in WIDTHS),
        *(lambda n=n, m=m: nn.Conv2d(n, n * m, 3, stride=2, groups=n) for n in WIDTHS for m in (1, 3)),
        *(lambda i=i, o=o: nn.ConvTranspose2d(i, o, 3, stride=2, padding=1) for i in WIDTHS for o in WIDTHS),
        *(lambda n=n: nn.ConvTranspose2d(n, 3 * n, 2, groups=n, output_padding=0) for n in WIDTHS),
        *(lambda i=i, o=o: nn.Conv1d(i, o, 1) for i, o in ((1, 37), (37, 1), (13, 37))),
        lambda: nn.Conv3d(13, 1, (3, 1, 2), dilation=(2, 1, 1)),
    ],
)
def test_odd_widths_of_convolutions(build: Callable[[], nn.Module]) -> None:
    layer = build().eval()
    rank = len(layer.kernel_size)  # type: ignore[arg-type]
    inputs = (torch.randn(1, layer.in_channels, *(7, 9, 5)[:rank]),)  # type: ignore[arg-type]
    fvcore, flopcounter = both(layer, inputs)
    assert profile(layer, inputs).macs == fvcore.total == flopcounter.total > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", WIDTHS)
@pytest.mark.parametrize("inputs", WIDTHS)
def test_odd_widths_of_linear_layers(inputs: int, outputs: int, bias: bool) -> None:
    layer, x = nn.Linear(inputs, outputs, bias).eval(), (torch.randn(3, 5, inputs),)
    fvcore, flopcounter = both(layer, x)
    assert profile(layer, x).macs == fvcore.total == flopcounter.total == 15 * inputs * outputs


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 5, 7), (3, 7, 4)),
        ((3, 2, 5, 7), (3, 2, 7, 4)),
        ((3, 5, 7), (7, 4)),
        ((3, 1, 5, 7), (3, 2, 7, 4)),
        ((3, 5, 7), (3, 1, 7, 1)),
        ((3, 13, 37), (3, 37, 1)),
    ],
    ids=str,
)
def test_matrix_products_broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    model, inputs = Pair(torch.matmul, "matmul").eval(), (torch.randn(left), torch.randn(right))
    ours = profile(model, inputs)
    fvcore, flopcounter = both(model, inputs)
    assert ours.macs == flopcounter.total > 0
    # fvcore multiplies the left side's elements only: of a batch that the left lacks it sees one. Its figure
    # is reproduced, FlopCounterMode's is the number of products that are made.
    assert ours.total.fvcore_flops == fvcore.total
    assert (fvcore.total < ours.macs) == (left[:-2] != torch.broadcast_shapes(left[:-2], right[:-2]))


@pytest.mark.parametrize(("right", "macs"), [((7,), 3 * 5 * 7), ((7, 1), 3 * 5 * 7)], ids=str)
def test_a_vector_counts_like_the_matrix_of_one_column(right: tuple[int, ...], macs: int) -> None:
    """fvcore fails on a vector on the right and FlopCounterMode does not know ``mv``; a column they count."""
    model, inputs = Pair(torch.matmul, "matmul").eval(), (torch.randn(3, 5, 7), torch.randn(right))
    assert profile(model, inputs).macs == macs
    if len(right) == 2:
        assert all(count.total == macs for count in both(model, inputs))


# ---- the GEMM that computes the same ----


def gemm_macs(left: Tensor, right: Tensor) -> int:
    """M * N * K of a batched product."""
    return left.shape[:-2].numel() * left.shape[-2] * left.shape[-1] * right.shape[-1]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 13, 3, stride=2, padding=1),
        nn.Conv2d(1, 5, (3, 1)),
        nn.Conv2d(6, 4, 3, dilation=2, groups=2),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 7, 3, padding="same"),
        nn.Conv2d(13, 37, 1, padding="valid", bias=False),
    ],
    ids=str,
)
def test_a_convolution_is_im2col_and_a_gemm(layer: nn.Conv2d) -> None:
    x = torch.randn(3, layer.in_channels, 7, 8)
    padding = 1 if layer.padding == "same" else 0 if layer.padding == "valid" else layer.padding
    columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # type: ignore[arg-type]
    rows = columns.view(3, layer.groups, -1, columns.shape[-1])
    weight = layer.weight.view(layer.groups, layer.out_channels // layer.groups, -1).expand(3, -1, -1, -1)
    expected = layer(x)
    bias = 0 if layer.bias is None else layer.bias.view(-1, 1, 1)
    torch.testing.assert_close((weight @ rows).reshape(expected.shape) + bias, expected)
    assert profile(layer.eval(), x).macs == gemm_macs(weight, rows)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(6, 1, 2, stride=2),
        nn.ConvTranspose2d(6, 4, 3, dilation=2, groups=2),
        nn.ConvTranspose2d(6, 6, 3, groups=6, bias=False),
    ],
    ids=str,
)
def test_a_transposed_convolution_is_a_gemm_and_col2im(layer: nn.ConvTranspose2d) -> None:
    """Both counters take the input's size here, and the GEMM says they are right: padding crops after."""
    x = torch.randn(3, layer.in_channels, 4, 5)
    columns = x.view(3, layer.groups, -1, 20)
    weight = layer.weight.view(layer.groups, layer.in_channels // layer.groups, -1).mT.expand(3, -1, -1, -1)
    expected = layer(x)
    folded = F.fold(
        (weight @ columns).reshape(3, -1, 20),
        expected.shape[2:],
        layer.kernel_size,
        layer.dilation,
        layer.padding,
        layer.stride,
    )  # type: ignore[arg-type]
    bias = 0 if layer.bias is None else layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(folded + bias, expected)
    ours = profile(layer.eval(), x)
    assert (
        ours.macs
        == gemm_macs(weight, columns)
        == fvcore_count(layer, x).total
        == flopcounter_count(layer, x).total
    )


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda cell: cell.__name__)
def test_a_recurrent_layer_is_its_cell_at_every_step(cell: type[nn.RNNCellBase]) -> None:
    """Where neither counter knows the operator, the unrolled linear maps of its cell are counted."""
    layer = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU, nn.RNNCell: nn.RNN}[cell](
        5, 7, batch_first=True
    ).eval()
    one = cell(5, 7).eval()

    def maps(x: Tensor) -> Tensor:
        return F.linear(x, one.weight_ih) + F.linear(x.new_zeros(3, 7), one.weight_hh)

    per_step = flopcounter_count(Pair(maps, "step"), torch.randn(3, 5)).total
    assert profile(layer, torch.randn(3, 6, 5)).macs == 6 * per_step > 0


def test_a_bias_is_no_mac() -> None:
    for build in (
        lambda bias: nn.Conv2d(3, 5, 3, bias=bias),
        lambda bias: nn.Linear(8, 5, bias=bias),
        lambda bias: nn.ConvTranspose2d(3, 5, 3, bias=bias),
    ):
        x = torch.randn(2, 3, 8, 8)
        with_bias, without = profile(build(True).eval(), x).total, profile(build(False).eval(), x).total
        assert with_bias.macs == without.macs
        assert with_bias.elementwise > without.elementwise == 0


# ---- whole networks ----


def fvcore_name(op: str) -> str | None:
    return next(
        (name for start, name in FVCORE_NAMES.items() if op.removeprefix("aten.").startswith(start)), None
    )


def counted(ours: Profile, name: Callable[[str], str | None], value: str) -> dict[str, Counter[str]]:
    """Module path -> operator -> count, parents included, from the layers alone."""
    found: dict[str, Counter[str]] = {}
    for layer in ours.layers:
        op, parts = name(layer.op), layer.module.split(".") if layer.module else []
        for depth in range(len(parts) + 1):
            counts = found.setdefault(".".join(parts[:depth]), Counter())
            if op is not None and getattr(layer.cost, value):
                counts[op] += getattr(layer.cost, value)
    return found


def nonzero(counts: Any) -> dict[str, dict[str, int]]:
    kept = {path: {op: n for op, n in ops.items() if n} for path, ops in counts.items()}
    return {path: ops for path, ops in kept.items() if ops}


def flopcounter_name(op: str) -> str | None:
    """FlopCounterMode's names depend on the layout (mm or addmm); a product is a product."""
    name = fvcore_name(op)
    return name if name in (None, "conv") else "product"


def merged(count: Count) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for path, ops in count.by_module_and_operator.items():
        for op, n in ops.items():
            found.setdefault(path, Counter())["conv" if op == "convolution" else "product"] += n
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_per_module_and_operator(name: str, batch: int) -> None:
    model, inputs = make(name, batch)
    ours = profile(model, inputs)
    fvcore = fvcore_count(model, inputs)
    # FlopCounterMode needs shapes only.
    flopcounter = flopcounter_count(model.to("meta"), tuple(x.to("meta") for x in inputs))
    assert ours.uncounted == ()
    assert ours.batch == batch
    assert ours.macs == fvcore.contractions == flopcounter.total
    assert ours.total.fvcore_flops == fvcore.total
    assert nonzero(counted(ours, flopcounter_name, "macs")) == nonzero(merged(flopcounter))

    def exact(op: str) -> str:
        return fvcore_name(op) or op.removeprefix("aten.")

    assert nonzero(counted(ours, exact, "fvcore_flops")) == nonzero(fvcore.by_module_and_operator)
    modules = {module.path: module.cost for module in ours.modules}
    assert {path: modules[path].macs for path, n in flopcounter.by_module.items() if n} == {
        path: n for path, n in flopcounter.by_module.items() if n
    }
    assert ours.params == ARCHITECTURES[name].parameters


def test_published_figures_of_resnet50() -> None:
    """4.09 G multiply-accumulates; fvcore adds 2 per element of batch norm and 1 per pooled input: 4.11 G."""
    model, inputs = make("resnet50")
    ours = profile(model, inputs)
    assert (ours.macs, ours.flops, ours.total.fvcore_flops) == (4_089_184_256, 8_178_368_512, 4_111_512_576)
    by_operator = ours.by_operator()
    assert (
        by_operator["aten.batch_norm"].fvcore_flops + by_operator["aten.adaptive_avg_pool2d"].fvcore_flops
        == ours.total.fvcore_flops - ours.macs
    )


UNTRACEABLE = {"segnet"}  # torch.jit.trace, which fvcore uses, fails on max_unpool2d


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo_agrees(name: str) -> None:
    case = ZOO[name](batch=3)
    ours = profile(trace(case.model, Call(case.args, case.kwargs)))
    case.model.requires_grad_(False)      # FlopCounterMode fails on a layer that is given a view of a parameter
    with visible_gemms():
        assert ours.macs == flopcounter_count(*case).total
        if name not in UNTRACEABLE:
            assert ours.total.fvcore_flops == fvcore_count(*case).total
