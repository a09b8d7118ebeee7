"""A network with a forward that the test writes, and the error where all of its neurons should be dealt out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.ist.network.discovery import find_neurons


class Net(nn.Module):
    """Linear layers a (4 to 6), b (6 to 6), c (6 to 2), a conv, and a forward that the test writes."""

    def __init__(self, forward: Callable[[Net, Tensor], object], **more: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.conv = nn.Conv2d(3, 6, 3)
        self.scale = nn.Parameter(torch.ones(6))
        self.computes = forward
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> object:
        return self.computes(self, x)


def refusal(module, choice="*"):
    with pytest.raises(LayerSelectionError) as raised:
        find_neurons(module, choice)
    return str(raised.value)
