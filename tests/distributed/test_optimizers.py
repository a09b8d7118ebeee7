"""Optimizer state in real processes: several optimizers, several groups, each policy; against the simulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning import Config, Engine, Simulator
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.schedule.transfers import plan_sync
from tests.helpers.nets import Normed
from tests.helpers.processes import run_workers
from tests.helpers.training import Run, assert_equal_states, batch_of, clone_state, make_model

STEPS = 7


def two_optimizers(model: nn.Module) -> list[Optimizer]:
    """AdamW on weights of two dimensions, SGD on the rest; so every block has parameters of both."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return [torch.optim.AdamW(matrices, lr=1e-2), torch.optim.SGD(others, lr=0.05, momentum=0.9)]


def two_groups(model: nn.Module) -> list[Optimizer]:
    """An optimizer with two groups, one without momentum, one with."""
    weights = [p for name, p in model.named_parameters() if name.endswith("out.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("out.weight")]
    groups = [{"params": weights, "momentum": 0.0}, {"params": others, "momentum": 0.9}]
    return [torch.optim.SGD(groups, lr=0.05)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


class ScheduleFree(Optimizer):
    """Averages its own steps by a counter in its groups; has a count, a copy and wider state of each parameter."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(count=0, z=p.detach().clone(), mean=torch.zeros_like(p, dtype=torch.float32))
                state["count"] += 1
                state["z"].sub_(p.grad, alpha=group["lr"])
                state["mean"].lerp_(p.grad.float(), 1 / state["count"])
                p.lerp_(state["z"], 1 / group["k"]).sub_(state["mean"], alpha=0.01 / state["count"])


def schedule_free(model: nn.Module) -> list[Optimizer]:
    return [ScheduleFree(model.parameters(), lr=0.05)]


CASES = {
    f"{make.__name__}, {momentum}": (make, Config(local_steps=2, min_blocks=2, momentum=momentum, batch_norm="running"))
    for make in (two_optimizers, two_groups, adamw, schedule_free)
    for momentum in ("reset", "keep", "travel")
}


def double_model() -> nn.Module:
    """A model in double precision: after a restart Adam steps by a gradient's sign, which rounding may flip."""
    return make_model(Run(Config(), STEPS, net=Normed)).double()


def step_all(model: nn.Module, optimizers: list[Optimizer], batch: tuple[Tensor, Tensor]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    nn.functional.cross_entropy(model.train()(batch[0].double()), batch[1]).backward()
    for optimizer in optimizers:
        optimizer.step()


def train_all(worker: int) -> dict[str, tuple[dict[str, Tensor], list[tuple[int, int]]]]:
    return {name: train(worker, *case) for name, case in CASES.items()}


def train(worker: int, make, config: Config) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """The full model at the end; and for each sync the bytes of state that were sent, and the closed form."""
    model = double_model()
    optimizers = make(model)
    engine = Engine(model, optimizers, config)
    engine.start()
    sent = []
    for step in range(STEPS):
        step_all(model, optimizers, batch_of(worker, step))
        before, counted = engine.partition, engine.collective.sent_bytes["state"]
        engine.after_step()
        if engine.partition != before:
            expected = sync_bytes(
                plan_sync(before, engine.partition), engine.layout.sizes(engine.states), engine.collective.workers
            )
            sent.append((engine.collective.sent_bytes["state"] - counted, expected[worker]["state"]))
    engine.finish()
    return clone_state(model), sent


@pytest.fixture(scope="module")
def trained() -> list[dict[str, tuple[dict[str, Tensor], list[tuple[int, int]]]]]:
    return run_workers(train_all, 3)


@pytest.mark.parametrize("name", CASES)
def test_processes_train_what_the_simulator_trains(trained, name):
    make, config = CASES[name]
    simulator = Simulator(double_model(), make, config, 3)
    for step in range(STEPS):
        for number, worker in enumerate(simulator.workers):
            step_all(worker.module, worker.optimizers, batch_of(number, step))
        simulator.after_step()
    expected = simulator.full_model().state_dict()
    for worker in trained:
        assert_equal_states(worker[name][0], expected)


@pytest.mark.parametrize("name", CASES)
def test_state_is_sent_only_where_it_travels_and_then_all_of_it(trained, name):
    for worker in trained:
        assert len(worker[name][1]) == 3
        assert all(sent == expected for sent, expected in worker[name][1])
    total = sum(sent for worker in trained for sent, _ in worker[name][1])
    assert (total > 0) == name.endswith("travel")


@pytest.mark.parametrize("make", ["two_optimizers", "two_groups", "adamw", "schedule_free"])
def test_the_three_policies_train_three_different_models(trained, make):
    stems = [trained[0][f"{make}, {momentum}"][0]["stem.weight"] for momentum in ("reset", "keep", "travel")]
    assert not torch.allclose(stems[0], stems[1])
    assert not torch.allclose(stems[1], stems[2])
