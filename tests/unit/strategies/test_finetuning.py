from __future__ import annotations

import pytest
import torch
from torch import nn

from resist_lightning.strategies.finetuning import ModuleModes, not_in_optimizer


def test_what_was_switched_since_the_beginning_is_switched_in_another_module() -> None:
    first, second = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    modes, resumed = ModuleModes(), ModuleModes()
    modes.begin(first)
    assert modes.changes() == {}
    first[0].weight.requires_grad = False
    first[1].eval()
    changes = modes.changes()
    assert changes == {"0.weight.requires_grad": False, "1.training": False}

    resumed.begin(second)
    resumed.apply({**changes, "gone.training": False})

    assert not second[0].weight.requires_grad
    assert not second[1].training
    assert second[0].bias.requires_grad
    assert second.training


def test_a_validation_is_no_change() -> None:
    module, modes = nn.Linear(2, 2), ModuleModes()
    modes.begin(module)
    with modes.apart():
        module.eval()
        assert modes.changes() == {}


def test_parameters_are_told_apart_by_identity() -> None:
    absent = [nn.Parameter(torch.empty(2, device="meta")) for _ in range(2)]
    optimizer = torch.optim.SGD([absent[0]], 1.0)
    with pytest.warns(UserWarning, match="1 of the 2 parameters"):
        new = not_in_optimizer(optimizer, iter(absent))
    assert len(new) == 1
    assert new[0] is absent[1]
