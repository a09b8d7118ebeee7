"""Seeding keeps the rest of a loader: its order, its class, its attributes, and the user's own objects."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from resist_lightning.strategies.data.seeded_loader import SeededDataset, seed_loader, unseed_loader
from tests.helpers.augmented import (
    SAMPLES,
    Augmented,
    Order,
    Stream,
    by_index,
    drawn,
    number_beside,
    seeded,
)


def test_samplers_of_batches_keep_their_order() -> None:
    batches = [[7, 0], [3, 3, 1], [2]]
    loader = seeded(batch_sampler=Order(batches), batch_size=1)
    found = list(loader)

    assert [batch["index"].tolist() for batch in found] == batches
    assert by_index(found).items() <= by_index(seeded()).items()
    assert torch.equal(found[1]["image"][0], found[1]["image"][1])


def test_without_automatic_batches_a_sample_is_what_the_sampler_asks_for() -> None:
    class Rows(Dataset[Any]):
        def __getitem__(self, index: Any) -> Tensor:
            return torch.rand(np.shape(index))

    single = drawn(seeded(Rows(), batch_size=None, sampler=Order([4, 2, 4])))
    assert single[0] == single[2] != single[1]
    lists = BatchSampler(SequentialSampler(range(4)), 2, drop_last=False)
    assert drawn(seeded(Rows(), batch_size=None, sampler=lists)) == drawn(
        seeded(Rows(), batch_size=None, sampler=lists)
    )


def test_indices_of_other_libraries_are_the_same_samples() -> None:
    orders = [[3, 1], np.array([3, 1]), torch.tensor([3, 1])]

    assert len({str(by_index(seeded(sampler=Order(order)))) for order in orders}) == 1


def test_the_users_loader_and_data_set_stay_as_they_are() -> None:
    dataset = Augmented()
    loader = DataLoader(dataset, batch_size=4)
    before = dict(vars(loader))

    twin: Any = seed_loader(loader, 0, lambda: 0)

    assert vars(loader) == before
    assert type(loader) is DataLoader
    assert isinstance(twin, DataLoader)
    assert twin.dataset.unseeded is dataset
    assert twin.sampler is loader.sampler
    assert unseed_loader(twin) is loader
    assert unseed_loader(loader) is loader
    assert len(twin) == 2
    assert len(twin.dataset) == SAMPLES


def test_attributes_of_the_data_set_are_read_and_set_through_the_seeded_one() -> None:
    dataset = Augmented()
    twin: Any = seeded(dataset)

    assert twin.dataset.transform is dataset.transform
    twin.dataset.transform = None
    assert vars(dataset) == {"transform": None}
    assert copy.deepcopy(twin).dataset.transform is None
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        twin.dataset.absent  # noqa: B018
    with pytest.raises(TypeError, match="has no len"):
        len(seeded(Stream()).dataset)  # type: ignore[arg-type]


def test_a_loader_that_is_seeded_again_has_the_new_seed_only() -> None:
    now = [0]
    old = seeded(epoch=lambda: now[0], collate_fn=number_beside)
    again: Any = seed_loader(old, 4, lambda: 0)

    assert isinstance(again.dataset, SeededDataset)
    assert isinstance(again.dataset.unseeded, Augmented)
    assert by_index(again) == by_index(seeded(seed=4, collate_fn=number_beside))


def test_a_loader_whose_processes_run_gets_new_ones() -> None:
    loader = DataLoader(Augmented(), batch_size=4, num_workers=1, persistent_workers=True)
    list(loader)

    assert by_index(seed_loader(loader, 3, lambda: 0)) == by_index(seeded())


def test_a_loader_of_the_users_own_class_stays_one() -> None:
    class Own(DataLoader[Any]):
        def __init__(self, kept: str) -> None:
            super().__init__(Augmented(), batch_size=4)
            self.kept = kept

        def __iter__(self) -> Any:
            return (batch for batch in super().__iter__())

    twin: Any = seed_loader(Own("this"), 3, lambda: 1)

    assert isinstance(twin, Own)
    assert twin.kept == "this"
    assert by_index(twin) == by_index(seeded(epoch=lambda: 1))


def test_what_is_no_data_loader_is_returned_as_it_is() -> None:
    batches = [torch.zeros(2)]

    assert seed_loader(batches, 0, lambda: 0) is batches
    assert unseed_loader(batches) is batches


def test_data_pipes_are_refused() -> None:
    with pytest.raises(ValueError, match="are a DataPipe, which deals its samples out over the workers"):
        seeded(IterableWrapper([1, 2]))
