"""Classifiers of five small blocks: a training takes half the CPU time of one of the pre-activation network.

Like `tests.helpers.plain`, it imports nothing of this package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from tests.helpers.plain import CLASSES, Classifier, Late


def small_kind(face: str) -> str:
    """The network of `make_net` that the strategy ``face`` divides here."""
    return "chain" if face == "ist" else "blocks"


class Small(Classifier):
    """A classifier of a `small_kind`."""

    def __init__(self, face: str = "resist", seed: int = 7, optimizer: str = "sgd") -> None:
        super().__init__(small_kind(face), seed, optimizer)


class LateSmall(Late):
    """The same, whose network is made in ``configure_model``."""

    def __init__(self, face: str = "resist") -> None:
        super().__init__(small_kind(face))


class Bottlenecks(Classifier):
    """A classifier of small blocks of torchvision."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams["seed"])
            self.net = nn.Sequential()
            self.net.add_module("stem", nn.Conv2d(3, 32, 3, stride=2, padding=1))
            self.net.add_module("body", nn.Sequential(*(Bottleneck(32, 8) for _ in range(5))))
            self.net.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)))
