"""Networks to be cut into stages, with a forward that the test writes, and the error of those that cannot be cut."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.network.chain import Chain, find_chain
from tests.helpers.nets import MlpBlock


def in_turn(net: Blocks, x: Tensor) -> Tensor:
    """Stem, blocks a to c, head."""
    return net.head(net.c(net.b(net.a(net.stem(x)))))


class Blocks(nn.Module):
    """A stem (3 to 6), three residual blocks a, b, c, a head (6 to 4), and a forward that the test writes."""

    def __init__(self, forward: Callable[[Blocks, Tensor], object] = in_turn, **more: object) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 4)
        self.a, self.b, self.c = MlpBlock(), MlpBlock(), MlpBlock()
        self.position = nn.Parameter(torch.ones(6))
        self.register_buffer("mean", torch.full((3,), 0.5))
        self.computes = forward
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> object:
        return self.computes(self, x)


def refusal(module: nn.Module, network: str | None = None) -> str:
    """The error message for a network that cannot be cut."""
    with pytest.raises(StageSelectionError) as raised:
        find_chain(module, network)
    return str(raised.value)


def bounds(chain: Chain, cuts: set[int]) -> list[tuple[int, int]]:
    """For each stage its first unit, and the one after its last."""
    ends = [0, *sorted(cuts), len(chain.units)]
    return list(pairwise(ends))
