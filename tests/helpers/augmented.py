"""Data sets that draw random numbers, and loaders of them that are seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    default_collate,
    get_worker_info,
)
from torchvision.transforms import v2

from resist_lightning.strategies.data.seeded_loader import seed_loader

SAMPLES = 8


class Augmented(Dataset[Any]):
    """Images that v2 transforms, NumPy and Python change at random; ``index`` is the sample's index."""

    transform = v2.Compose([v2.RandomCrop(4, padding=1), v2.RandomHorizontalFlip(), v2.GaussianNoise()])

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.arange(16.0).reshape(1, 4, 4) / 16 + index
        return {
            "index": index,
            "image": self.transform(image),
            "noise": torch.tensor([np.random.rand(), random.random(), float(torch.rand(()))], dtype=torch.float64),
        }


class Batched(Augmented):
    """A data set from which torch fetches whole batches."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


class Columns(Augmented):
    """A data set that collates batches itself."""

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"index": torch.tensor(indices), "noise": torch.rand(len(indices))}


class Stream(IterableDataset[Any]):
    """A stream of items that it shuffles and changes at random, split between its loader processes."""

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        items = list(range(SAMPLES))[info.id :: info.num_workers] if info else list(range(SAMPLES))
        random.shuffle(items)
        for item in items:
            yield torch.tensor([item, float(torch.rand(())), np.random.rand()], dtype=torch.float64)


class Order:
    """A sampler with an order of its own."""

    def __init__(self, order: Sequence[Any]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def seeded(
    dataset: Any = None, epoch: Callable[[], int] = lambda: 0, *, seed: int = 3, stream: int = 0, **options: Any
) -> DataLoader[Any]:
    frozen = options.pop("frozen", False)
    loader = DataLoader(dataset or Augmented(), **{"batch_size": 4, **options})
    twin = seed_loader(loader, seed, epoch, stream=stream, frozen=frozen)
    assert isinstance(twin, DataLoader)
    return twin


def by_index(batches: Any) -> dict[int, list[float]]:
    """The random draws for each sample: its image and numbers."""
    return {
        int(index): [*image.flatten().tolist(), *noise.tolist()]
        for batch in list(batches)
        for index, image, noise in zip(batch["index"], batch["image"], batch["noise"], strict=True)
    }


def drawn(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


def draws(samples: list[Any]) -> Any:
    """A collate function that draws from all generators."""
    return samples, torch.rand(()), np.random.rand(), random.random()


def number_beside(samples: list[Any]) -> Any:
    """A collate function that changes each sample's numbers."""
    batch = default_collate(samples)
    return {**batch, "noise": batch["noise"] + torch.rand(()) + np.random.rand() + random.random()}
