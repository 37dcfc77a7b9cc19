"""What may be passed to a network on the CPU engine: any tensor of the right shape and dtype, wherever its elements
are; all else is refused in words."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekern.backends import Lowered, lower
from prunekern.backends.cpu.native import instruction_sets
from prunekern.errors import BackendUnavailable, InputError

if not instruction_sets():
    pytest.skip("the extension is not built", allow_module_level=True)

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Own(Tensor):
    """A tensor class of the user's."""


def misaligned(x: Tensor, floats: int, extra: int = 0) -> Tensor:
    """The same values that many floats (and bytes) after an allocation."""
    memory = torch.zeros(4 * (x.numel() + floats) + extra, dtype=torch.uint8)
    array = memory.numpy()[4 * floats + extra:][:4 * x.numel()].view(np.float32)
    found = torch.from_numpy(array).view(x.shape)
    found.copy_(x)
    return found


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "with gaps": lambda x: torch.stack((x, x + 1), -1)[..., 0],
    "reversed twice": lambda x: x.flip(2).flip(2),
    "within a larger one": lambda x: F.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    "one float on": lambda x: misaligned(x, 1),
    "seven floats on": lambda x: misaligned(x, 7),
    "one byte on": lambda x: misaligned(x, 0, 1),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "with a history": lambda x: x.clone().requires_grad_() * 1,
    "parameter": lambda x: nn.Parameter(x.clone()),
    "subclass": lambda x: x.clone().as_subclass(Own),
    "negated view": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "real part": lambda x: torch.view_as_real(torch.complex(x, -x))[..., 0],
}


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def image_net() -> nn.Module:
    return network(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 4))


@pytest.fixture(scope="module", params=["image", "matrix"])
def lowered(request: pytest.FixtureRequest) -> Lowered:
    """Layers that import their input, and ones that read it where it is."""
    model = image_net() if request.param == "image" else network(nn.Flatten(), nn.Linear(192, 7), nn.Tanh())
    return lower(model, X, backend="cpu", tune="off", verify=False)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(lowered: Lowered, form: str) -> None:
    expected = lowered(X)
    if form == "one byte on" and "undefined" in os.environ.get("PRUNEKERN_CXXFLAGS", ""):
        pytest.skip("processors read floats from any byte; the language has no such floats")
    x = FORMS[form](X)
    with torch.no_grad():
        assert torch.equal(torch.Tensor(x.detach()) if type(x) is Own else x, X)
    for _ in range(2):                                       # by the checked way, then by the direct one
        got = lowered(x)
        assert torch.equal(got, expected)
        assert not got.requires_grad
        assert torch.equal(lowered(X), expected)


def test_expanded(lowered: Lowered) -> None:
    for x in (X[:1].expand(2, 3, 8, 8), X[:, :1, :1].expand(2, 3, 8, 8), torch.tensor(0.5).expand(2, 3, 8, 8)):
        assert torch.equal(lowered(x), lowered(x.clone()))


def test_axes_of_size_one_with_any_stride() -> None:
    model = network(nn.Conv2d(1, 3, 3, padding=1))
    lowered = lower(model, torch.randn(1, 1, 1, 9), backend="cpu", tune="off", verify=False)
    x = torch.randn(1, 1, 1, 9)
    odd = x.as_strided((1, 1, 1, 9), (12345, 7, 1000, 1))
    torch.testing.assert_close(lowered(odd), model(x))
    assert torch.equal(lowered(odd), lowered(x))


def test_one_number() -> None:
    """A negated view of a single number is contiguous."""
    lowered = lower(network(nn.Linear(1, 1, bias=False)), torch.randn(1, 1), backend="cpu", tune="off", verify=False)
    x = torch.complex(torch.zeros(1, 1), torch.full((1, 1), -3.0)).conj().imag
    assert x.is_neg()
    assert x.is_contiguous()
    for _ in range(2):
        assert torch.equal(lowered(x), lowered(torch.full((1, 1), 3.0)))


@pytest.mark.parametrize(("wrong", "words"), [
    (X.double(), r"float64.*\.to\("), (X.half(), "float16"), (X.int(), "int32"), (X[0], "3 axes"), (X[..., :7], "7"),
    (X.to_sparse(), "to_dense"), (X.to_mkldnn(), "to_dense"), ([1.0], "structure"), (None, "NoneType"),
    (X.numpy(), "ndarray"),
], ids=["double", "half", "int", "rank", "size", "sparse", "mkldnn", "list", "none", "array"])
def test_what_is_refused(lowered: Lowered, wrong: object, words: str) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=words):
            lowered(wrong)
        lowered(X)                                           # from now on, calls like it take the direct way


def test_another_device_is_refused(lowered: Lowered) -> None:
    with pytest.raises(BackendUnavailable, match="meta"):
        lowered(X.to("meta"))


def test_vmap_is_refused_and_leaves_the_network_well(lowered: Lowered) -> None:
    lowered(X)
    with pytest.raises(RuntimeError, match="prunekern::run"):
        torch.vmap(lowered)(X.expand(3, 2, 3, 8, 8))
    assert lowered(X).isfinite().all()


# ---- out ---------------------------------------------------------------------------------------------------------


def test_out_anywhere(lowered: Lowered) -> None:
    expected = lowered(X)
    for floats in range(9):
        out = misaligned(torch.zeros_like(expected), floats)
        assert lowered(X, out=out) is out
        assert torch.equal(out, expected)


def test_out_that_does_not_fit(lowered: Lowered) -> None:
    y = lowered(X)
    for wrong in (y[:1], y.double(), torch.zeros(y.shape[::-1]).T, torch.zeros(1).expand(y.shape), y.to("meta")):
        for _ in range(2):
            with pytest.raises(InputError, match="out for"):
                lowered(X, out=wrong)
            lowered(X, out=torch.empty_like(y))


# ---- no samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_empty_batch(backend: str) -> None:
    """Empty outputs of the right shape, as the model gives."""
    model = image_net()
    lowered = lower(model, X, backend=backend, verify=False)
    for _ in range(2):
        y = lowered(X[:0])
        assert y.shape == model(X[:0]).shape == (0, 4)
        assert lowered(X[:0], out=y) is y
        assert lowered(X).shape == (2, 4)
    with pytest.raises(InputError, match="empty"):
        lowered.explain(X[:0])


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


def test_an_empty_batch_is_refused_where_there_is_a_result_all_the_same() -> None:
    lowered = lower(Summed().eval(), torch.randn(3, 5), backend="cpu", tune="off", verify=False)
    with pytest.raises(InputError, match="empty"):
        lowered(torch.randn(0, 5))
    assert lowered(torch.ones(3, 5)).tolist() == [3.0] * 5
