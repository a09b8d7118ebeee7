"""Inspects Lightning's training loaders: their generators, their processes, and when one is iterated again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.utilities import CombinedLoader
from torch import Generator, Tensor
from torch.utils.data import IterableDataset


class Watched:
    """A loader that calls ``begins`` before each iteration over it."""

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
    found: dict[int, Generator] = {}  # by identity: a loader and its sampler often share one
    loaders = loader.flattened if loader is not None else []
    for each in loaders:
        batches = getattr(each, "batch_sampler", None)
        sampler = getattr(each, "sampler", None)
        inner = getattr(batches, "sampler", None)  # where the user gave a batch sampler
        for owner in (each, sampler, batches, inner):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, Generator):
                found[id(generator)] = generator
    return list(found.values())


def states_of_generators(loader: CombinedLoader | None) -> list[Tensor]:
    """The states of its :func:`generators`."""
    return [generator.get_state() for generator in generators(loader)]


def set_generators(loader: CombinedLoader | None, states: Sequence[Tensor]) -> None:
    """Set the :func:`generators`; not strict, as the loaders of a resumed run may have others."""
    for generator, state in zip(generators(loader), states, strict=False):
        generator.set_state(state)


def next_batch(fetcher: Any) -> None:
    """Fetch a batch."""
    found = next(fetcher)
    if isinstance(fetcher, _DataLoaderIterDataFetcher):  # it gives the iterator of `training_step(dataloader_iter)`
        next(found)


def order(iterator: Any) -> list[object]:
    """The sampler iterators in use. Persistent processes get new ones within the same iterator."""
    return [getattr(part, "_sampler_iter", None) for part in getattr(iterator, "iterators", [])]


def is_running(loader: object) -> bool:
    """Whether a loader has started processes that outlive its iterators."""
    persistent = getattr(loader, "persistent_workers", False)
    return bool(persistent) and getattr(loader, "_iterator", None) is not None


def draws_beside_training(loader: object) -> bool:
    """Whether a loader has an iterable data set, which may draw random numbers in the process that trains."""
    iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
    return iterable and not getattr(loader, "num_workers", 0)
