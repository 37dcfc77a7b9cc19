"""Graph -> Program of raw Steps: every operator's rule lowers its own nodes."""

from __future__ import annotations

from prunekern.core.builder import Builder
from prunekern.core.graph import Graph
from prunekern.core.program import Program
from prunekern.core.rule import Registry
from prunekern.ops import REGISTRY


def build(graph: Graph, parameters: tuple[str, ...] = (), registry: Registry = REGISTRY) -> Program:
    """The Program of a traced network, nothing folded or fused; its weights are the module's own tensors.

    parameters: names of the forward's parameters in order (``inspect.signature``).
    Raises LoweringError where a node has no pure form or cannot be stored by name.
    """
    return Builder(graph, registry.find).run(parameters)
