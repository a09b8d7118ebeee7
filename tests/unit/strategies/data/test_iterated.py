from __future__ import annotations

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from resist_lightning.strategies.data.iterated import Watched, draws_beside_training, generators, is_running


class Stream(IterableDataset[int]):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(range(3))


def test_generators_of_loaders_and_their_samplers_are_found_once() -> None:
    shared, own = torch.Generator(), torch.Generator()
    data = list(range(4))
    sampler = BatchSampler(RandomSampler(data, generator=own), 2, drop_last=False)  # type: ignore[arg-type]
    loaders = [
        DataLoader(data, shuffle=True, generator=shared),  # type: ignore[arg-type]
        DataLoader(data, batch_sampler=sampler, generator=shared),  # type: ignore[arg-type]
    ]
    found = generators(CombinedLoader(loaders, "min_size"))
    assert [id(each) for each in found] == [id(shared), id(own)]
    assert generators(None) == []


def test_each_beginning_is_told() -> None:
    begun: list[int] = []
    loader = Watched([1, 2], lambda: begun.append(1))
    assert [*loader, *loader] == [1, 2, 1, 2]
    assert (len(begun), len(loader)) == (2, 2)


def test_only_an_iterable_without_processes_draws_beside_the_training() -> None:
    assert draws_beside_training(DataLoader(Stream()))
    assert not draws_beside_training(DataLoader(Stream(), num_workers=1))
    assert not draws_beside_training(DataLoader([1]))  # type: ignore[arg-type]
    assert not is_running(DataLoader([1]))  # type: ignore[arg-type]
