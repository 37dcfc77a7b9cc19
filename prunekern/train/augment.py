"""Random crops and flips of a batch of images in memory, drawn from a given generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekern.errors import InputError

Augmentation = Callable[[Any, torch.Generator], Any]
"""A batch's input and a CPU generator to draw from -> the input to train on."""


@dataclass(frozen=True)
class Augment:
    """`crop`: every image is shifted by up to that many pixels each way, zeros (the mean colour of normalised images)
    coming in; `flip`: each is mirrored left to right with probability 1/2. Images `[N, C, H, W]`.

    Source: the usual recipe for CIFAR (Lee et al. 2015; He et al. 2016). Raises `InputError` for other inputs.
    """

    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int) or self.crop < 0:
            raise InputError(f"augment: crop={self.crop!r} must be a number of pixels from 0.")

    def __call__(self, images: Any, generator: torch.Generator) -> Any:
        if not isinstance(images, Tensor) or images.dim() != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"augment: crop and flip need images [N, C, H, W], the batch is {found}; pass a function "
                             "of (input, generator) instead.")
        if self.crop:
            images = _shifted(images, self.crop, generator)
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)
        return images


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own (dy, dx), both from -most to most."""
    count, _, height, width = images.shape
    offsets = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator).to(images.device)
    padded = F.pad(images, (most, most, most, most))
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


def as_augmentation(asked: Any) -> Augmentation | None:
    """None, an `Augment`, a mapping of its fields, or any function of (input, generator). Raises `InputError`."""
    if isinstance(asked, Mapping):
        known = [field.name for field in fields(Augment)]
        wrong = sorted(asked.keys() - set(known))
        if wrong:
            raise InputError(f"augment={{{wrong[0]!r}: ...}} is unknown; known: {', '.join(known)}.")
        return Augment(**asked)
    if asked is not None and not callable(asked):
        raise InputError(f"augment is a {type(asked).__name__}; pass {{'crop': 4, 'flip': True}}, or a function of "
                         "(input, generator).")
    found: Augmentation | None = asked
    return found


def described(augmentation: Augmentation | None) -> Any:
    """What a checkpoint's settings say of it."""
    if isinstance(augmentation, Augment):
        return asdict(augmentation)
    return None if augmentation is None else getattr(augmentation, "__qualname__", type(augmentation).__name__)
