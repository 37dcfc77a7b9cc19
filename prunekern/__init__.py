"""prunekern: structured pruning, proven, and lowered to GEMMs."""
