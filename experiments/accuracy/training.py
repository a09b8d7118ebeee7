"""Trains one case: one process, DDP, local SGD or ResIST, on the same images in the same order."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.accuracy.cases import Case, config_of
from experiments.accuracy.data import Prepared, Stream
from experiments.accuracy.networks import make_network
from experiments.accuracy.settings import LARGEST_WORKERS, Settings
from resist_lightning import NeuronSimulator, Simulator
from resist_lightning.methods.config import NormPolicy

NORMS: tuple[NormPolicy, ...] = ("recalibrate", "running", "batch")


class DataParallel:
    """DDP with S workers, in one process: gradients are the mean of S shards, batch statistics each shard's own.

    As in torch's DDP, the running statistics are those of worker 0, broadcast before every step.

    Args:
        module: the network; it is trained in place.
        optimizer: its optimizer.
        workers: number of shards; 1 is ordinary training.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, workers: int) -> None:
        self.module = module
        self.optimizer = optimizer
        self.workers = workers

    def step(self, batches: list[tuple[Tensor, Tensor]], lr: float) -> None:
        """One step of all workers."""
        set_rate(self.optimizer, lr)
        self.module.train()
        self.optimizer.zero_grad()
        for number in reversed(range(self.workers)):  # worker 0 last: its statistics stay
            before = [buffer.clone() for buffer in self.module.buffers()] if number else []
            x, y = batches[number]
            (nn.functional.cross_entropy(self.module(x), y) / self.workers).backward()
            for buffer, value in zip(self.module.buffers(), before, strict=False):
                buffer.copy_(value)
        self.optimizer.step()

    def full_model(self, batch_norm: NormPolicy | None = None, scale: float | None = None) -> nn.Module:
        """A copy of the network; it has one kind of statistics and no scale."""
        return copy.deepcopy(self.module)


class Simulated:
    """Local SGD, ResIST or IST with S workers, on one of the package's simulators."""

    def __init__(self, simulator: Simulator | NeuronSimulator) -> None:
        self.simulator: Any = simulator

    def step(self, batches: list[tuple[Tensor, Tensor]], lr: float) -> None:
        """One local step of all workers."""
        for worker, (x, y) in zip(self.simulator.workers, batches, strict=True):
            (optimizer,) = worker.optimizers
            set_rate(optimizer, lr)
            optimizer.zero_grad()
            nn.functional.cross_entropy(worker.module.train()(x), y).backward()
            optimizer.step()
        self.simulator.after_step()

    def full_model(self, batch_norm: NormPolicy | None = None, **more: Any) -> nn.Module:
        """As the simulator's own."""
        return self.simulator.full_model(batch_norm, **more)


Trainer = DataParallel | Simulated


def make_optimizer(module: nn.Module, lr: float) -> torch.optim.SGD:
    """The paper's: momentum 0.9, weight decay 5e-4."""
    return torch.optim.SGD(module.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def steps_of(samples: int, batch: int, workers: int) -> int:
    """Local steps of each worker; equal samples for all numbers of workers."""
    return samples // (batch * LARGEST_WORKERS) * LARGEST_WORKERS // workers


def rate(lr: float, step: int, steps: int) -> float:
    """A tenth from half of the steps on, a hundredth from three quarters on, as in the paper."""
    return lr * (1 if step < steps / 2 else 0.1 if step < steps * 3 / 4 else 0.01)


def make_trainer(case: Case, settings: Settings, channels: int) -> Trainer:
    """What trains ``case``."""
    network = make_network(case.network, settings, channels, case.seed)
    if case.method in ("single", "ddp"):
        return DataParallel(network, make_optimizer(network, case.lr), case.workers)
    return Simulated(Simulator(network, lambda copied: make_optimizer(copied, case.lr), config_of(case), case.workers))


def train(
    trainer: Trainer,
    case: Case,
    settings: Settings,
    data: Prepared,
    samples: int,
    after_step: Callable[[int], None] = lambda done: None,
) -> None:
    """Train on so many images; ``after_step`` is told the number of local steps done."""
    stream = Stream(data.train, data.augmented, settings.batch, case.seed)
    steps = steps_of(samples, settings.batch, case.workers)
    for step in range(steps):
        batches = [stream.batch(step, worker, case.workers) for worker in range(case.workers)]
        trainer.step(batches, rate(case.lr, step, steps))
        after_step(step + 1)


def measure(case: Case, settings: Settings, data: Prepared) -> dict[str, Any]:
    """Train and evaluate ``case``: one row of a record, accuracies in per cent."""
    started = time.perf_counter()
    steps = steps_of(settings.samples, settings.batch, case.workers)
    stops = {max(1, steps * number // settings.evaluations) for number in range(1, settings.evaluations + 1)}
    curve: list[dict[str, float]] = []
    trainer = make_trainer(case, settings, data.channels)

    def evaluate(done: int) -> None:
        if done in stops:
            model = trainer.full_model()
            curve.append({"step": done, "holdout": accuracy(model, data.holdout), "test": accuracy(model, data.test)})

    train(trainer, case, settings, data, settings.samples, evaluate)
    best = max(curve, key=lambda point: (point["holdout"], point["step"]))
    return {
        "last": curve[-1]["test"],
        "selected": best["test"],
        "best_on_test": max(point["test"] for point in curve),
        "last_holdout": curve[-1]["holdout"],
        "local_steps_done": steps,
        "samples": steps * case.workers * settings.batch,
        "curve": curve,
        "policies": _policies(trainer, data) if isinstance(trainer, Simulated) and case.method == "resist" else {},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _policies(trainer: Simulated, data: Prepared) -> dict[str, float]:
    """Test accuracy of the same training by batch-norm policy and test-time scale."""
    simulator = trainer.simulator
    scales = {"held share": simulator.scale, "1/S": 1 / len(simulator.workers), "none": 1.0}
    found = {
        (norm, scale): accuracy(trainer.full_model(norm, scale=scale), data.test)
        for norm in NORMS
        for scale in set(scales.values())
    }
    return {f"{norm}, {label}": found[norm, scale] for norm in NORMS for label, scale in scales.items()}


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Share of right answers, in per cent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)
