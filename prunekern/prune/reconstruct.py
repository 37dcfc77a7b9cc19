"""What pruning took away, made good by least squares: weights refitted to give what the dense network gives.

Layer by layer, in the order of the network: given what the *pruned* network really feeds a layer, its weights and bias
are solved for so that the activation it lands in matches the dense network's. A layer whose output is added to a
residual stream lands behind that addition, so it also takes back the drift that the stream has gathered so far.
No labels, no gradients, one pass.

Sources: reconstruction after channel pruning by least squares, He et al., "Channel Pruning for Accelerating Very Deep
Neural Networks" (ICCV 2017), equation 5, and Luo et al., "ThiNet" (ICCV 2017), equation 6; on the pruned network's own
inputs (the asymmetric case), Zhang et al., "Accelerating Very Deep Convolutional Networks" (TPAMI 2016), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunekern.core.rule import argument, aten
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.ops import REGISTRY
from prunekern.prune.contractions import Contraction, Moments, contractions
from prunekern.prune.importance.calibration import Data, calls
from prunekern.prune.lockstep import Walker, ordered
from prunekern.prune.reference import remaining
from prunekern.prune.rewrite import ORIGIN, FunctionalBatchNorm, rewrite

IMAGES, ROWS, RIDGE = 1024, 65536, 1e-3
ROWS_PER_INPUT = 12     # of a layer with many inputs
WIDEST = 8192           # inputs of a layer that are solved for at once
MEMORY = 4e9            # bytes of activations held at a time
FLAT = 1e-6             # of the largest scale: an output that a batch norm all but erases is left as it is
ADD, PASSED = aten("add.Tensor", "add_.Tensor"), aten("dropout", "feature_dropout", "clone", "contiguous")


@dataclass(frozen=True)
class Refit:
    """A layer's error where it lands, relative to the variance there: as sliced, and with the weights solved for."""

    layer: str
    before: float
    after: float


@dataclass(frozen=True)
class Reconstruction:
    """What was refitted, on how many images."""

    layers: tuple[Refit, ...]
    images: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((f"{len(self.layers)} layers refitted on {self.images} images",
                          *(f"  {r.layer:<32} {r.before:9.2e} -> {r.after:9.2e}" for r in self.layers), *self.notes))


@dataclass(frozen=True)
class _Norm:
    """A batch norm with fixed statistics: y = scale x + shift. own: nothing else uses its tensors."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    own: bool

    @property
    def scale(self) -> Tensor:
        return _double(self.weight, self.var, 1) / (self.var.double() + self.eps).sqrt()

    @property
    def shift(self) -> Tensor:
        return _double(self.bias, self.mean, 0) - self.mean.double() * self.scale


def _double(tensor: Tensor | None, like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value, dtype=torch.float64) if tensor is None else tensor.detach().double()


@dataclass(frozen=True)
class _Way:
    """From a layer to where it lands: (node after it, batch norm or the other side of an addition), in order."""

    layer: fx.Node
    parts: tuple[tuple[fx.Node, _Norm | fx.Node], ...]

    @property
    def landing(self) -> fx.Node:
        return self.parts[-1][0] if self.parts else self.layer

    @property
    def others(self) -> tuple[fx.Node, ...]:
        return tuple(part for _, part in self.parts if isinstance(part, fx.Node))

    @property
    def norm(self) -> _Norm | None:
        """The one that can take a bias for a layer which has none."""
        return next((part for _, part in self.parts if isinstance(part, _Norm) and part.own), None)


def reconstruct(model: nn.Module, groups: Groups, keep: Tensor, batches: Data, *, images: int = IMAGES,
                rows: int = ROWS, ridge: float = RIDGE, memory: float = MEMORY, seed: int = 0,
                tell: Callable[[str], None] = lambda _: None) -> Reconstruction:
    """Refit every convolution and linear layer of a pruned network, in place, to the dense one.

    model: what ``prune`` made of the network that ``groups`` was found on, with ``keep`` [groups]; the dense network
    itself is not touched. batches: unlabelled inputs (labels are ignored), of which ``images`` rows are used, or as
    many as ``memory`` bytes of activations allow. rows: output positions that each layer is fitted on, more where a
    layer has many inputs. ridge: how much of the mean input variance is added to each, which draws the solution
    towards the sliced weights. Batch-norm statistics become those of the refitted layer, the function staying the same.

    Layers whose weight is shared, computed, or not a convolution's or linear layer's stay as they are, but are run.
    Raises InputError where the data does not fit.
    """
    form = rewrite(groups.labels, keep, model, REGISTRY, layers=False)
    form.eval()
    given, notes = _inputs(groups, batches, images, memory)
    work = _Work(groups, keep, form, given, rows, ridge, torch.Generator().manual_seed(seed))
    layers = []
    with torch.no_grad():
        for number, node in enumerate(work.order):
            if node in work.ways:
                tell(f"refit {number}/{len(work.order)}: {work.layers[node].weight}")
                refit = work.refit(node)
                layers += [refit] if refit is not None else []
            work.pruned.run(node)
    return Reconstruction(tuple(layers), sum(call.batch or 1 for call in given), notes)


def _inputs(groups: Groups, batches: Data, images: int, memory: float) -> tuple[list[Call], tuple[str, ...]]:
    """As many batches as asked for and as memory holds."""
    fits = max(1, int(memory / max(_peak(groups), 1)))
    wanted, found, seen = min(images, fits), list[Call](), 0
    for call, _ in calls(groups.graph, batches):
        rows = call.batch or 1
        if seen + rows > wanted and groups.graph.free_batch and call.batch:
            call, rows = call.resized(max(wanted - seen, 1)), max(wanted - seen, 1)
        found.append(call)
        seen += rows
        if seen >= wanted:
            break
    short = seen >= fits and fits < images
    return found, (f"reconstruction used {seen} images: the activations of more do not fit into {memory / 1e9:g} GB",
                   ) if short else ()


def _peak(groups: Groups) -> int:
    """Bytes of activations alive at once for one row, of the dense and the pruned network, roughly."""
    graph = groups.graph
    last = {arg: node for node in graph.nodes for arg in node.all_input_nodes}
    alive = worst = 0
    sizes: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_function" and graph.is_tensor(node):
            sizes[node] = 4 * int(torch.Size(graph.shape(node)).numel()) // max(graph.batch, 1)
            alive += sizes[node]
            worst = max(worst, alive)
        for arg in node.all_input_nodes:
            if last[arg] is node:
                alive -= sizes.pop(arg, 0)
    return 3 * worst


class _Work:
    """One reconstruction: both networks, the ways from layers to where they land, and the order of things."""

    def __init__(self, groups: Groups, keep: Tensor, form: fx.GraphModule, given: list[Call], rows: int, ridge: float,
                 generator: torch.Generator) -> None:
        graph = groups.graph
        self.groups, self.keep, self.rows, self.ridge, self.generator = groups, keep, rows, ridge, generator
        leaves = [pytree.tree_leaves((call.args, dict(call.kwargs))) for call in given]
        columns = list(zip(*leaves, strict=True))
        state = {name: graph.tensors[fqn].detach() for name, fqn in graph.state.items()}
        self.dense = Walker(graph.fx, dict(zip(graph.inputs, columns, strict=True)), state)
        names = [node.name for node in form.graph.nodes if node.op == "placeholder"]
        self.pruned = Walker(form.graph, dict(zip(names, columns, strict=True)), {})
        self.original = {node.name: node for node in graph.nodes}
        made = contractions(graph)
        self.layers = {node: made[origin] for node in form.graph.nodes
                       if (origin := self.original.get(node.meta.get(ORIGIN, ""))) in made}
        self.form = form
        ways = {node: _way(form, node) for node in self.layers}
        self.order = ordered(tuple(form.graph.nodes), {node: way.others for node, way in ways.items()})
        self.ways = {node: self._reachable(way) for node, way in ways.items()}
        for way in self.ways.values():
            self.dense.keep(self._twin(way.landing))

    def _reachable(self, way: _Way) -> _Way:
        """The way up to the first addition whose other side is only known later."""
        rank = {n: i for i, n in enumerate(self.order)}
        late = next((i for i, (_, part) in enumerate(way.parts)
                     if isinstance(part, fx.Node) and rank[part] > rank[way.layer]), len(way.parts))
        return _Way(way.layer, way.parts[:late])

    def _twin(self, node: fx.Node) -> fx.Node:
        return self.original[node.meta[ORIGIN]]

    def refit(self, node: fx.Node) -> Refit | None:
        """Solve for the weights of one layer. None where there is nothing to solve."""
        layer, way = self.layers[node], self.ways[node]
        twin = self._twin(way.landing)
        targets = self.dense.reach(twin)
        weight, bias = (_tensor(self.form, argument(node, i, name)) for i, name in ((1, "weight"), (2, "bias")))
        found = None
        if weight is not None and weight.is_floating_point() and 0 < weight[0].numel() <= WIDEST:
            moments, usable = self._moments(layer, way, targets, weight, bias is not None or way.norm is not None)
            found = _solve(layer.weight, way.norm, weight, bias, moments, usable, self.ridge)
        self.dense.drop(twin)
        return found

    def _moments(self, layer: Contraction, way: _Way, targets: list[Tensor], weight: Tensor,
                 centred: bool) -> tuple[Moments, Tensor]:
        """Rows of what the layer reads and of what it should give, and which outputs norms leave to be seen."""
        usable = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        for _, part in way.parts:
            if isinstance(part, _Norm):
                usable &= part.scale.abs() > FLAT * part.scale.abs().max()
        moments, twin = Moments(centred), self._twin(way.landing)
        inputs: list[Tensor] = self.pruned[way.layer.args[0]]  # type: ignore[index]
        rows = -(-max(self.rows, ROWS_PER_INPUT * weight[0].numel()) // len(inputs))
        for batch, (x, target) in enumerate(zip(inputs, targets, strict=True)):
            wanted = remaining(self.groups.labels, twin, target, self.keep)
            shape = tuple(wanted.shape)
            at = layer.positions(shape, rows, self.generator)
            aim = layer.outputs(wanted, at).double()
            for _, part in reversed(way.parts):
                if isinstance(part, _Norm):
                    aim = (aim - part.shift) / torch.where(usable, part.scale, 1)
                else:
                    aim = aim - layer.outputs(self.pruned[part][batch].expand(shape), at)
            read = layer.inputs(x, shape, at, tuple(weight.shape[2:]))
            moments.add(read, aim.to(read.dtype).unflatten(1, (layer.groups, -1)))
        return moments, usable


def _solve(name: str, norm: _Norm | None, weight: Tensor, bias: Tensor | None, moments: Moments, usable: Tensor,
           ridge: float) -> Refit:
    """min_W E |W x + b - t|^2 + ridge mean(var x) |W - W0|^2, in closed form; written into the layer's tensors."""
    old = weight.detach().double().reshape(len(moments.inputs), -1, weight[0].numel()).transpose(1, 2)
    spread, cross, power = moments.inputs, moments.cross, moments.power
    eye = torch.eye(spread.shape[-1], dtype=torch.float64, device=spread.device)
    lift = ridge * spread.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None]
    new = torch.linalg.solve(spread + lift * eye, cross + lift * old)
    new = torch.where(usable.view(len(new), 1, -1), new, old)
    mean_x, mean_t = moments.means
    flat = new.transpose(1, 2).reshape(weight.shape)
    drawn = (mean_x[:, None] @ new)[:, 0].flatten()                 # what the new weights give on average
    shift = torch.where(usable, mean_t.flatten() - drawn, 0)

    def error(w: Tensor) -> float:
        left = (w * (spread @ w)).sum(1) - 2 * (w * cross).sum(1) + power
        return float(left.flatten()[usable].clamp(min=0).sum() / power.flatten()[usable].sum().clamp(min=1e-30))
    before, after = error(old), error(new)
    if not after < before:                                          # nothing gained: rounding, or nothing was lost
        return Refit(name, before, before)
    weight.copy_(flat)
    if bias is not None:
        bias.copy_(torch.where(usable, shift, bias.double()))
    elif norm is not None:
        norm.mean.sub_(shift)
    return Refit(name, before, after)


def _way(form: fx.GraphModule, layer: fx.Node) -> _Way:
    """Follow a layer's output through batch norms and additions, as long as nothing else reads it."""
    parts: list[tuple[fx.Node, _Norm | fx.Node]] = []
    node = layer
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in ADD and not user.kwargs and len(user.args) == 2:
            sides = [arg for arg in user.args if arg is not node]
            if len(sides) != 1 or not isinstance(sides[0], fx.Node):
                break
            parts.append((user, sides[0]))
        elif user.op == "call_module" and (norm := _norm(form, user, node)) is not None:
            parts.append((user, norm))
        elif user.target not in PASSED or user.args[0] is not node:
            break
        node = user
    return _Way(layer, tuple(parts))


def _norm(form: fx.GraphModule, node: fx.Node, read: fx.Node) -> _Norm | None:
    module = form.get_submodule(str(node.target))
    if not isinstance(module, FunctionalBatchNorm) or node.args[0] is not read:
        return None
    states = [arg if isinstance(arg, fx.Node) else None for arg in node.args[1:5]]
    weight, bias, mean, var = (_tensor(form, arg) for arg in states)
    if mean is None or var is None:
        return None
    return _Norm(weight, bias, mean, var, module.eps, all(arg is None or len(arg.users) == 1 for arg in states))


def _tensor(form: fx.GraphModule, arg: Any) -> Tensor | None:
    """The tensor that a get_attr node stands for."""
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return None
    path, _, name = str(arg.target).rpartition(".")
    found = getattr(form.get_submodule(path), name)
    return found if isinstance(found, Tensor) else None
