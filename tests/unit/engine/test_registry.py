"""Modules and settings that no method can divide are refused when the engine is made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine, NeuronConfig
from resist_lightning.methods.auxnet.config import StageConfig
from tests.helpers.nets import small_preact


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (torch.optim.LBFGS, Config(), "LBFGS"),
        (torch.optim.Adafactor, Config(momentum="travel"), "Adafactor"),
        (lambda p: torch.optim.SGD(p, 0.1), Config(min_blocks=9), "min_blocks=9"),
    ],
)
def test_what_cannot_work_is_refused_when_the_engine_is_made(make, config, message):
    model = small_preact()
    with pytest.raises(ValueError, match=message):
        Engine(model, [make(model.parameters())], config)


@pytest.mark.parametrize(
    "config",
    [Config(min_blocks=0), Config(blocks=[]), NeuronConfig(), StageConfig()],
    ids=lambda config: type(config).__name__,
)
def test_a_lazy_module_is_refused_by_name_until_it_has_its_shapes(config):
    model = small_preact()
    model.head = nn.LazyLinear(4)
    model.extra = nn.LazyBatchNorm1d()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    names = r"^head\.weight, head\.bias, extra\.weight, extra\.bias, extra\.running_mean and 1 more"
    named = names + r": no shape yet\..* Call the module once"
    with pytest.raises(ValueError, match=named):
        Engine(model, [optimizer], config)

    model.extra = nn.Identity()
    with torch.no_grad():
        model(torch.zeros(2, 3, 8, 8))
    if isinstance(config, Config):
        Engine(model, [torch.optim.SGD(model.parameters(), 0.1)], config).start()
