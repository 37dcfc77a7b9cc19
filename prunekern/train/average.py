"""An exponential moving average of a model's weights and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunekern.train.checkpoint import put_state, state_of


class Average:
    """`average = d * average + (1 - d) * weights` after every update, batch-norm statistics included.

    `d` climbs with the number of updates `n` as `min(decay, (1 + n) / (10 + n))`, so that short runs do not keep
    their first weights. Counters and other integers are the latest. Half-precision weights are averaged in float32.
    Source: Polyak and Juditsky 1992; the climb is TensorFlow's `ExponentialMovingAverage`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: _wide(value) for name, value in state_of(model).items()}

    def update(self, model: nn.Module) -> None:
        """Take in the model's weights as they are now."""
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        floats: list[Tensor] = []
        news: list[Tensor] = []
        for name, value in model.state_dict().items():
            if name not in self.values:
                continue
            mine, new = self.values[name], value.detach()
            if mine.is_floating_point() or mine.is_complex():
                floats.append(mine)
                news.append(new.to(mine.dtype))
            else:
                mine.copy_(new)
        with torch.no_grad():
            torch._foreach_lerp_(floats, news, share)

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """The model holds the averages inside, and its own weights again afterwards."""
        own = state_of(model)
        put_state(model, self.values)
        try:
            yield
        finally:
            put_state(model, own)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"updates": torch.tensor(self.updates), **{f"of:{name}": value for name, value in self.values.items()}}

    def put_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.updates = int(state["updates"])
        for name, value in self.values.items():
            value.copy_(state[f"of:{name}"])


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.element_size() < 4 else value
