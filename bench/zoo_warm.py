"""Imported once before the processes of the zoo branch off: what a first export and a first search load is then there,
as it is in a program that prunes its second network, and no network's time holds it."""

from __future__ import annotations

import torch
from torch import nn

from prunekern import prune

torch.set_num_threads(1)
_NETWORK = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
                         nn.Linear(128, 4)).eval()
prune(_NETWORK, torch.randn(2, 3, 8, 8))
