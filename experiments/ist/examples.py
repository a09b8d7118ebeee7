"""The examples of a task in the order in which all methods see them, and the network that fits them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from experiments.accuracy.data import Stream
from experiments.accuracy.settings import LARGEST_WORKERS
from experiments.data import Digits, SpeechShaped
from experiments.data.module import ArrayData
from experiments.ist.tasks import TASKS
from experiments.networks import mlp

Batches = list[tuple[Tensor, Tensor]]
EVALUATED = 256
"""Examples of an evaluation step; matters to statistics of each batch."""


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

    @classmethod
    def of(cls, module: ArrayData[Any]) -> Prepared:
        """Read the examples of a data module; those of an evaluation are shuffled, always in the same way."""
        module.setup("fit")
        module.setup("test")

        def batches(part: str) -> Batches:
            examples = module.parts[part]
            order = torch.randperm(len(examples.labels), generator=torch.Generator().manual_seed(0))
            return [module.evaluation_transform(examples.take(chosen)) for chosen in order.split(EVALUATED)]

        return cls(module, batches("val"), batches("test"))

    def stream(self, batch: int, seed: int, *, augment: bool = True) -> Stream[Any]:
        """The training examples in the order of a seed."""
        transform = self.module.training_transform if augment else self.module.evaluation_transform
        return Stream(self.module.parts["train"], transform, batch, seed)


@lru_cache(maxsize=2)
def prepared(task: str, size: str) -> Prepared:
    """Read a task's examples."""
    return Prepared.of(_module(task, size))


def samples(task: str, size: str, passes: int | None) -> int:
    """Training examples that all workers see together: whole steps of the most workers; None for the task's passes."""
    passes = passes or TASKS[task].passes[size]
    step = TASKS[task].batch * LARGEST_WORKERS
    return len(prepared(task, size).module.parts["train"].labels) // step * step * passes


def make_network(task: str, size: str, **options: Any) -> nn.Module:
    """The task's network; ``options`` are those of `experiments.networks.mlp`."""
    module, chosen = prepared(task, size).module, TASKS[task]
    return mlp(
        in_features=module.in_features,
        num_classes=module.num_classes,
        depth=chosen.depth,
        width=chosen.width[size],
        **options,
    )


def _module(task: str, size: str) -> ArrayData[Any]:
    small = size == "sample"
    if task == "digits":
        return Digits(limit=50 if small else None)
    return SpeechShaped(train_size=400, test_size=100, features=32, classes=4) if small else SpeechShaped()
