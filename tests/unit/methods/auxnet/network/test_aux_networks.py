"""The default auxiliary network."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.methods.auxnet.network.aux_networks import convolutions


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 32])
@pytest.mark.parametrize("smaller", [1, 2])
def test_the_default_auxiliary_network_trains_on_one_sample(size: int, smaller: int) -> None:
    network = convolutions((3, size, size), (4, smaller, smaller), width=2).train()

    network(torch.randn(1, 3, size, size)).sum().backward()

    assert all(parameter.grad is not None for parameter in network.parameters())
