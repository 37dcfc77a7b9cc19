"""The test-suite's small networks that are hard to prune."""

from __future__ import annotations

from functools import partial

from torch import nn

from bench.architectures import Builder, Inputs
from prunekern.graph.inputs import Call
from tests.zoo import ZOO


def network(name: str) -> tuple[nn.Module, Inputs]:
    model, args, kwargs = ZOO[name]()
    return model, Call(tuple(args), dict(kwargs))


BUILDERS: dict[str, Builder] = {name: partial(network, name) for name in ZOO}
