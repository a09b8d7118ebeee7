"""Random numbers of a data loader that follow from (seed, epoch, sample), so that all workers see the same batches.

Where each generator is seeded anew, in the process that loads the data::

    a batch        dataset[7]         dataset[2]         dataset[9]         collate_fn([7, 2, 9])
    seeded from    (seed, epoch, 7)   (seed, epoch, 2)   (seed, epoch, 9)   (seed, epoch, [7, 2, 9])

Between two fetches the generators are as if nothing had been drawn. Which samples a batch has is the sampler's affair.
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


def key_loader(
    dataloader: object, seed: int, epoch: Callable[[], int], *, stream: int = 0, frozen: bool = False
) -> object:
    """A loader like ``dataloader`` whose data set and collate function draw the same random numbers on all workers.

    These are the numbers of torch's, NumPy's and Python's global generators, in loader processes too. A sampler of
    samples or batches that draws its order from them draws the same one on all workers. A generator that the data set
    or a sampler made for itself is not seen. A data set with ``__getitems__`` is asked for one sample at a time, as its
    random numbers belong to one sample; if that does not give a list of one, they are the whole batch's. An iterable
    data set's depend on the number of the item and on the loader process. A loader that Lightning begins again within
    an epoch, because another one is longer, repeats its augmentation as it repeats its order.

    Args:
        dataloader: a training loader as ``Strategy.process_dataloader`` gets it; itself and its data set stay as they
            are. What is no ``DataLoader`` is returned as it is.
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
    if isinstance(dataset, SeededDataset | SeededIterable):
        dataset = dataset.unkeyed
    if isinstance(collate, SeededCollate):
        collate = collate.unkeyed
    if isinstance(dataset, IterDataPipe | MapDataPipe):
        raise ValueError(
            "the training data are a DataPipe, which deals its samples out over the workers, and all workers must see "
            "the same. Give the loader a Dataset or an IterableDataset."
        )
    keys = Keys((seed, stream), _zero if frozen else epoch)
    if dataloader.num_workers > 0:
        keys.share()
    seeded = SeededIterable if isinstance(dataset, IterableDataset) else SeededDataset
    twin = copy.copy(dataloader)
    # Its attributes may not be set, and to make it again from arguments would guess those of a subclass.
    vars(twin).update(dataset=seeded(dataset, keys), collate_fn=SeededCollate(collate, keys))
    vars(twin).update(_iterator=None, _before_keys=dataloader, _order_keys=Keys((seed, stream), epoch))
    cls = type(dataloader)
    if not issubclass(cls, _TellsEpoch):
        twin.__class__ = type(cls.__name__, (_TellsEpoch, cls), {"__module__": cls.__module__})
    return twin


def unkey_loader(dataloader: object) -> object:
    """The loader that :func:`key_loader` was given to make this one; any other is returned as it is."""
    return vars(dataloader).get("_before_keys", dataloader) if isinstance(dataloader, DataLoader) else dataloader


class Keys:
    """What the random numbers of a loader depend on, in the main process and in its loader processes.

    Args:
        seeds: equal on all workers.
        epoch: gives the number of the running epoch; not asked in loader processes.

    Attributes:
        fetched: what the samples that are to be collated next were fetched by.
    """

    def __init__(self, seeds: tuple[int, ...], epoch: Callable[[], int]) -> None:
        self.fetched: tuple[Any, ...] = ()
        self._seeds = seeds
        self._current: Callable[[], int] | None = epoch
        self._epoch = torch.zeros((), dtype=torch.int64)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_current": None}

    def share(self) -> None:
        """Loader processes shall see epochs that begin after they were started, as persistent ones do."""
        self._epoch.share_memory_()

    def tell_epoch(self) -> None:
        """Called before each iteration of the loader, in the main process."""
        if self._current is not None:
            self._epoch.fill_(self._current())

    def seed(self, *what: object) -> None:
        """Seed the global generators for what is drawn next."""
        key = repr((*self._seeds, int(self._epoch), *what))
        seed_generators(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big"))


class _Forwarding:
    """Has the attributes of a data set, to read and to set, as a ``worker_init_fn`` does."""

    unkeyed: Any
    """The user's own object."""
    _keys: Keys

    def __init__(self, dataset: Any, keys: Keys) -> None:
        vars(self).update(unkeyed=dataset, _keys=keys)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by pickle and copy before there is a data set
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.unkeyed, name)

    @override
    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.unkeyed, name, value)

    def __len__(self) -> int:
        return len(self.unkeyed)


class SeededDataset(_Forwarding, Dataset[Any]):
    """A data set whose random numbers depend on the sample's index."""

    @override
    def __getitem__(self, index: Any) -> Any:
        index_key = _plain(index)
        self._keys.fetched = ("batch", index_key)
        with random_numbers_apart():
            self._keys.seed("sample", index_key)
            return self.unkeyed[index]

    def __getitems__(self, indices: list[Any]) -> Any:
        """Called by torch for a batch."""
        self._keys.fetched = ("batch", _plain(indices))
        with random_numbers_apart():
            several = getattr(self.unkeyed, "__getitems__", None)
            return self._one_by_one(indices) if not several else self._several(several, indices)

    def _one_by_one(self, indices: list[Any]) -> list[Any]:
        samples = []
        for index in indices:
            self._keys.seed("sample", _plain(index))
            samples.append(self.unkeyed[index])
        return samples

    def _several(self, several: Callable[[list[Any]], Any], indices: list[Any]) -> Any:
        samples = []
        for index in indices:
            self._keys.seed("sample", _plain(index))
            one = several([index])
            if not (isinstance(one, list) and len(one) == 1):
                self._keys.seed("samples", _plain(indices))
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
            self._keys.seed("iteration", process)
            items = iter(self.unkeyed)
        for number in count():
            with random_numbers_apart():
                self._keys.seed("item", process, number)
                try:
                    item = next(items)
                except StopIteration:
                    return
            self._keys.fetched = ("items", process, number)
            yield item


class SeededCollate:
    """A collate function whose random numbers depend on the samples of the batch."""

    def __init__(self, collate: Callable[[Any], Any], keys: Keys) -> None:
        self.unkeyed = collate
        self._keys = keys

    def __call__(self, samples: Any) -> Any:
        """Called by torch with the samples that were just fetched."""
        with random_numbers_apart():
            self._keys.seed("collate", self._keys.fetched)
            return self.unkeyed(samples)


class SeededOrder:
    """A sampler, of samples or of batches, whose random numbers depend on how much it has given."""

    def __init__(self, sampler: Any, keys: Keys) -> None:
        self.unkeyed = sampler
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        with random_numbers_apart():
            self._keys.seed("order")
            items = iter(self.unkeyed)
        for number in count():
            with random_numbers_apart():
                self._keys.seed("order", number)
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def __len__(self) -> int:
        return len(self.unkeyed)


class _TellsEpoch(DataLoader[Any]):
    """Put before the class of a user's loader."""

    _order_keys: Keys

    @property
    @override
    def _index_sampler(self) -> Any:
        """What torch iterates to know what to fetch; the user's samplers stay where they are."""
        return SeededOrder(super()._index_sampler, self._order_keys)

    @override
    def __iter__(self) -> Any:
        if isinstance(self.dataset, SeededDataset | SeededIterable):
            self.dataset._keys.tell_epoch()
            self._order_keys.tell_epoch()
        return super().__iter__()


def _zero() -> int:
    return 0


def _plain(index: Any) -> object:
    """An index as Python's own, whichever library's number it is."""
    if isinstance(index, list | tuple):
        return [_plain(each) for each in index]
    try:
        return operator.index(index)
    except TypeError:
        return cast(object, index)
