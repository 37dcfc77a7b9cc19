"""Which of all networks of the study is the one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunekern.recipes.fashion_mnist.records import Record


@dataclass(frozen=True)
class Pick:
    """chosen, and the networks with fewer MACs that validation would have taken and the test set refused.

    reached: whether anything exceeds the floor on both; where nothing does, ``chosen`` is the network with the
    highest validation accuracy.
    """

    chosen: Record
    refused: tuple[Record, ...]
    reached: bool


RULE = ("Chosen is the network with the fewest MACs among those above the floor on the validation split (ties: the "
        "more accurate there); undone steps count too, since their networks exist. The test set has no say in this "
        "but one: a network that misses the floor on it is passed over for the next on validation, and is named here.")


def choose(records: Sequence[Record], floor: float) -> Pick:
    """Apply ``RULE``: lowest MACs with an accuracy above ``floor`` (a fraction)."""
    enough = sorted((record for record in records if record.after_retraining > floor),
                    key=lambda record: (record.macs, -record.after_retraining, record.number))
    refused: list[Record] = []
    for record in enough:
        if record.test > floor:
            return Pick(record, tuple(refused), True)
        refused.append(record)
    best = max(records, key=lambda record: (record.after_retraining, -record.macs))
    return Pick(best, tuple(refused), False)
