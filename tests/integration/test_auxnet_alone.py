"""One worker with ``AuxNetStrategy`` or ``StageConfig`` is plain training, bit for bit (check 1 of section 8)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resist_lightning import AuxNetStrategy, Engine, StageConfig, StageSimulator
from tests.helpers.plain import Classifier, stream
from tests.helpers.trainers import fit, run_trainers
from tests.helpers.training import assert_equal_states, clone_state

STEPS = 7
METHODS = ("delayed", "penalty", "al-net", "penalty-store", "al-store")


def plain() -> dict[str, Tensor]:
    module = Classifier("chain")
    optimizer = module.configure_optimizers()
    for step, batch in enumerate(stream(0, STEPS)):
        optimizer.zero_grad()
        module.training_step(batch, step).backward()
        optimizer.step()
    return clone_state(module)


def by_trainer(worker: int, method: str) -> dict[str, Tensor]:
    module = Classifier("chain")
    strategy = AuxNetStrategy(method=method, warmup_steps=2, check_every_n_steps=3)
    fit(worker, module, STEPS, strategy)
    return clone_state(module)


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_with_one_device_trains_as_without_the_strategy(method: str) -> None:
    (state,) = run_trainers(by_trainer, 1, method)
    assert_equal_states(state, plain(), exactly=True)


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_with_one_worker_is_plain_training(method: str) -> None:
    module = Classifier("chain")
    optimizer = module.configure_optimizers()
    engine = Engine(module, [optimizer], StageConfig(method=method, warmup_steps=2, local_steps=3))
    engine.prepare(next(iter(stream(0, 1)))[0])
    engine.start()
    for step, batch in enumerate(stream(0, STEPS)):
        optimizer.zero_grad()
        module.training_step(batch, step).backward()
        optimizer.step()
        engine.after_step()
    engine.finish()
    assert_equal_states(clone_state(module), plain(), exactly=True)


@pytest.mark.parametrize("method", METHODS)
def test_the_simulator_of_one_worker_is_plain_training(method: str) -> None:
    config = StageConfig(method=method, warmup_steps=2, network="net")
    batches = list(stream(0, STEPS))
    simulator = StageSimulator(
        Classifier("chain"), lambda module: module.configure_optimizers(), config, 1, batches[0][0]
    )
    for images, labels in batches:
        simulator.step(images, lambda logits, y=labels: torch.nn.functional.cross_entropy(logits, y))
    assert_equal_states(clone_state(simulator.full_model()), plain(), exactly=True)
