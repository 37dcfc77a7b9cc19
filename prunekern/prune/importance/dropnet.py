"""The six metrics of DropNet (Tan & Motani 2020), by the names that the paper gives them."""

from __future__ import annotations

from collections.abc import Mapping


def _metric(criterion: str, direction: str, ranking: str) -> Mapping[str, str]:
    return {"criterion": criterion, "normalisation": "none", "direction": direction, "ranking": ranking}


DROPNET: Mapping[str, Mapping[str, str]] = {
    "minimum": _metric("activation", "minimum", "global"),
    "maximum": _metric("activation", "maximum", "global"),
    "random": _metric("random", "minimum", "global"),
    "minimum_layer": _metric("activation", "minimum", "layer"),
    "maximum_layer": _metric("activation", "maximum", "layer"),
    "random_layer": _metric("random", "minimum", "layer"),
}
"""Which nodes go first, by the mean of |post-activation| over all data and positions as it is, compared across layers
or within each: the lowest, the highest, or any. ``criterion="dropnet:maximum_layer"`` sets all of this where it is not
set otherwise. The paper's loop (drop a fraction p of what is left, rewind to the initial weights, train again) is a
schedule of its own; these say what a turn of it drops. Source: its section 3.2 and algorithm 1."""
