"""Modules and settings that no method can divide are refused when the engine is made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine, NeuronConfig, PartialModelError
from resist_lightning.methods.auxnet.config import StageConfig
from tests.helpers.nets import small_preact
from tests.helpers.threads import ThreadCollective, run_threads
from tests.helpers.training import Run, start_engine


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


def begin_again(collective: ThreadCollective) -> str:
    engine, optimizer = start_engine(collective, Run(Config(local_steps=3, min_blocks=1), steps=0))
    engine.abandon()
    with pytest.raises(PartialModelError) as refused:
        Engine(engine.module, [optimizer], engine.config, collective=collective)
    return str(refused.value)


def test_a_module_that_an_error_has_left_incomplete_is_refused_by_name():
    """The next engine made new values for worker 0's absent blocks, and on the others ended with a TypeError."""
    for message in run_threads(begin_again, 2)[0]:
        assert message.startswith("section3.")
        assert "has no value, so no training can begin with this module: the training ended with an error" in message
