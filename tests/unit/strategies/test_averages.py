"""Averaging callbacks follow the module to its device; trainings with them are in ``tests/integration``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from resist_lightning.strategies.averages import Averages
from resist_lightning.strategies.patches import Patches

GPU = torch.device("meta")  # in the place of one


def follow(callback: EMAWeightAveraging) -> AveragedModel:
    """The average of a module that Lightning copied on the CPU, and that the strategy has moved to its device."""
    module = nn.Linear(2, 3)
    average = callback._average_model = AveragedModel(module)
    module.to(GPU)
    layout = SimpleNamespace(partial=True, companion=None)
    engine: Any = SimpleNamespace(
        module=module, layout=layout, sync=SimpleNamespace(exchange=SimpleNamespace(device=GPU))
    )
    trainer: Any = SimpleNamespace(callbacks=[callback])
    patches = Patches()
    Averages(trainer, lambda: engine, patches).follow(engine)
    patches.remove()
    assert layout.companion is not None
    return average


def test_the_average_moves_to_the_modules_device() -> None:
    average = follow(EMAWeightAveraging())
    assert {tensor.device.type for tensor in average.state_dict().values()} == {GPU.type}


def test_an_average_that_the_user_keeps_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"EMAWeightAveraging\(device=...\) keeps the average apart.*leave it out"):
        follow(EMAWeightAveraging(device="cpu"))
