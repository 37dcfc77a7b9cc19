"""What a network costs: MACs, elementwise operations, parameters, bytes, peak activation memory.

One convention (see ``Cost``): ``macs`` counts the multiply-accumulates of contractions, ``flops = 2 * macs``.
"""

from prunekern.cost.count import Cost, Costs, Layer, Module, Profile, Uncounted, macs_of, profile
from prunekern.cost.energy import energy
from prunekern.cost.memory import Peak, peak

__all__ = ["Cost", "Costs", "Layer", "Module", "Peak", "Profile", "Uncounted", "energy", "macs_of", "peak", "profile"]
