"""The common part of all simulators: workers with the user's own optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resist_lightning import Config, NeuronConfig, NeuronSimulator, Simulator
from resist_lightning.methods.simulation import mean_state
from tests.helpers.training import assert_equal_states

RATE = 0.01  # learning rate of the bias, once it trains


def simulate(kind: str, *, added: bool) -> dict[str, Any]:
    """Simulate three rounds; from the second one on the first bias trains, too, in its own parameter group."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))

    def make_optimizer(module: Any) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [module[0].weight, *module[2].parameters()]}]
        if not added:
            groups.append({"params": [module[0].bias], "lr": 0.0})
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    simulator: Any
    if kind == "neurons":
        simulator = NeuronSimulator(network, make_optimizer, NeuronConfig(local_steps=4), 2)
    else:
        simulator = Simulator(network, make_optimizer, Config(blocks=[], local_steps=4), 2)
    for step in range(12):
        for worker in simulator.workers:
            (optimizer,) = worker.optimizers
            if step == 4 and added:
                optimizer.add_param_group({"params": [worker.module[0].bias], "lr": RATE})
            if step == 4 and not added:
                optimizer.param_groups[1]["lr"] = RATE
            optimizer.zero_grad()
            worker.module(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
        simulator.after_step()
    state: dict[str, Any] = simulator.full_model().state_dict()
    return state


@pytest.mark.parametrize("kind", ["neurons", "all shared"])
def test_a_parameter_group_may_be_added_in_the_training(kind: str) -> None:
    assert_equal_states(simulate(kind, added=True), simulate(kind, added=False), exactly=True)


def test_of_state_without_a_mean_the_maximum_is_taken_as_workers_do() -> None:
    assert mean_state([torch.tensor([True, False]), torch.tensor([False, False])]).tolist() == [True, False]
    assert mean_state([torch.tensor([1.0]), torch.tensor([2.0])]).tolist() == [1.5]
