"""Classifiers of five small blocks: a training takes half the CPU time of one of the pre-activation network.

Like `tests.helpers.plain`, it imports nothing of this package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from tests.helpers.plain import CLASSES, Classifier, make_net

WIDTH = 8


class LinearBlock(nn.Module):
    """A residual block of a batch norm and a linear layer, which declares where its branch ends."""

    residual_branch_end = "out"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.norm(x)))


def small_blocks(seed: int = 7) -> nn.Sequential:
    """A stem, five blocks (``body.1`` to ``body.4`` can be partitioned) and a head, the same in every process."""
    net = nn.Sequential()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.add_module("stem", nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, WIDTH)))
        net.add_module("body", nn.Sequential(*(LinearBlock(WIDTH) for _ in range(5))))
        net.add_module("head", nn.Linear(WIDTH, CLASSES))
    return net


def small_net(face: str, seed: int = 7) -> nn.Module:
    """A network that the strategy ``face`` can divide: small blocks, or for IST the "chain"."""
    return make_net("chain", seed) if face == "ist" else small_blocks(seed)


class Small(Classifier):
    """A classifier with a `small_net`."""

    def __init__(self, face: str = "resist", seed: int = 7, optimizer: str = "sgd") -> None:
        super().__init__("chain", seed, optimizer)
        self.face = face
        self.net = small_net(face, seed)


class LateSmall(Small):
    """The same, whose network is made in ``configure_model``."""

    def __init__(self, face: str = "resist") -> None:
        super().__init__(face)
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = small_net(self.face)


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
