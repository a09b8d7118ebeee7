"""Trains the paper's network on CIFAR-10 for a fixed number of seconds, on one device, by several methods."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.accuracy.training import prepared
from experiments.gpu.cases import Accuracy
from experiments.gpu.limits import Skipped
from experiments.gpu.steps import set_precision
from experiments.trainers import (
    Batches,
    DataParallel,
    Prepared,
    Simulated,
    Trainer,
    accuracy,
    make_optimizer,
    rate,
)
from resist_lightning import Config, Simulator
from resist_lightning.models import preact_resnet

LOCAL_STEPS, MIN_BLOCKS, LR = 50, 5, 0.05
THREADS = 8  # that crop and flip
QUEUED = 20  # steps, at most


@dataclass(frozen=True)
class Task:
    """The settings of a case; the last ones are the accuracy study's options."""

    case: Accuracy
    device: str
    seconds: float  # of training
    depth: int
    width: float  # 1.0 is the paper's
    folder: str | None
    cache_dir: str
    batch: int  # of a worker
    data: str
    limit: int | None = None
    limit_test: int | None = None
    holdout: float = 0.02
    shrink: int = 1
    crop_padding: int = 4
    eval_batch: int = 500


def measure(task: Task) -> dict[str, Any]:
    """Train and evaluate; accuracies in per cent."""
    if task.data == "folder" and not (task.folder and Path(task.folder).is_dir()):
        raise Skipped(f"folder={task.folder} is no folder with train/<class>/* and test/<class>/*")
    torch.set_num_threads(THREADS if task.device.startswith("cuda") else 1)
    set_precision("bf16")
    began = time.perf_counter()
    data = prepared(task)
    loading_seconds = time.perf_counter() - began
    trainer = _make_trainer(task, data)
    precision = torch.autocast("cuda", torch.bfloat16) if task.device.startswith("cuda") else nullcontext()
    with precision:
        steps, seconds = _train(trainer, task, data)
        model = trainer.full_model()
        found = {name: accuracy(model, _on(task.device, part)) for name, part in _evaluated(data)}
    return {
        **found,
        "local_steps_done": steps,
        "samples": steps * task.case.workers * task.batch,
        "training_images": len(data.examples.labels),
        "training_seconds": round(seconds, 2),
        "loading_seconds": round(loading_seconds, 2),
    }


def _evaluated(data: Prepared) -> tuple[tuple[str, Batches], ...]:
    return ("holdout", data.holdout), ("test", data.test)


def _train(trainer: Trainer, task: Task, data: Prepared) -> tuple[int, float]:
    """Train for the given time; returns steps and seconds. The learning rate falls by time, not by steps."""
    stream = data.stream(task.batch, seed=0)
    workers = task.case.workers
    began = time.perf_counter()
    step = 0
    while (used := time.perf_counter() - began) < task.seconds:
        batches = [stream.batch(step, worker, workers) for worker in range(workers)]
        trainer.step(_on(task.device, batches), rate(LR, used / task.seconds, 1))
        step += 1
        if task.device.startswith("cuda") and step % QUEUED == 0:
            torch.cuda.synchronize()  # or more steps would be queued than the time allows
    return step, time.perf_counter() - began


def _on(device: str, batches: Batches) -> Batches:
    def moved(part: Tensor) -> Tensor:
        return part.to(device)

    return [(moved(x).contiguous(memory_format=torch.channels_last), moved(y)) for x, y in batches]


def _make_trainer(task: Task, data: Prepared) -> Trainer:
    torch.manual_seed(0)
    channels = data.examples.pixels.shape[1]
    network: nn.Module = preact_resnet(task.depth, num_classes=10, width_multiplier=task.width, in_channels=channels)
    network = network.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if task.case.method == "single":
        return DataParallel(network, make_optimizer(network, LR), 1)
    partitioned: dict[str, Any] = {"min_blocks": MIN_BLOCKS} if task.case.method == "resist" else {"blocks": []}
    config = Config(local_steps=LOCAL_STEPS, **partitioned)
    return Simulated(Simulator(network, lambda copied: make_optimizer(copied, LR), config, task.case.workers))
