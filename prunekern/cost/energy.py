"""A proxy for energy: what arithmetic and data movement would take, from published figures for one technology.

It ranks networks that are limited by memory differently from MACs alone; it is no measurement, and no prediction for
the machine at hand. Source: M. Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC 2014, figure
1.1.9 (45 nm, 0.9 V): an fp32 multiplication takes 3.7 pJ and an addition 0.9 pJ; 64 bits from DRAM 1.3 to 2.6 nJ.
"""

from __future__ import annotations

from prunekern.cost.count import Profile

MAC = 3.7 + 0.9         # pJ for a multiply-accumulate in fp32
BYTE = 1300 / 8         # pJ for a byte moved, the lower figure; as if no cache held anything between operators


def energy(profile: Profile) -> float:
    """µJ for one sample: every multiply-accumulate, and every byte of weights and activations read and written once.

    Weights are read once for a whole batch, so a profile of a larger batch has less of them for each sample.
    """
    total = profile.total
    moved = total.weight_bytes + total.read_bytes + total.written_bytes
    return (MAC * total.macs + BYTE * moved) / 1e6 / max(profile.batch, 1)
