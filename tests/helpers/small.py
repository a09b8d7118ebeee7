"""A classifier of four small blocks: a training takes half the CPU time of one of the pre-activation network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.plain import CLASSES, Classifier

WIDTH = 8


class SmallBlock(nn.Module):
    """A residual block with batch norm that declares where its branch ends."""

    residual_branch_end = "out"

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.norm(x)))


def small_blocks(seed: int = 7) -> nn.Sequential:
    """A stem, the partitionable blocks ``body.0`` to ``body.3``, and a head; the same in every process."""
    net = nn.Sequential()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.add_module("stem", nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, WIDTH)))
        net.add_module("body", nn.Sequential(*(SmallBlock() for _ in range(4))))
        net.add_module("head", nn.Linear(WIDTH, CLASSES))
    return net


class Small(Classifier):
    """A classifier that the strategy ``face`` can divide: of small blocks, or for IST the "chain"."""

    def __init__(self, face: str = "resist", seed: int = 7, optimizer: str = "sgd") -> None:
        super().__init__("chain", seed, optimizer)
        if face != "ist":
            self.net = small_blocks(seed)
