"""Graph -> Program of raw Steps: every operator's rule lowers its own nodes."""

from __future__ import annotations

from prunekern.core.builder import Builder
from prunekern.core.graph import Graph, place
from prunekern.core.program import Program
from prunekern.core.rule import Registry
from prunekern.errors import LoweringError
from prunekern.ops import REGISTRY


def build(graph: Graph, parameters: tuple[str, ...] = (), registry: Registry = REGISTRY) -> Program:
    """The Program of a traced network, nothing folded or fused; its weights are the module's own tensors.

    parameters: names of the forward's parameters in order (``inspect.signature``).
    Raises LoweringError where a node has no pure form, cannot be stored by name, or gives a result whose size depends
    on the data.
    """
    for node in graph.nodes:
        dims = graph.dims.get(node.name)
        if isinstance(dims, tuple) and any(dim.measured for dim in dims):
            raise LoweringError(f"{place(node)}: the size of its result depends on the data, and a Program is laid out "
                                "for sizes known beforehand; run the pruned module itself (lower=False).")
    return Builder(graph, registry.find).run(parameters)
