"""Seeds the random numbers of a data loader by (seed, epoch, sample), so that all workers see the same batches.

The generators are seeded anew at these places, in the process that loads the data::

    a batch        dataset[7]         dataset[2]         dataset[9]         collate_fn([7, 2, 9])
    seeded from    (seed, epoch, 7)   (seed, epoch, 2)   (seed, epoch, 9)   (seed, epoch, [7, 2, 9])

Between two fetches the generators are as if nothing had been drawn. The sampler alone decides the samples of a batch.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import count
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, IterDataPipe, MapDataPipe, get_worker_info
from typing_extensions import override

from resist_lightning.state.random_state import random_numbers_apart, seed_generators


def seed_loader(
    dataloader: object, seed: int, epoch: Callable[[], int], *, stream: int = 0, frozen: bool = False
) -> object:
    """A loader like ``dataloader`` whose data set and collate function draw the same random numbers on all workers.

    These are the numbers of torch's, NumPy's and Python's global generators, in loader processes too; a generator that
    the data set or a sampler made for itself is left alone. A loader that Lightning begins again within an epoch,
    because another one is longer, repeats its augmentation as it repeats its order.

    Args:
        dataloader: a training loader as ``Strategy.process_dataloader`` gets it; it and its data set are not modified.
            Any other object than a ``DataLoader`` is returned as it is.
        seed: the same on all workers.
        epoch: gives the number of the running epoch, from 0; asked in this process whenever the loader is iterated.
        stream: the place among several loaders that are combined, so that two of one data set give two views.
        frozen: every epoch has the augmentation of epoch 0.

    Raises:
        ValueError: for a DataPipe.
    """
    if not isinstance(dataloader, DataLoader):
        return dataloader
    dataset, collate = dataloader.dataset, dataloader.collate_fn
    # One that is seeded already is seeded anew, not twice.
    if isinstance(dataset, SeededDataset | SeededIterable):
        dataset = dataset.unseeded
    if isinstance(collate, SeededCollate):
        collate = collate.unseeded
    if isinstance(dataset, IterDataPipe | MapDataPipe):
        raise ValueError(
            "the training data are a DataPipe, which deals its samples out over the workers, and all workers must see "
            "the same. Give the loader a Dataset or an IterableDataset."
        )
    seeder = Seeder((seed, stream), _zero if frozen else epoch)
    if dataloader.num_workers > 0:
        seeder.share()
    seeded = SeededIterable if isinstance(dataset, IterableDataset) else SeededDataset
    twin = copy.copy(dataloader)  # the user's own stays as it is
    # Its attributes may not be set, and to make it again from arguments would guess those of a subclass.
    vars(twin).update(dataset=seeded(dataset, seeder), collate_fn=SeededCollate(collate, seeder))
    # The order follows the epoch although the augmentation may be frozen.
    vars(twin).update(_iterator=None, _unseeded=dataloader, _order_seeder=Seeder((seed, stream), epoch))
    cls = type(dataloader)
    if not issubclass(cls, _TellsEpoch):
        twin.__class__ = type(cls.__name__, (_TellsEpoch, cls), {"__module__": cls.__module__})
    return twin


def unseed_loader(dataloader: object) -> object:
    """The loader that :func:`seed_loader` was given to make this one; any other is returned as it is."""
    return vars(dataloader).get("_unseeded", dataloader) if isinstance(dataloader, DataLoader) else dataloader


class Seeder:
    """Seeds the random numbers of a loader, in the main process and in its loader processes.

    Args:
        seeds: equal on all workers.
        epoch: gives the number of the running epoch; not asked in loader processes.

    Attributes:
        fetched: identifies the samples that are collated next.
    """

    def __init__(self, seeds: tuple[int, ...], epoch: Callable[[], int]) -> None:
        self.fetched: tuple[Any, ...] = ()
        self._seeds = seeds
        self._current: Callable[[], int] | None = epoch
        self._epoch = torch.zeros((), dtype=torch.int64)

    @override
    def __getstate__(self) -> dict[str, Any]:
        # For loader processes, which read the shared epoch: the function refers to the trainer.
        return {**vars(self), "_current": None}

    def share(self) -> None:
        """Let loader processes see epochs that begin after they were started: persistent ones live on."""
        self._epoch.share_memory_()

    def tell_epoch(self) -> None:
        """Called before each iteration of the loader, in the main process."""
        if self._current is not None:
            self._epoch.fill_(self._current())

    def seed(self, *what: object) -> None:
        """Seed the global generators for the next draws."""
        key = repr((*self._seeds, int(self._epoch), *what))
        seed_generators(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big"))


class _Forwarding:
    """Forwards attributes of a data set, read and set, as by a ``worker_init_fn``."""

    unseeded: Any
    """The user's own object."""
    _seeder: Seeder

    def __init__(self, dataset: Any, seeder: Seeder) -> None:
        vars(self).update(unseeded=dataset, _seeder=seeder)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by pickle and copy before there is a data set
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.unseeded, name)

    @override
    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.unseeded, name, value)

    def __len__(self) -> int:
        return len(self.unseeded)


class SeededDataset(_Forwarding, Dataset[Any]):
    """A data set whose random numbers depend on the sample's index."""

    @override
    def __getitem__(self, index: Any) -> Any:
        index_key = _plain(index)
        self._seeder.fetched = ("batch", index_key)
        with random_numbers_apart():
            self._seeder.seed("sample", index_key)
            return self.unseeded[index]

    def __getitems__(self, indices: list[Any]) -> Any:
        """Called by torch for a batch."""
        self._seeder.fetched = ("batch", _plain(indices))
        several = getattr(self.unseeded, "__getitems__", None)
        with random_numbers_apart():
            return self._several(several, indices) if several else self._one_by_one(indices)

    def _one_by_one(self, indices: list[Any]) -> list[Any]:
        samples = []
        for index in indices:
            self._seeder.seed("sample", _plain(index))
            samples.append(self.unseeded[index])
        return samples

    def _several(self, several: Callable[[list[Any]], Any], indices: list[Any]) -> Any:
        samples = []
        for index in indices:
            # One at a time: a sample's random numbers are its own, whatever batch it is in.
            self._seeder.seed("sample", _plain(index))
            one = several([index])
            if not (isinstance(one, list) and len(one) == 1):
                # The data set makes a batch of its own kind, so the numbers are the whole batch's.
                self._seeder.seed("samples", _plain(indices))
                return several(indices)
            samples += one
        return samples


class SeededIterable(_Forwarding, IterableDataset[Any]):
    """An iterable data set whose random numbers depend on the loader process and on the number of the item in it."""

    @override
    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        process = info.id if info is not None else 0
        with random_numbers_apart():
            # Before the first item: an iterable often draws its order here.
            self._seeder.seed("iteration", process)
            items = iter(self.unseeded)
        for number in count():
            with random_numbers_apart():
                self._seeder.seed("item", process, number)
                try:
                    item = next(items)
                except StopIteration:
                    return
            self._seeder.fetched = ("items", process, number)
            yield item


class SeededCollate:
    """A collate function whose random numbers depend on the samples of the batch."""

    def __init__(self, collate: Callable[[Any], Any], seeder: Seeder) -> None:
        self.unseeded = collate
        self._seeder = seeder

    def __call__(self, samples: Any) -> Any:
        """Called by torch with the samples that were just fetched."""
        with random_numbers_apart():
            self._seeder.seed("collate", self._seeder.fetched)
            return self.unseeded(samples)


class SeededOrder:
    """A sampler, of samples or of batches, whose random numbers depend on the number of items it has given."""

    def __init__(self, sampler: Any, seeder: Seeder) -> None:
        self.unseeded = sampler
        self._seeder = seeder

    def __iter__(self) -> Iterator[Any]:
        with random_numbers_apart():
            self._seeder.seed("order")
            items = iter(self.unseeded)
        for number in count():
            with random_numbers_apart():
                self._seeder.seed("order", number)
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def __len__(self) -> int:
        return len(self.unseeded)


class _TellsEpoch(DataLoader[Any]):
    """Passes the epoch on to the seeders; mixed into the class of a user's loader, before it."""

    _order_seeder: Seeder

    @property
    @override
    def _index_sampler(self) -> Any:
        """The indices that torch fetches, in seeded order; the user's samplers stay where they are."""
        return SeededOrder(super()._index_sampler, self._order_seeder)

    @override
    def __iter__(self) -> Any:
        if isinstance(self.dataset, SeededDataset | SeededIterable):
            self.dataset._seeder.tell_epoch()
            self._order_seeder.tell_epoch()
        return super().__iter__()


def _zero() -> int:
    return 0


def _plain(index: Any) -> object:
    """An index as a plain Python number, whichever library's it is."""
    if isinstance(index, list | tuple):
        return [_plain(each) for each in index]
    try:
        return operator.index(index)
    except TypeError:
        return cast(object, index)
