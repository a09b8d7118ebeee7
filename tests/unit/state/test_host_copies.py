"""Copies of inputs: those of GPU tensors lie in host memory, where torch can pin them."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.state.host_copies import can_be_pinned


@pytest.mark.parametrize(
    ("tensor", "can_be"),
    [
        (torch.eye(3), True),
        (torch.zeros(0), True),
        (torch.eye(3).to_sparse(), False),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), False),
    ],
)
def test_only_dense_tensors_are_pinned(tensor: torch.Tensor, can_be: bool) -> None:
    # A network that is given a sparse tensor, such as the edges of a graph, failed in its first step on a GPU.
    assert can_be_pinned(tensor) is can_be
