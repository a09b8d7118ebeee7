"""IST reaches the accuracy of local SGD, within a tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from experiments.data import SpeechShaped
from resist_lightning import Config, NeuronConfig, NeuronSimulator, Simulator

WORKERS, LOCAL_STEPS, STEPS, BATCH = 4, 20, 400, 16
FEATURES, CLASSES, WIDTH = 128, 6, 256
TOLERANCE = 0.06


def examples(data: SpeechShaped, *, train: bool) -> tuple[Tensor, Tensor]:
    found = data.read(train=train)
    return found.table, torch.as_tensor(found.labels)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(FEATURES, WIDTH, bias=False),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, CLASSES),
        )


def accuracy(simulator: Simulator | NeuronSimulator, data: SpeechShaped) -> float:
    """Accuracy of the full model after equal steps on equal samples, with a shard for each worker."""
    x, y = examples(data, train=True)
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        for number, worker in enumerate(simulator.workers):
            batch = torch.randint(len(x) // WORKERS, (BATCH,), generator=generator) * WORKERS + number
            worker.optimizers[0].zero_grad()
            nn.functional.cross_entropy(worker.module.train()(x[batch]), y[batch]).backward()
            worker.optimizers[0].step()
        simulator.after_step()
    x, y = examples(data, train=False)
    with torch.no_grad():
        return float((simulator.full_model().eval()(x).argmax(1) == y).float().mean())


@pytest.mark.timeout(120)
def test_ist_comes_to_the_accuracy_of_local_sgd_on_a_task_of_the_shape_of_speech() -> None:
    data = SpeechShaped(train_size=4096, test_size=1024, features=FEATURES, classes=CLASSES)

    def sgd(module: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(module.parameters(), 0.1)

    local = Config(local_steps=LOCAL_STEPS, blocks=[], batch_norm="running")
    by_local_sgd = accuracy(Simulator(network(), sgd, local, WORKERS), data)
    by_ist = accuracy(NeuronSimulator(network(), sgd, NeuronConfig(local_steps=LOCAL_STEPS), WORKERS), data)

    assert by_local_sgd > 0.8
    assert by_ist > by_local_sgd - TOLERANCE
