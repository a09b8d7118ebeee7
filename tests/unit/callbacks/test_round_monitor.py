"""RoundMonitor's arguments; its reports are tested by ``tests/integration/test_round_monitor.py``."""

from __future__ import annotations

import pytest
from torch import nn

from resist_lightning import Config, NeuronConfig
from resist_lightning.callbacks import RoundMonitor
from resist_lightning.callbacks.round_monitor import _slowest
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.partition import draw_neurons
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.models import preact_resnet


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
