"""Datasets: where they come from, how they are checked, and batches of them.

`load(name)` finds or fetches Fashion-MNIST, MNIST or CIFAR-10 and says where it came from; `describe(name)`
shows where it would look; `fetch(name)` fills the cache.
"""

from prunekern.core.files import cache_folder
from prunekern.data.catalog import CATALOG
from prunekern.data.dataset import Batches, Dataset, Pair, batches, loader, stratified
from prunekern.data.locate import describe, fetch, load

DATASETS = tuple(CATALOG)
"""The names `load` knows."""

__all__ = [
    "DATASETS",
    "Batches",
    "Dataset",
    "Pair",
    "batches",
    "cache_folder",
    "describe",
    "fetch",
    "load",
    "loader",
    "stratified",
]
