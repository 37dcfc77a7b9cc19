"""Calibration inputs as the dense and the pruned network take them side by side, and what of them memory holds."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunekern.core.graph import Graph
from prunekern.graph.evaluate import same_dice
from prunekern.graph.inputs import Call
from prunekern.prune.importance.calibration import Data, calls
from prunekern.prune.importance.passes import part, run, splits
from prunekern.prune.lockstep import Walker
from prunekern.prune.reference import difference


def walks(graph: Graph, call: Call) -> bool:
    """Whether the network is the same with its in-place operators taken out of place: not if they write to views."""
    small = part(call, None, 0, 2)[0] if graph.free_batch and splits(call) else call
    leaves = pytree.tree_leaves((small.args, dict(small.kwargs)))
    walker = Walker(graph.fx, {name: [leaf] for name, leaf in zip(graph.inputs, leaves, strict=True)}, state_of(graph))
    with same_dice():
        walked = walker.outputs()[0]
    with same_dice():
        outputs = run(graph, graph.tensors, small, 0)
    return difference(walked, outputs) < 1e-5


def state_of(graph: Graph) -> dict[str, Tensor]:
    return {name: graph.tensors[fqn].detach() for name, fqn in graph.state.items()}


def inputs_of(graph: Graph, batches: Data, images: int, memory: float) -> tuple[list[Call], tuple[str, ...]]:
    """As many batches as asked for and as memory holds."""
    fits = max(1, int(memory / max(_peak(graph), 1)))
    wanted, found, seen = min(images, fits), list[Call](), 0
    for call, _ in calls(graph, batches):
        if seen + (call.batch or 1) > wanted and graph.free_batch and splits(call):
            call = part(call, None, 0, wanted - seen)[0]
        found.append(call)
        seen += call.batch or 1
        if seen >= wanted:
            break
    short = seen >= fits and fits < images
    return found, (f"reconstruction used {seen} images: the activations of more do not fit into {memory / 1e9:g} GB",
                   ) if short else ()


def _peak(graph: Graph) -> int:
    """Bytes of activations alive at once for one row, of the dense and the pruned network, roughly."""
    element = max((t.element_size() for t in graph.tensors.values() if t.is_floating_point()), default=4)
    last = {arg: node for node in graph.nodes for arg in node.all_input_nodes}
    alive = worst = 0
    sizes: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_function" and graph.is_tensor(node):
            sizes[node] = element * int(torch.Size(graph.shape(node)).numel()) // max(graph.batch, 1)
            alive += sizes[node]
            worst = max(worst, alive)
        for arg in node.all_input_nodes:
            if last[arg] is node:
                alive -= sizes.pop(arg, 0)
    return 3 * worst
