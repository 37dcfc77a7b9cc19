"""What a user may say about which channels are candidates, before any of them is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from prunekern.errors import TargetError

ATTENTION = ("auto", "heads", "widths")
NORMS = ("auto", "fixed", "counted", "remaining")


@dataclass(frozen=True)
class Policy:
    """Which kinds of channels may leave.

    attention: 'heads' removes whole attention heads, 'widths' the same positions of every head (queries with keys,
    values with what reads them), 'auto' heads wherever there are several and nothing holds them. A mapping gives
    a kind per layer: {glob of module paths: kind}; the first match counts, others are 'auto'.
    outputs: the features of the network's outputs may leave (for backbones); ``Plan.outputs`` says which stay.
    norms: what becomes of channels that are normalised or averaged across (the residual stream of a transformer).
    'counted': they may leave, and norms count them on as the zeros they are (``prunekern.core.counted``), which is
    exact. 'fixed': they stay. 'auto' counts where the module that normalises can be exchanged for one that does, so
    that the network's own class remains; elsewhere they stay. 'remaining': they may leave, and norms run on what
    remains, as other pruners have it, and softmax and maxima, too. This is not what zeroing them would give.
    """

    attention: str | Mapping[str, str] = "auto"
    outputs: bool = False
    norms: str = "auto"

    def __post_init__(self) -> None:
        kinds = self.attention.values() if isinstance(self.attention, Mapping) else [self.attention]
        for kind in kinds:
            if kind not in ATTENTION:
                raise TargetError(f"attention={kind!r} is none of {', '.join(map(repr, ATTENTION))}.")
        if self.norms not in NORMS:
            raise TargetError(f"norms={self.norms!r} is none of {', '.join(map(repr, NORMS))}.")

    def attention_of(self, path: str) -> str:
        """The kind for the module at a path."""
        if isinstance(self.attention, str):
            return self.attention
        return next((kind for glob, kind in self.attention.items() if fnmatchcase(path, glob)), "auto")

    def to_json(self) -> dict[str, Any]:
        """What differs from the default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(DEFAULT, name)}

    @classmethod
    def from_json(cls, data: Any) -> Policy:
        """Raises TargetError where the data is no policy."""
        try:
            return cls(**data)
        except TypeError as error:
            raise TargetError(f"{data!r} is no policy ({error}); its fields are attention, outputs and "
                              "norms.") from error


DEFAULT = Policy()
Asked = Policy | Mapping[str, Any]        # what functions take: a policy, or its fields as a mapping


def as_policy(asked: Asked) -> Policy:
    """Raises TargetError where a mapping names something else than a policy's fields."""
    return asked if isinstance(asked, Policy) else Policy.from_json(asked)
