"""The kernels' own tests, on a GPU: the very functions that the interpreter runs, with every tensor there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from tests.interp.test_kernels import *  # noqa: F403  what is collected here runs here

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)
