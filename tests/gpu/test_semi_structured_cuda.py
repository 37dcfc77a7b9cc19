"""On a GPU with sparse tensor cores, 2:4 linear layers give what the masked dense ones give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunekern.prune.semi_structured import to_semi_structured, unavailable
from prunekern.prune.sparse import magnitude, masked, nm
from prunekern.train import fine_tune

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sparse_products_equal_dense_ones(dtype: torch.dtype) -> None:
    reason = unavailable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    model = model.to(DEVICE, dtype).eval()
    made = masked(model, nm(model))
    found = to_semi_structured(made)
    assert {"0", "2"} <= set(found.converted)
    assert set(found.left) <= {"4"}                             # ten rows are no multiple of what the kernels need
    x = torch.randn(64, 256, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        expected, got = made(x), found.model(x)
    assert float((got - expected).abs().max()) <= 2e-2 * float(expected.abs().max())
    assert float((model(x) - expected).abs().max()) > 5e-2 * float(expected.abs().max())


def test_masks_hold_where_the_model_is() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to(DEVICE)
    masks = magnitude(model, 0.7)
    data = torch.randn(60, 8, device=DEVICE), torch.arange(60, device=DEVICE) % 3
    fine_tune(model, masks, data, epochs=2, lr=0.05, batch_size=20, progress=False)
    assert [int((p == 0).sum()) for p in (model[0].weight, model[2].weight)] == list(masks.removed().values())
