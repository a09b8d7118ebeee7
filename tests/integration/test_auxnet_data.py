"""``Trainer(strategy="auxnet")``: all workers see the same batches, augmented alike, or say how they differ."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler

from resist_lightning import WorkersDisagree
from tests.helpers.auxnet import Pictures, fit_stages, pictures
from tests.helpers.plain import BATCH_SIZE, Classifier
from tests.helpers.trainers import Training, run_in_turn

CUTS = {"cuts": ["4"]}

Found = dict[str, list[Any]]


def small_module() -> Classifier:
    return Classifier("chain")


class Augmented(Pictures):
    """Samples with transforms that draw from every generator; the last number of an image is its index."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        image = image + torch.randn(3, 8, 8) + float(np.random.rand()) + random.random()
        image[2, 7, 7] = index
        return image, label


def add_noise(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A collate function that adds random noise."""
    images, labels = zip(*samples, strict=True)
    noise = torch.randn(len(images), 3, 8, 8)
    noise[:, 2, 7, 7] = 0
    return torch.stack(images) + noise, torch.stack(labels)


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """A data set of unknown length, in a random order of its own."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Augmented()
        for index in torch.randperm(len(data)).tolist():
            yield data[index]


class Seeing(Classifier):
    """Notes the images of each epoch, by sample."""

    def __init__(self) -> None:
        super().__init__("chain")
        self.seen: list[dict[int, Tensor]] = [{}, {}]
        self.order: list[list[int]] = [[], []]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        numbers = [int(image[2, 7, 7]) for image in batch[0]]
        self.order[self.current_epoch] += numbers
        self.seen[self.current_epoch].update(zip(numbers, batch[0].clone(), strict=True))
        return super().training_step(batch, batch_idx)


LOADERS: dict[str, dict[str, Any]] = {
    "in this process": {},
    "two loader processes": {"num_workers": 2, "multiprocessing_context": "fork"},
    "processes that stay": {"num_workers": 1, "multiprocessing_context": "fork", "persistent_workers": True},
    "a random collate function": {"collate_fn": add_noise},
}


def see(worker: int, loader: str, method: str = "delayed") -> tuple[list[dict[int, Tensor]], list[list[int]]]:
    torch.manual_seed(worker)  # users forget to seed
    np.random.seed(worker)
    random.seed(worker)
    data: Any = DataLoader(Augmented(), BATCH_SIZE, shuffle=True, **LOADERS.get(loader, {}))
    if loader == "endless":
        data = DataLoader(Endless(), BATCH_SIZE)
    module = Seeing()
    fit_stages(worker, module, {**CUTS, "method": method}, data, max_epochs=2)
    return module.seen, module.order


@pytest.mark.parametrize("loader", [*LOADERS, "endless"])
def test_all_workers_see_the_same_images_in_the_same_order_augmented_anew_in_each_epoch(
    loader: str, found: Found
) -> None:
    """Even if they have no seed, or different ones."""
    (mine, order), (theirs, other_order) = found[loader]

    assert order == other_order
    assert order[0] != order[1]
    for epoch in range(2):
        assert sorted(order[epoch]) == list(range(len(Pictures())))
        for number, image in mine[epoch].items():
            assert torch.equal(image, theirs[epoch][number])
    assert not any(torch.equal(mine[0][number], mine[1][number]) for number in mine[0])


def test_with_stored_guesses_the_augmentation_is_that_of_the_first_epoch(found: Found) -> None:
    (mine, order), (theirs, _) = found["stored guesses"]

    assert order[0] != order[1]
    for number, image in mine[0].items():
        for other in (mine[1], theirs[0], theirs[1]):
            assert torch.equal(image, other[number])


def see_frozen_collate(worker: int) -> str:
    with pytest.raises(ValueError, match="Take random transforms out") as raised:
        see(worker, "a random collate function", "al-store")
    return str(raised.value)


def test_stored_guesses_with_a_random_collate_function_are_refused_in_the_second_epoch(found: Found) -> None:
    for said in found["stored guesses, a random collate function"]:
        assert "Take random transforms out of the collate function" in said
        assert "method='penalty'" in said


# ------------------------------------------------------------------ orders drawn from a global generator


class DropsInOneStage(Seeing):
    """Draws random numbers from the global generator on one worker only."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.Sequential(nn.Dropout(0.1), self.net[0])


class OwnOrder(Sampler[int]):
    """A user's sampler, with Python's global generator."""

    def __len__(self) -> int:
        return len(Pictures())

    def __iter__(self) -> Iterator[int]:
        yield from random.sample(range(len(self)), len(self))


def draw_order(worker: int, kind: str, by_lightning: bool) -> tuple[list[list[int]], bool]:
    torch.manual_seed(5)
    random.seed(worker)
    module, data = DropsInOneStage(), Augmented()
    samplers = {"weighted": WeightedRandomSampler([1.0] * len(data), len(data)), "own": OwnOrder()}
    sampler: Any = samplers.get(kind) or RandomSampler(data)
    before = dict(vars(sampler))
    if kind == "batches":
        loader: Any = DataLoader(data, batch_sampler=BatchSampler(sampler, BATCH_SIZE, drop_last=False))
    else:
        loader = DataLoader(data, BATCH_SIZE, sampler=sampler)
    fit_stages(worker, module, CUTS, loader, max_epochs=2, use_distributed_sampler=by_lightning)
    return module.order, vars(sampler) == before


ORDERS = {
    "weighted": ("weighted", True),
    "own": ("own", False),
    "own, with Lightning's sampler allowed": ("own", True),
    "batches": ("batches", False),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_that_is_drawn_from_a_global_generator_is_that_of_all_workers_in_every_epoch(
    name: str, found: Found
) -> None:
    (mine, same), (theirs, _) = found[name]

    assert mine == theirs
    assert mine[0] != mine[1]
    assert [len(epoch) for epoch in mine] == [len(Pictures())] * 2
    assert same, "the user's own sampler"


# ------------------------------------------------------------------ workers with different batches


class DrawsInStep(Classifier):
    """Augments in the training step, which the strategy cannot seed."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] + torch.randn_like(batch[0]), batch[1]), batch_idx)


class DrawsInTransfer(Classifier):
    """The same, in a hook."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + torch.randn_like(batch[0]), batch[1]


class OwnGenerator(Pictures):
    """Has a generator that differs between processes."""

    def __init__(self, worker: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(worker)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image + torch.randn(image.shape, generator=self.generator), label


def disagree(worker: int, what: str) -> str:
    torch.manual_seed(worker)
    module = {"step": DrawsInStep, "transfer": DrawsInTransfer}.get(what, Classifier)("chain")
    loader = pictures()
    if what == "generator":
        loader = DataLoader(OwnGenerator(worker), BATCH_SIZE, shuffle=True)
    elif what == "shuffle":
        loader = DataLoader(Pictures(), BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(worker))
    with pytest.raises(WorkersDisagree) as raised:
        fit_stages(worker, module, CUTS, loader, use_distributed_sampler=what != "shuffle")
    return str(raised.value)


DIFFERENCES = {
    "step": "step 0: .*the network's input",
    "transfer": r"batch 0: .*batch\[0\]",
    "generator": r"batch 0: .*batch\[0\]",
    "shuffle": r"batch 0: .*batch\[0\].*batch\[1\]",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_workers_that_see_other_batches_say_so_in_the_first_step(what: str, found: Found) -> None:
    for said in found[what]:
        assert re.search(DIFFERENCES[what], said), said
        assert "Leave the order of the samples to Lightning" in said
        assert "In training_step and batch-transfer hooks they are the same only if" in said


def shuffle_alike(worker: int, seeds: tuple[int, ...]) -> list[list[int]]:
    module = Seeing()
    generator = torch.Generator().manual_seed(seeds[worker]) if seeds else None
    torch.manual_seed(worker)
    loader = DataLoader(Augmented(), BATCH_SIZE, shuffle=True, generator=generator)
    fit_stages(worker, module, CUTS, loader, max_epochs=2, use_distributed_sampler=False)
    return module.order


@pytest.mark.parametrize("name", ["a generator that is seeded alike", "no generator"])
def test_a_shuffle_of_the_users_own_works_if_it_has_no_generator_or_one_that_is_seeded_alike(
    name: str, found: Found
) -> None:
    mine, theirs = found[name]
    assert mine == theirs
    assert mine[0] != mine[1]
    assert [sorted(epoch) for epoch in mine] == [list(range(len(Pictures())))] * 2


class PartsLater(OwnGenerator):
    """Every worker draws its own numbers from the second epoch on."""

    epoch = 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        own, label = super().__getitem__(index)
        return own if self.epoch else Pictures.__getitem__(self, index)[0], label


class TellsData(Classifier):
    def __init__(self, data: PartsLater) -> None:
        super().__init__("chain")
        self.data, self.steps = data, 0

    def on_train_epoch_start(self) -> None:
        self.data.epoch = self.current_epoch

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


def part_later(worker: int) -> tuple[int, int]:
    data = PartsLater(worker)
    module = TellsData(data)
    with pytest.raises(WorkersDisagree, match=r"batch 0: .*batch\[0\]"):
        fit_stages(worker, module, CUTS, DataLoader(data, BATCH_SIZE), max_epochs=3)
    return data.epoch, module.steps


def test_batches_that_part_in_the_second_epoch_are_told_at_its_start(found: Found) -> None:
    assert found["a second epoch"] == [(1, 5)] * 2


# ------------------------------------------------------------------ other sizes; last batches: test_auxnet_modules


class TwoSizes(Pictures):
    """The second half of the samples is larger."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return (image if index < 16 else image.repeat(1, 2, 2)), label


def change_size(worker: int) -> str:
    loader = DataLoader(TwoSizes(32), BATCH_SIZE)
    with pytest.raises(ValueError, match="is given") as raised:
        fit_stages(worker, small_module(), CUTS, loader, use_distributed_sampler=False)
    return str(raised.value)


def test_images_of_another_size_in_mid_training_are_refused_by_all(found: Found) -> None:
    for said in found["another size"]:
        assert "is given (3, 16, 16) but was cut for inputs of (3, 8, 8)" in said


# ------------------------------------------------------------------ trainings in the same two processes

IN_TURN: dict[str, Training] = {
    **{loader: (see, (loader,)) for loader in [*LOADERS, "endless"]},
    "stored guesses": (see, ("two loader processes", "al-store")),
    "stored guesses, a random collate function": (see_frozen_collate, ()),
    **{name: (draw_order, order) for name, order in ORDERS.items()},
    **{what: (disagree, (what,)) for what in DIFFERENCES},
    "a generator that is seeded alike": (shuffle_alike, ((5, 5),)),
    "no generator": (shuffle_alike, ((),)),
    "a second epoch": (part_later, ()),
    "another size": (change_size, ()),
}


@pytest.fixture(scope="module")
def found() -> Found:
    """The results of both workers, by training."""
    return run_in_turn(IN_TURN, 2)
