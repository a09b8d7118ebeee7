"""Which batch-norm, momentum and scale policy trains best? One training per momentum policy and seed, many evaluations.

Runs on the reference simulator, so any number of workers trains on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from experiments.data.folder import ImageFolder
from experiments.data.module import ImageData
from experiments.data.sets import Digits
from experiments.trainers import Batches, Prepared, Simulated, make_optimizer, rate
from resist_lightning import Config, Simulator
from resist_lightning.models import PreActResNet

WORKERS, LOCAL_STEPS, BATCH, LR = 2, 20, 32, 0.05


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per policy and scale, with the accuracy of every seed."""
    loading = {"batch_size": BATCH, "limit": settings["limit"], "holdout": 0.02}
    data: ImageData = Digits(**loading)
    if settings["folder"] != "digits":
        data = ImageFolder(settings["folder"], cache_dir=settings["cache_dir"], **loading)
    torch.set_num_threads(1)
    test, rows = Prepared.of(data).test, []
    for momentum in ("reset", "keep", "travel"):
        found: dict[str, list[float]] = {}
        for seed in range(settings["seeds"]):
            trained = _train(data, momentum, seed, settings["epochs"])
            for policy, value in trained.policies(test).items():
                found.setdefault(policy, []).append(value)
        for policy, values in found.items():
            norm, _, scale = policy.partition(", ")
            rows.append({"momentum": momentum, "batch_norm": norm, "scale": scale, "test_accuracy": values})
    return rows


def _train(data: ImageData, momentum: Any, seed: int, epochs: int) -> Simulated:
    """Train with SGD, momentum 0.9, and the paper's steps of the learning rate."""
    torch.manual_seed(seed)
    net = PreActResNet((1, 1, 7, 1), data.num_classes, width_multiplier=0.25, in_channels=data.in_channels)
    config = Config(local_steps=LOCAL_STEPS, seed=seed, momentum=momentum)
    trainer = Simulated(Simulator(net, lambda copied: make_optimizer(copied, LR), config, WORKERS))
    for epoch in range(epochs):
        for batches in _batches(data, epoch, seed):
            trainer.step(batches, rate(LR, epoch, epochs))
    return trainer


def _batches(data: ImageData, epoch: int, seed: int) -> Iterator[Batches]:
    """A batch for each worker, from its shard of the epoch's order."""
    images = data.parts["train"]
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed * 10_000 + epoch))
    for together in order.split(BATCH * WORKERS):
        if len(together) == BATCH * WORKERS:  # the rest fills no step of all workers
            yield [data.training_transform(images.take(part)) for part in together.split(BATCH)]
