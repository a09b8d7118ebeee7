"""The twin of an optimizer, which takes trial steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resist_lightning.state.optimizer_twin import Trial
from resist_lightning.state.unmade import without_memory


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta in the place of a GPU
def test_parameters_without_memory_are_tried_on_the_workers_device(device):
    """Where the optimizer will count its steps: ``fused`` and ``capturable`` ones count on the GPU."""
    with without_memory():
        net = nn.Linear(2, 3)
    trial = Trial(torch.optim.AdamW(net.parameters()), torch.device(device), 1.0, 0.0)
    trial.set_gradients()
    assert {parameter.device.type for parameter in trial._parameters} == {device}
    assert {parameter.grad.device.type for parameter in trial._parameters} == {device}
