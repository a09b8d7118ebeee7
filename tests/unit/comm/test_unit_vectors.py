"""Spectral norm: the mean of unit vectors is made one again, in the sync, in observations, and in the simulator."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from resist_lightning import Config, Engine, Simulator
from resist_lightning.comm.unit_vectors import unit_vectors
from tests.helpers.ist import ONE_AT_A_TIME
from tests.helpers.nets import mlp
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state

STEPS = 5


class OldBlock(nn.Module):
    normalised = staticmethod(spectral_norm)

    def __init__(self, width=6):
        super().__init__()
        self.inside = self.normalised(nn.Linear(width, width))

    def forward(self, x):
        return x + torch.sin(self.inside(x))


class NewBlock(OldBlock):
    normalised = staticmethod(parametrizations.spectral_norm)


def make(block):
    with ONE_AT_A_TIME:  # threads share the generator
        torch.manual_seed(3)
        net = mlp(block, blocks=3)
        net.head = block.normalised(net.head)
    return net


def step(net, optimizer, worker, number):
    generator = torch.Generator().manual_seed(100 * worker + number)
    optimizer.zero_grad()
    net(torch.randn(8, 3, generator=generator)).square().mean().backward()
    optimizer.step()


def lengths(net):
    return [float(vector.norm()) for vector in unit_vectors(net).values() if not vector.is_meta]


def trained(collective, block, config):
    net = make(block)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    engine = Engine(net, [optimizer], config, collective=collective)
    engine.start()
    found = []
    for number in range(STEPS):
        step(net, optimizer, collective.worker, number)
        engine.after_step()
        found += lengths(net)
        with engine.full_model():
            found += lengths(net)
    engine.finish()
    return clone_state(net), found, len(unit_vectors(net))


@pytest.mark.parametrize("block", [OldBlock, NewBlock])
@pytest.mark.parametrize(("workers", "overlap"), [(1, 0), (2, 0), (3, 0), (3, 1)])
def test_they_have_unit_length_at_all_times_as_in_the_simulator(block, workers, overlap):
    config = Config(local_steps=2, overlap=overlap, blocks="body.*", min_blocks=2, test_scale=1.0)
    simulator = Simulator(make(block), lambda net: torch.optim.SGD(net.parameters(), 0.5), config, workers)
    for number in range(STEPS):
        for index, worker in enumerate(simulator.workers):
            step(worker.module, worker.optimizers[0], index, number)
        simulator.after_step()
    expected = simulator.full_model().state_dict()
    for state, found, vectors in run_threads(trained, workers, block, config)[0]:
        assert vectors == 8
        assert found == pytest.approx([1.0] * len(found), abs=1e-6)
        assert_equal_states(state, expected)
