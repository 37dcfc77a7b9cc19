"""Groups made visible: families of like groups, what they own, and what may be pruned."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from prunekern.core.graph import Graph, target_name
from prunekern.core.labels import FIXED
from prunekern.graph.labels import Labels


@dataclass(frozen=True)
class Member:
    """One axis of one parameter or buffer that a family runs along. role: 'out', 'in' or 'vector'."""

    name: str
    axis: int
    role: str

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def __str__(self) -> str:
        return f"{self.name}[{self.axis}]"


@dataclass(frozen=True)
class Family:
    """Groups that own the same axes of the same tensors: 'the channels of conv1'.

    groups: their ids [channels]. layers: the modules that issue these channels, first one first.
    """

    name: str
    groups: Tensor
    members: tuple[Member, ...]
    layers: tuple[str, ...]

    @property
    def channels(self) -> int:
        return len(self.groups)

    @property
    def modules(self) -> tuple[str, ...]:
        """The members in short, by module: 'conv1', 'bn1', 'conv2 (in)'."""
        return tuple(dict.fromkeys((m.module or m.name) + (" (in)" if m.role == "in" else "") for m in self.members))

    def matches(self, pattern: str) -> bool:
        """Whether a glob names the family itself or one of the layers that issue its channels."""
        return any(fnmatchcase(name, pattern) for name in (self.name, *self.layers))

    def __str__(self) -> str:
        return f"{self.name}: {self.channels} channels: " + ", ".join(map(str, self.members))


@dataclass(frozen=True)
class Groups:
    """All families of a labelled graph, in the order of the graph. A group is listed once."""

    labels: Labels
    families: tuple[Family, ...]

    @property
    def graph(self) -> Graph:
        return self.labels.graph

    def __iter__(self) -> Iterator[Family]:
        return iter(self.families)

    def __len__(self) -> int:
        return len(self.families)

    def find(self, pattern: str) -> tuple[Family, ...]:
        return tuple(family for family in self.families if family.matches(pattern))

    def everything(self) -> Tensor:
        """The choice that keeps every group: boolean [groups]."""
        return torch.ones(self.labels.groups, dtype=torch.bool)

    def fingerprint(self) -> str:
        """Identifies the graph a plan belongs to: operators, tensor shapes and groups, not the weights."""
        text = hashlib.sha256()
        for node in self.graph.nodes:
            text.update(f"{node.op}:{target_name(node)}:{self.graph.state.get(node.name, '')};".encode())
        for name, tensor in sorted(self.graph.tensors.items()):
            text.update(f"{name}:{tuple(tensor.shape)};".encode())
        for family in self.families:
            text.update(f"{family};".encode())
        if asked := self.labels.policy.to_json():
            text.update(f"{sorted(asked.items())};".encode())
        return text.hexdigest()[:16]

    def __str__(self) -> str:
        lines = (textwrap.fill(str(family), 100, subsequent_indent="    ", break_long_words=False,
                               break_on_hyphens=False) for family in self.families)
        return "\n".join(lines) or "no prunable channels"


def find_groups(labels: Labels) -> Groups:
    """Sort the groups of a graph into families by what they own. Vectorised over channels."""
    signature = _signatures(labels)
    owned = np.zeros(labels.groups, dtype=bool)
    for (name, _), groups in labels.axes.items():
        if isinstance(labels.graph.tensors[name], nn.Parameter):     # a table of constants alone is no channel
            owned[groups.reshape(-1).numpy()] = True
    owned[FIXED] = False
    ids = np.flatnonzero(owned)
    _, first, inverse = np.unique(signature[ids], return_index=True, return_inverse=True)
    by_axis: dict[int, list[tuple[str, int]]] = {}
    for key, groups in labels.axes.items():
        if groups.numel():
            for kind in np.unique(_kinds(groups, owned, ids, inverse)):
                by_axis.setdefault(int(kind), []).append(key)
    rank = _graph_order(labels)
    families = [_family(labels, ids[inverse == kind], by_axis[kind], rank) for kind in range(len(first))]
    families.sort(key=lambda family: _place(labels, family, rank))
    return Groups(labels, _named(families))


def _place(labels: Labels, family: Family, rank: dict[str, int]) -> tuple[int, int]:
    """(first use of what issues the family's channels, the first of these channels): one order, however groups are
    numbered."""
    issuers = [m for m in family.members if m.role != "in" and m.name in rank]
    if not issuers:
        return 1 << 30, int(family.groups.min())
    first = min(issuers, key=lambda member: rank[member.name])
    axis = labels.axes[first.name, first.axis].reshape(-1)
    return rank[first.name], int(torch.isin(axis, family.groups).int().argmax())


def _kinds(groups: Tensor, owned: np.ndarray, ids: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    flat = np.unique(groups.reshape(-1).numpy())
    flat = flat[owned[flat]]
    return np.asarray(inverse[np.searchsorted(ids, flat)])


def _signatures(labels: Labels) -> np.ndarray:
    """A hash per group of the set of axes (of tensors and of activations) that it is part of."""
    random = np.random.default_rng(0)
    signature = np.zeros(labels.groups, dtype=np.uint64)
    vectors = [groups.reshape(-1) for groups in labels.axes.values()]
    for node, live in labels.live.items():
        if node.op != "placeholder":
            for item in live if isinstance(live, list) else [live]:
                vectors += [groups for _, groups in item]
    for vector in vectors:
        signature[np.unique(vector.numpy())] += random.integers(1 << 63, dtype=np.uint64)
    return signature


def _graph_order(labels: Labels) -> dict[str, int]:
    """State name -> position of its first use."""
    order: dict[str, int] = {}
    for position, node in enumerate(labels.graph.nodes):
        for arg in node.all_input_nodes:
            name = labels.graph.fqn(arg)
            if name is not None:
                order.setdefault(name, position)
    return order


def _family(labels: Labels, ids: np.ndarray, keys: list[tuple[str, int]], rank: dict[str, int]) -> Family:
    produced = set(labels.produced)
    members = [Member(name, axis, "out" if (name, axis) in produced else
                      "in" if (name, axis) in labels.consumed else "vector") for name, axis in keys]
    members.sort(key=lambda m: (rank.get(m.name, 1 << 30), m.axis))
    layers = tuple(dict.fromkeys(m.module or m.name for m in members if m.role == "out"))
    name = layers[0] if layers else str(members[0])
    return Family(name, _in_order(labels, torch.from_numpy(ids), members), tuple(members), layers)


def _in_order(labels: Labels, ids: Tensor, members: list[Member]) -> Tensor:
    """Group ids in the order in which the first member lists its channels."""
    listed = labels.axes[members[0].name, members[0].axis].reshape(-1)
    listed = listed[torch.isin(listed, ids)]
    _, inverse = torch.unique(listed, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(listed)).scatter_reduce(
        0, inverse, torch.arange(len(listed)), "amin")
    return listed[first.sort().values]


def _named(families: list[Family]) -> tuple[Family, ...]:
    """Give families that share their first layer different names: 'conv1', 'conv1#2'."""
    seen: dict[str, int] = {}
    named = []
    for family in families:
        seen[family.name] = count = seen.get(family.name, 0) + 1
        named.append(family if count == 1 else
                     Family(f"{family.name}#{count}", family.groups, family.members, family.layers))
    return tuple(named)
