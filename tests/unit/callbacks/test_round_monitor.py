"""RoundMonitor's arguments; its reports are tested by ``tests/integration/test_round_monitor.py``."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine, LocalSGDStrategy, NeuronConfig
from resist_lightning.callbacks import RoundMonitor
from resist_lightning.callbacks.round_monitor import _slowest
from resist_lightning.comm.collective import Collective
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.partition import draw_neurons
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.models import preact_resnet
from tests.helpers.strict_collective import run_strictly


@pytest.mark.parametrize("every_n_rounds", [0, -1])
def test_it_logs_at_least_once_in_a_number_of_rounds(every_n_rounds: int) -> None:
    with pytest.raises(ValueError, match=f"every_n_rounds={every_n_rounds} must be at least 1"):
        RoundMonitor(every_n_rounds)
    RoundMonitor(1)


def test_pictures_are_not_below_none() -> None:
    with pytest.raises(ValueError, match="picture_every_n_rounds=-1 must be at least 0"):
        RoundMonitor(picture_every_n_rounds=-1)


@pytest.mark.parametrize(("width", "step"), [(6, 1), (64, 1), (65, 2), (640, 10), (700, 11)])
def test_of_many_neurons_the_summary_has_some_at_equal_distances(width: int, step: int) -> None:
    net = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, 2))
    found = NeuronLayout(net, NeuronConfig(seed=5, min_share=0), 3).holders_for_summary(80)
    assert found is not None
    assert (found["layer"], found["width"], found["shown"]) == ("0", width, list(range(0, width, step)))
    assert len(found["shown"]) <= 64
    assert len(found["holders"]) == 60
    for number in (0, 59):
        held = draw_neurons((width, 9), 3, 5, number)[0].held
        for neuron, worker in zip(found["shown"], found["holders"][number], strict=True):
            assert neuron in held[worker]


def test_blocks_are_not_neurons() -> None:
    layout = BlockLayout(preact_resnet(14, width_multiplier=1 / 16), Config(min_blocks=0), 2)
    assert layout.holders_for_summary(3) is None


def test_the_slowest_worker_is_compared_with_the_mean() -> None:
    assert _slowest([0.1, 0.3, 0.2]) == {"sync/slowest_worker": 1, "sync/slowest_step": pytest.approx(1.5)}
    assert _slowest([]) == _slowest([0.0, 0.0]) == {}


def test_a_sync_before_a_validation_is_a_part_of_the_time_in_training() -> None:
    """It was not, though its seconds were those of a sync: these could be more than the whole, and compute below 0."""
    engine = Engine(nn.Linear(2, 1), [], Config(local_steps=1, blocks=[]))
    strategy = LocalSGDStrategy(local_steps=1)
    vars(strategy)["session"] = SimpleNamespace(engine=engine)
    trainer: Any = SimpleNamespace(strategy=strategy)
    module: Any = SimpleNamespace(log=lambda *_, **__: None)
    monitor = RoundMonitor()
    engine.start()
    for batch in range(2):
        monitor.on_train_batch_start(trainer, module, None, batch)
        monitor.on_train_batch_end(trainer, module, None, None, batch)
        with engine.seconds.timed("sync"):
            time.sleep(0.05)
    seconds = monitor.summary(strategy, engine)["seconds"]
    assert seconds["training"] > seconds["sync"] > 0.1
    engine.abandon()


def summary_of_local_sgd(collective: Collective) -> dict[str, Any]:
    net = nn.Sequential(nn.Linear(3, 5).bfloat16(), nn.Linear(5, 4).requires_grad_(False), nn.Linear(4, 2))
    engine = Engine(
        net, [torch.optim.SGD(net.parameters(), 0.1)], Config(local_steps=2, blocks=[]), collective=collective
    )
    engine.start()
    for _ in range(4):
        engine.states.optimizers[0].step()
        engine.after_step()
    engine.finish()
    return RoundMonitor().summary(SimpleNamespace(strategy_name="local_sgd"), engine)


def test_the_alternatives_are_counted_in_the_data_types_that_they_send() -> None:
    """Frozen layers counted for local SGD, which does not average them, and those of 16 bits half of what it sends."""
    summary = run_strictly(summary_of_local_sgd, 2)[0][0]
    trained_16, trained_32 = 4 * 5, 5 * 2
    assert summary["local_sgd_bytes"] == summary["sent_bytes"]["shared"][0] == 2 * 4 * (trained_16 + trained_32)
    assert summary["ddp_bytes"] == 4 * (2 * trained_16 + 4 * trained_32)
