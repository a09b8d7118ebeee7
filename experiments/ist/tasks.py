"""The tasks of the accuracy study: the digits, and a wider and harder one of the shape of Speech Commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from experiments.accuracy.data import Stream
from experiments.accuracy.settings import LARGEST_WORKERS
from experiments.data import Digits, SpeechShaped
from experiments.data.module import ArrayData
from experiments.models import mlp

Batches = list[tuple[Tensor, Tensor]]
EVALUATED = 256
"""Examples of an evaluation step; matters to statistics of each batch."""


@dataclass(frozen=True)
class Task:
    """Data, and the network that learns it.

    Args:
        title: in words.
        data: the data module, by size (full or sample).
        depth: linear layers.
        width: neurons of a hidden layer, by size.
        batch: examples per local step of one worker.
        passes: over the training examples, of all workers together, by size.
        lr: initial learning rate by method: the best of `cases.RATES` on the hold-out, with four workers.
    """

    title: str
    data: Callable[[str], ArrayData[Any]]
    depth: int
    width: dict[str, int]
    batch: int
    passes: dict[str, int]
    lr: dict[str, float]


def _speech_shaped(size: str) -> SpeechShaped:
    small = {"train_size": 400, "test_size": 100, "features": 32, "classes": 4} if size == "sample" else {}
    return SpeechShaped(**small)


TASKS = {
    "digits": Task(
        "digits of scikit-learn, 64 inputs",
        lambda size: Digits(limit=50 if size == "sample" else None),
        depth=3,
        width={"full": 256, "sample": 16},
        batch=16,
        passes={"full": 48, "sample": 8},
        lr={"single": 0.1, "ddp": 0.1, "local_sgd": 0.1, "ist": 0.1},
    ),
    "speech_shaped": Task(
        "made task of the shape of Speech Commands, 4096 inputs, 35 classes",
        _speech_shaped,
        depth=3,
        width={"full": 1024, "sample": 16},
        batch=32,
        passes={"full": 8, "sample": 16},
        lr={"single": 0.2, "ddp": 0.2, "local_sgd": 0.2, "ist": 0.2},
    ),
}


@dataclass(frozen=True)
class Prepared:
    """The examples of a task.

    Args:
        module: where they come from.
        holdout: kept from training, ready to evaluate.
        test: ready to evaluate.
    """

    module: ArrayData[Any]
    holdout: Batches
    test: Batches

    def stream(self, batch: int, seed: int) -> Stream[Any]:
        """The training examples in the order of a seed."""
        return Stream(self.module.parts["train"], self.module.training_transform, batch, seed)


@lru_cache(maxsize=2)
def prepared(task: str, size: str) -> Prepared:
    """Read a task's examples."""
    module = TASKS[task].data(size)
    module.setup("fit")
    module.setup("test")

    def batches(part: str) -> Batches:
        examples = module.parts[part]
        order = torch.randperm(len(examples.labels), generator=torch.Generator().manual_seed(0))
        return [module.evaluation_transform(examples.take(chosen)) for chosen in order.split(EVALUATED)]

    return Prepared(module, batches("val"), batches("test"))


def samples(task: str, size: str, passes: int | None) -> int:
    """Training examples that all workers see together: whole steps of the most workers; None for the task's passes."""
    passes = passes or TASKS[task].passes[size]
    step = TASKS[task].batch * LARGEST_WORKERS
    return len(prepared(task, size).module.parts["train"].labels) // step * step * passes


def make_network(task: str, size: str, **options: Any) -> nn.Module:
    """The task's network; ``options`` are those of `experiments.models.mlp`."""
    module, chosen = prepared(task, size).module, TASKS[task]
    return mlp(
        in_features=module.in_features,
        num_classes=module.num_classes,
        depth=chosen.depth,
        width=chosen.width[size],
        **options,
    )
