"""``python -m prunekern.recipes.fashion_mnist``: the study without the command line's other conveniences."""

from __future__ import annotations

import argparse
import sys

from prunekern.errors import PrunekernError
from prunekern.recipes.fashion_mnist.pipeline import run


def main() -> int:
    """Parse arguments, run, print the report. 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(prog="prunekern.recipes.fashion_mnist", description=__doc__)
    parser.add_argument("--full", action="store_true", help="five epochs after every single channel and neuron")
    parser.add_argument("--out", default="runs/fashion-mnist")
    parser.add_argument("--data", default=None, metavar="ROOT", help="a folder that holds the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    try:
        run(given.out, given.full, given.data, given.seed, given.threads).show()
    except PrunekernError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
