"""Loaders whose random numbers follow from (seed, epoch, sample)."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    IterableDataset,
    Subset,
    default_collate,
)
from torchvision.transforms import v2

from resist_lightning.state.random_state import random_state
from tests.helpers.augmented import (
    SAMPLES,
    Augmented,
    Batched,
    Columns,
    Order,
    Stream,
    by_index,
    drawn,
    draws,
    seeded,
)
from tests.helpers.processes import PRELOADED

PROCESSES = [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


@pytest.mark.parametrize("options", PROCESSES, ids=["none", "two", "persistent"])
def test_a_sample_is_augmented_alike_in_any_order_and_anew_in_each_epoch(options: dict[str, Any]) -> None:
    now = [0]
    there = seeded(epoch=lambda: now[0], **options)
    back = seeded(sampler=Order([5, 2, 7, 0, 1, 6, 3, 4]), batch_size=3)
    back_next = seeded(sampler=Order([5, 2, 7, 0, 1, 6, 3, 4]), batch_size=3, epoch=lambda: 1)
    torch.manual_seed(1)
    first = by_index(there)
    now[0] = 1
    second = by_index(there)
    torch.manual_seed(2)

    assert first == by_index(back)
    assert second == by_index(back_next)
    assert len(first) == SAMPLES
    assert not any(first[index] == second[index] for index in first)
    assert len({tuple(row[-3:]) for row in [*first.values(), *second.values()]}) == 2 * SAMPLES
    del there


def test_processes_that_are_no_forks_of_this_one_see_each_epoch() -> None:
    """They get the data set pickled, as spawned ones do, each of which would import Lightning anew in seven seconds."""
    now = [0]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    by_server = seeded(
        epoch=lambda: now[0], num_workers=1, persistent_workers=True, multiprocessing_context=context, timeout=60
    )

    for now[0] in (0, 1):
        assert by_index(by_server) == by_index(seeded(epoch=lambda: now[0]))


@pytest.mark.parametrize("library", [0, 1, 2], ids=["numpy", "python", "torch"])
def test_every_generator_draws_something_else_for_another_sample_seed_epoch_and_stream(library: int) -> None:
    loaders = [seeded(), seeded(seed=4), seeded(epoch=lambda: 1), seeded(stream=1)]

    numbers = [row[16 + library] for loader in loaders for row in by_index(loader).values()]

    assert len(set(numbers)) == 4 * SAMPLES


def test_the_generators_are_independent_of_each_other() -> None:
    rows = by_index(seeded()).values()

    assert all(len({round(number, 4) for number in row[-3:]}) == 3 for row in rows)


@pytest.mark.parametrize("dataset", [Augmented(), Batched(), Columns(), Subset(Augmented(), range(SAMPLES)), Stream()])
def test_the_callers_generators_stay_where_they_are(dataset: Any) -> None:
    iterator = iter(seeded(dataset, collate_fn=draws))
    before = random_state()

    for _ in range(2):
        next(iterator)

    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert before["numpy"][2:] == after["numpy"][2:]


def test_the_callers_generators_stay_where_they_are_when_the_data_set_fails() -> None:
    loader = seeded([1, 2, 3], sampler=Order([7]))
    iterator = iter(loader)
    before = torch.get_rng_state()

    with pytest.raises(IndexError):
        next(iterator)

    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("options", PROCESSES[:2], ids=["none", "two"])
@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
def test_collate_functions_draw_from_epoch_and_samples(mix: Any, options: dict[str, Any]) -> None:
    mixing = mix(num_classes=SAMPLES)

    def collate(samples: list[dict[str, Any]]) -> Tensor:
        batch = default_collate(
            [(torch.full((1, 8, 8), float(sample["index"])), sample["index"]) for sample in samples]
        )
        return mixing(*batch)[0]

    def mixed(order: Sequence[int], epoch: int = 0) -> list[Any]:
        return drawn(seeded(sampler=Order(order), epoch=lambda: epoch, collate_fn=collate, **options))

    there = mixed(range(8))
    torch.manual_seed(7)
    assert there == mixed(range(8))
    assert there[::-1] == mixed([4, 5, 6, 7, 0, 1, 2, 3])  # the order of the batches does not matter
    assert there != mixed(range(8), epoch=1)


def test_a_frozen_loader_repeats_epoch_0() -> None:
    frozen = seeded(epoch=lambda: 5, frozen=True)

    assert by_index(frozen) == by_index(seeded())
    assert by_index(frozen) != by_index(seeded(epoch=lambda: 5))


@pytest.mark.parametrize("dataset", [Batched(), Subset(Augmented(), range(SAMPLES)), Subset(Batched(), range(SAMPLES))])
def test_data_sets_that_read_batches_draw_for_each_sample(dataset: Any) -> None:
    assert by_index(seeded(dataset)) == by_index(seeded())
    assert by_index(seeded(dataset, sampler=Order([3, 1, 2]))).items() <= by_index(seeded()).items()


def test_data_sets_that_collate_for_themselves_draw_for_each_batch() -> None:
    def batches(order: Sequence[int], epoch: int) -> list[Any]:
        loader = seeded(Columns(), sampler=Order(order), epoch=lambda: epoch, collate_fn=lambda batch: batch)
        return [batch["noise"].tolist() for batch in loader]

    there = batches(range(8), 0)
    assert there == batches(range(8), 0)
    assert there[::-1] == batches([4, 5, 6, 7, 0, 1, 2, 3], 0)
    assert there != batches(range(8), 1)
    assert there[0] != batches([0, 1, 2, 7], 0)[0]  # all samples of the batch matter, not only the first


@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize("dataset", [range(SAMPLES), Stream()], ids=["map", "stream"])
def test_collate_functions_draw_anew_for_each_batch(dataset: Any, batch_size: int | None) -> None:
    numbers = [number for _, *three in seeded(dataset, collate_fn=draws, batch_size=batch_size) for number in three]

    assert len(numbers) >= 6
    assert len(set(map(float, numbers))) == len(numbers)


def test_streams_that_draw_when_their_iteration_begins_draw_alike() -> None:
    class Eager(IterableDataset[Any]):
        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(50).tolist())

    orders = [drawn(seeded(Eager(), epoch=lambda epoch=epoch: epoch)) for epoch in (0, 0, 1)]

    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("options", PROCESSES, ids=["none", "two", "persistent"])
def test_iterable_data_sets_draw_alike_whatever_the_process_drew_before(options: dict[str, Any]) -> None:
    def epochs(seed: int) -> list[list[Any]]:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        now = [0]
        loader = seeded(Stream(), epoch=lambda: now[0], **options)
        found = []
        for now[0] in (0, 1, 0):
            found.append(drawn(loader))
        return found

    one, other = epochs(1), epochs(2)

    assert one == other
    assert one[0] == one[2] != one[1]
    values = [row[1:] for batch in one[0] for row in batch]
    assert len({number for row in values for number in row}) == 2 * SAMPLES  # also between loader processes
    assert sorted(row[0] for batch in one[0] for row in batch) == list(range(SAMPLES))


def test_an_epoch_that_is_fetched_again_from_its_middle_is_the_same() -> None:
    whole = drawn(seeded(Stream())), by_index(seeded())
    again = iter(seeded(Stream())), iter(seeded())
    for iterator in again:
        next(iterator)
    torch.manual_seed(99)

    assert drawn(again[0]) == whole[0][1:]
    assert by_index(again[1]).items() <= whole[1].items()
