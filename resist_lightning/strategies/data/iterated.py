"""Inspects training loaders in Lightning's hands: generators, processes, and when one begins again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch import Generator
from torch.utils.data import IterableDataset


class Watched:
    """A loader that calls ``begins`` each time it is begun again."""

    def __init__(self, loader: Any, begins: Callable[[], None]) -> None:
        self.loader = loader
        self._begins = begins

    def __iter__(self) -> Iterator[Any]:
        self._begins()
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def generators(loader: CombinedLoader | None) -> list[Generator]:
    """The generators that the user gave to loaders or their samplers."""
    found: list[Generator] = []
    for each in loader.flattened if loader is not None else []:
        batches = getattr(each, "batch_sampler", None)
        for owner in (each, getattr(each, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, Generator) and not any(generator is known for known in found):
                found.append(generator)
    return found


def order(iterator: Any) -> list[object]:
    """The sampler iterators in use. Persistent processes get new ones within the same iterator."""
    return [getattr(part, "_sampler_iter", None) for part in getattr(iterator, "iterators", [])]


def is_running(loader: object) -> bool:
    """Whether a loader has started processes that outlive its iterators."""
    return bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "_iterator", None) is not None


def draws_beside_training(loader: object) -> bool:
    """Whether a loader has an iterable data set, which may draw random numbers in the process that trains."""
    return isinstance(getattr(loader, "dataset", None), IterableDataset) and not getattr(loader, "num_workers", 0)
