"""Small networks that are hard to prune, each realistic and cheap: `ZOO["unet"]() -> (model, args, kwargs)`.

Held by `tests/unit/test_test_models.py` for every entry: eval mode, seeded, batch on axis 0 of every tensor
that goes in or comes out (so `ZOO[name](batch=3)` is the same network on three samples), samples independent
of each other, captured by `torch.export` without strictness.
"""

from __future__ import annotations

from tests.zoo import (
    attention,
    branches,
    convolutions,
    experts,
    gates,
    graphs,
    interfaces,
    language,
    layouts,
    norms,
    positions,
    recurrent,
    transformers,
)
from tests.zoo.registry import ZOO, Case, Factory

__all__ = ["ZOO", "Case", "Factory"]
_SOURCES = (attention, branches, convolutions, experts, gates, graphs, interfaces, language, layouts, norms, positions,
            recurrent, transformers)
