"""Unstructured and N:M pruning: single weights set to zero, by magnitude, with masks that say which.

Unlike channels, single weights leave nothing smaller behind: a network with 90 % zeros does the same multiplications in
the same time, unless hardware skips them (``prune/semi_structured.py``). What shrinks is the file
(``prune/sparse_file.py``). Sources: Han et al., Learning both Weights and Connections for Efficient Neural Networks
(NeurIPS 2015), for magnitudes per layer; Mishra et al., Accelerating Sparse Deep Neural Networks (2021), for N:M.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekern.errors import InputError, ModelError, TargetError
from prunekern.graph.parts import Parts, copied

Scope = Literal["layer", "global"]
SCOPES = ("layer", "global")
COMPUTED = {"_orig": "torch.nn.utils.prune.remove", "_v": "torch.nn.utils.remove_weight_norm",
            "_g": "torch.nn.utils.remove_weight_norm"}


@dataclass(frozen=True, eq=False)
class Masks:
    """Which weights stay. kept: parameter name -> boolean tensor of its shape on the CPU, True where it stays."""

    kept: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Weights under a mask; biases and other parameters have none."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def zeros(self) -> int:
        """Weights that are gone."""
        return sum(self.removed().values())

    @property
    def sparsity(self) -> float:
        """The share of the masked layers' weights that is gone, 0..1."""
        return self.zeros / max(self.weights, 1)

    def removed(self) -> dict[str, int]:
        """Parameter name -> how many of its weights are gone."""
        return {name: mask.numel() - int(mask.sum()) for name, mask in self.kept.items()}

    def impose(self, model: nn.Module) -> None:
        """Set what is gone to zero, **in place**. Raises ModelError where the masks belong to another model."""
        for parameter, gone in self.pairs(model):
            with torch.no_grad():
                parameter.masked_fill_(gone, 0)

    def pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, True where its weights are gone), on the parameter's device. Raises ModelError."""
        parameters = dict(model.named_parameters())
        for name, mask in self.kept.items():
            found = parameters.get(name)
            if found is None or found.shape != mask.shape:
                was = "no such parameter" if found is None else f"its shape is {tuple(found.shape)}"
                raise ModelError(f"masks: {name} {tuple(mask.shape)}: {was} in this {type(model).__name__}. Masks fit "
                                 "the model they were made for; make them again after slicing or renaming.")
        return [(parameters[name], ~mask.to(parameters[name].device)) for name, mask in self.kept.items()]

    def __str__(self) -> str:
        width = max([5, *map(len, self.kept)])
        rows = [f"{name:<{width}} {mask.numel():>12,} {mask.numel() - int(mask.sum()):>12,} "
                f"{1 - float(mask.double().mean()):>8.2%}" for name, mask in self.kept.items()]
        total = f"{'total':<{width}} {self.weights:>12,} {self.zeros:>12,} {self.sparsity:>8.2%}"
        return "\n".join([f"{'layer':<{width}} {'weights':>12} {'gone':>12} {'sparsity':>8}", *rows, total,
                          *(f"note: {note}" for note in self.notes)])


def prunable(model: nn.Module, layers: Sequence[str] | str = ("*",), ignore: Sequence[str] | str = (), *,
             finite: bool = True) -> dict[str, nn.Parameter]:
    """The weights that masks are for: floating-point parameters of two axes or more, a tied one once.

    layers, ignore: globs of parameters ('conv1.weight') or of what owns them ('conv1', 'layer3.*').
    Raises ModelError (no model, no such weights, weights that are computed in the forward, not finite ones where
    ``finite``), TargetError for a glob that matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is not a torch.nn.Module; pass the model itself.")
    found = {name: p for name, p in model.named_parameters() if p.dim() >= 2 and p.is_floating_point() and p.numel()}
    for globs, what in ((layers, "layers"), (ignore, "ignore")) if found else ():
        for glob in (globs,) if isinstance(globs, str) else globs:
            if not any(matches(name, glob) for name in found):
                raise TargetError(f"{what}={glob!r} matches no weight; there are: {_some(found)}.")
    chosen = {name: p for name, p in found.items() if _any(name, layers) and not _any(name, ignore)}
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no weights to prune (floating-point parameters of two axes or "
                         f"more{', outside of ignore=' if found else ''}).")
    for name, parameter in chosen.items():
        _check(model, name, parameter, finite)
    return chosen


def _any(name: str, globs: Sequence[str] | str) -> bool:
    return any(matches(name, glob) for glob in ((globs,) if isinstance(globs, str) else globs))


def matches(name: str, glob: str) -> bool:
    """Whether a glob means this parameter: its name, or its owner's."""
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def _some(names: Mapping[str, object]) -> str:
    shown = list(names)[:12]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _check(model: nn.Module, name: str, parameter: nn.Parameter, finite: bool) -> None:
    path, _, leaf = name.rpartition(".")
    remedy = "torch.nn.utils.parametrize.remove_parametrizations" if ".parametrizations." in f".{name}" else ""
    for ending, remover in COMPUTED.items():
        # The forward computes `weight` from these and leaves it on the module under the name without the ending.
        if leaf.endswith(ending) and hasattr(model.get_submodule(path), leaf.removesuffix(ending)):
            remedy = remover if not hasattr(model.get_submodule(path), leaf.removesuffix(ending) + "_u") \
                else "torch.nn.utils.remove_spectral_norm"
    if remedy:
        raise ModelError(f"{name} is not the weight that the forward multiplies with, which is computed from it; a "
                         f"zero here is none there. Make it plain first ({remedy}), or pass ignore=[{path!r}].")
    if parameter.is_meta:
        raise ModelError(f"{name} is on the meta device and has no values; load the weights first.")
    if finite and not bool(torch.isfinite(parameter).all()):
        raise ModelError(f"{name} holds values that are not finite, whose magnitudes say nothing; load sound weights, "
                         f"or pass ignore=[{path!r}].")


def magnitude(model: nn.Module, sparsity: float | Mapping[str, float], *, scope: Scope = "layer",
              layers: Sequence[str] | str = ("*",), ignore: Sequence[str] | str = ()) -> Masks:
    """Masks that take away the weights of least magnitude. The model is not modified: see ``masked``.

    sparsity: the share that goes, in [0, 1); or globs of layers -> shares, of which the first that matches counts and
    layers without one stay whole. Of n weights exactly the whole number nearest to sparsity·n goes (halves go up);
    among equal magnitudes those that come first.
    scope: 'layer', the share of every layer; or 'global', of all together, the smallest anywhere first.
    layers, ignore: see ``prunable``. Raises ModelError, TargetError.
    """
    if scope not in SCOPES:
        raise TargetError(f"scope={scope!r} is none of {', '.join(map(repr, SCOPES))}.")
    if isinstance(sparsity, Mapping) and scope == "global":
        raise TargetError("sparsity= per layer and scope='global' contradict each other; drop one.")
    found = prunable(model, layers, ignore)
    shares = _shares(found, sparsity)
    sizes = {name: _magnitudes(parameter) for name, parameter in found.items()}
    if scope == "global":
        gone = least(np.concatenate(list(sizes.values())), shares[next(iter(shares))])
        ends = np.cumsum([size.size for size in sizes.values()])[:-1]
        parts = dict(zip(sizes, np.split(gone, ends), strict=True))
    else:
        parts = {name: least(sizes[name], share) for name, share in shares.items()}
    return _made({name: torch.from_numpy(~part).reshape(found[name].shape) for name, part in parts.items()})


def _shares(found: Mapping[str, object], sparsity: float | Mapping[str, float]) -> dict[str, float]:
    asked = sparsity if isinstance(sparsity, Mapping) else {"*": sparsity}
    for glob, share in asked.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share < 1:
            raise TargetError(f"sparsity={sparsity!r}: {share!r} is not a share in [0, 1) of the weights; 0.9 takes "
                              "nine of ten away.")
        if not any(matches(name, glob) for name in found):
            raise TargetError(f"sparsity={sparsity!r}: {glob!r} matches no weight; there are: {_some(found)}.")
    first = {name: next((share for glob, share in asked.items() if matches(name, glob)), None) for name in found}
    return {name: float(share) for name, share in first.items() if share is not None}


def _magnitudes(parameter: Tensor) -> np.ndarray:
    flat = parameter.detach().abs().reshape(-1).cpu()
    return flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32).numpy()


def least(values: np.ndarray, share: float) -> np.ndarray:
    """True for the smallest of ``values`` [n]: exactly floor(share·n + 1/2) of them, among equals the first."""
    count = int(share * values.size + 0.5)
    if count == 0:
        return np.zeros(values.size, bool)
    edge = np.partition(values, count - 1)[count - 1]           # linear time, unlike sorting
    gone: np.ndarray = values < edge
    gone[np.flatnonzero(values == edge)[:count - int(gone.sum())]] = True
    return gone


def _made(kept: Mapping[str, Tensor]) -> Masks:
    empty = [name for name, mask in kept.items() if not bool(mask.any())]
    notes = (f"nothing is left of {', '.join(empty)}; give these layers a lower sparsity, or ignore= them",) if empty \
        else ()
    return Masks(dict(kept), notes)


def nm(model: nn.Module, n: int = 2, m: int = 4, *, layers: Sequence[str] | str = ("*",),
       ignore: Sequence[str] | str = ()) -> Masks:
    """Masks that keep the n largest of every m consecutive weights: 2:4 is what NVIDIA's sparse tensor cores skip.

    The m weights lie along the axis that is summed over: a linear layer's inputs, a convolution's input channels at one
    position of the kernel. Where that axis is no multiple of m, its last weights count as a block filled up with
    zeros, so n of them stay at most. Among equal magnitudes those that come first go.
    Raises InputError where 1 <= n < m does not hold, ModelError, TargetError.
    """
    if not 1 <= n < m:
        raise InputError(f"nm: n={n}, m={m}; pass 1 <= n < m, such as n=2, m=4.")
    found = prunable(model, layers, ignore)
    return _made({name: _unfolded(model, name, parameter.detach().abs().cpu(), lambda rows: _keep_nm(rows, n, m))
                  for name, parameter in found.items()})


def _unfolded(model: nn.Module, name: str, weight: Tensor, act: object) -> Tensor:
    """``act`` on [.., inputs] with the summed-over axis last; its result in the weight's own shape."""
    owner = model.get_submodule(name.rpartition(".")[0])
    shape = weight.shape
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):     # [inputs, outputs / groups, ...]
        weight = weight.reshape(owner.groups, -1, *shape[1:])
    kept = act(weight.movedim(1, -1))  # type: ignore[operator]
    return kept.movedim(-1, 1).reshape(shape).contiguous()  # type: ignore[no-any-return]


def _keep_nm(rows: Tensor, n: int, m: int) -> Tensor:
    size = rows.shape[-1]
    blocks = F.pad(rows, (0, -size % m), value=-1.0).reshape(-1, m)     # what fills up goes first
    gone = blocks.sort(dim=1, stable=True).indices[:, : m - n]
    kept = torch.ones_like(blocks, dtype=torch.bool).scatter_(1, gone, False)
    return kept.reshape(*rows.shape[:-1], -1)[..., :size]


def zeros_of(model: nn.Module, *, layers: Sequence[str] | str = ("*",), ignore: Sequence[str] | str = ()) -> Masks:
    """The masks that a network with zeros in it has: to train on with what ``prune/sparse_file.py`` loaded."""
    return Masks({name: (p.detach() != 0).cpu() for name, p in prunable(model, layers, ignore, finite=False).items()})


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of the model with what the masks take away set to zero. Raises ModelError."""
    made = copied(model, {})
    if isinstance(made, Parts):
        raise ModelError(f"{made.why}; use imposed(model, masks), which takes the weights away for a while, or "
                         "Masks.impose, which does so for good.")
    masks.impose(made)
    return made


@contextmanager
def imposed(model: nn.Module, masks: Masks) -> Iterator[nn.Module]:
    """The model itself with the masks on; afterwards, whatever happens, the very weights it had."""
    pairs = masks.pairs(model)
    before = [parameter.detach()[gone].clone() for parameter, gone in pairs]
    try:
        masks.impose(model)
        yield model
    finally:
        with torch.no_grad():
            for (parameter, gone), values in zip(pairs, before, strict=True):
                parameter[gone] = values
