"""The backend in the interpreter: every operator sample and whole networks, held to fp64 by ``lower`` itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekern.backends import Lowered, lower
from prunekern.backends.explain import WITHIN
from prunekern.core.rule import OpRule, Sample
from prunekern.graph.inputs import Call
from prunekern.lower.tolerance import error
from prunekern.ops import REGISTRY
from tests.models import make
from tests.weights import randomise_
from tests.zoo import ZOO

pytestmark = pytest.mark.interp

SAMPLES = REGISTRY.samples()


def algorithms(lowered: Lowered, *inputs: Any) -> dict[str, str]:
    return {row.step: row.algorithm for row in lowered.explain(*inputs).rows}


def single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize(("rule", "sample"), SAMPLES, ids=[str(sample) for _, sample in SAMPLES])
def test_samples(rule: OpRule, sample: Sample) -> None:
    model = randomise_(sample.build()).float().eval()
    lowered = lower(model, tuple(map(single, sample.inputs(2))), backend="triton")
    assert lowered.verification is not None
    for batch in (1, 3) if lowered.program.batch is None else ():
        inputs = tuple(map(single, sample.inputs(batch)))
        lowered.verify(model, *inputs)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo(name: str) -> None:
    case = ZOO[name](batch=2)
    call = Call(case.args, case.kwargs).map(single)
    lowered = lower(case.model.float(), call, backend="triton")
    assert lowered.verification is not None
