"""Auxiliary networks made from the settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resist_lightning import StageConfig
from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.network.aux_defaults import NetworkInput
from resist_lightning.methods.auxnet.network.aux_networks import make_aux_network

IDS = NetworkInput((5,), torch.int64, None)


def test_a_users_network_is_tried_with_ids_where_the_network_is_given_ids() -> None:
    def embedded(given: tuple[int, ...], boundary: tuple[int, ...]) -> nn.Module:
        return nn.Embedding(3, boundary[-1])

    made = make_aux_network(
        StageConfig(method="penalty", aux_network=embedded), IDS, (5, 4), nonnegative=False, boundary=1
    )

    assert made(torch.zeros(2, 5, dtype=torch.int64))[0].shape == (2, 5, 4)


def test_a_users_network_of_another_shape_is_refused_with_both_shapes() -> None:
    config = StageConfig(method="al-net", aux_network=lambda *shapes: nn.Embedding(3, 4))
    with pytest.raises(StageSelectionError, match=r"makes \(5, 4\) of \(5,\), but the boundary needs \(10, 4\)"):
        make_aux_network(config, IDS, (5, 4), nonnegative=False, boundary=1)
