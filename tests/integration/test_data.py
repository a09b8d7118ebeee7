"""Loaders that differ between workers, and the workers' parts of the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from resist_lightning import NeuronConfig, WorkersDisagree
from resist_lightning.callbacks import SeedPerWorker
from tests.helpers.plain import Classifier, batch_of, held_out, stream
from tests.helpers.trainers import (
    fit,
    make_strategy,
    make_trainer,
    run_trainers_and_by_hand,
    run_trainers_to_the_end,
    train_by_hand,
)
from tests.helpers.training import assert_equal_states, clone_state

LENGTHS = (7, 5)


def by_trainers(worker: int, folder: str) -> dict[str, Any]:
    same_steps = {"max_steps": 8, "max_epochs": -1}
    return {
        "uneven": fit_uneven(worker),
        "modes": {mode: fit_in_epochs_of_all_lengths(worker, mode) for mode in MODES},
        "unsized": fit_unsized(worker, LENGTHS, folder, same_steps),
        "seen": {data: see(worker, data)[:2] for data in ("shard", "copy")},
        "orders": orders_of_copies(worker),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[Any]]:
    """Each worker's results of all trainings in this file that end well, and of those that are cut by hand."""
    folder = str(tmp_path_factory.mktemp("trained"))
    return run_trainers_and_by_hand(by_trainers, cut_by_hand, 2, folder)


# Loaders of known length: all workers end with the shortest.


CUT: list[tuple[dict[str, Any], int, str]] = [
    ({}, 5, "[7, 5]"),
    ({"limit_train_batches": 0.5}, 2, "[3, 2]"),
    ({"limit_train_batches": 4}, 4, ""),
]
"""Options of the Trainer, the batches of an epoch, and what a warning tells of the loaders."""


def fit_uneven(worker: int) -> list[tuple[int, list[str], dict[str, Tensor]]]:
    found = []
    for options, _, _ in CUT:
        module = Classifier("chain")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            strategy, validation = make_strategy("ist"), held_out(worker)
            trainer = fit(
                worker, module, LENGTHS[worker], strategy, max_epochs=2, val_dataloaders=validation, **options
            )
        told = [str(warning.message) for warning in caught if "batches; every epoch ends" in str(warning.message)]
        found.append((trainer.global_step, told, clone_state(module)))
    return found


def cut_by_hand(worker: int, _: str) -> list[dict[str, Tensor]]:
    found = []
    for _, batches, _ in CUT:
        module = Classifier("chain")
        train_by_hand(worker, module, NeuronConfig(local_steps=3), 2 * batches)
        found.append(clone_state(module))
    return found


def test_epochs_end_for_all_workers_with_the_shortest_loader(trained: Any) -> None:
    results, expected = [found["uneven"] for found in trained[0]], trained[1]

    for (_, batches, told), mine, theirs, state in zip(CUT, *results, expected[0], strict=True):
        for steps, _, found in (mine, theirs):
            assert steps == 2 * batches
            assert_equal_states(found, state, exactly=True)
        assert theirs[1] == []
        assert len(mine[1]) == bool(told)  # no warning where the limit of the Trainer is the shortest
        for each in mine[1]:
            assert f"{told} batches" in each
            assert "Shard the data evenly" in each


EPOCHS = [(6, 6), (3, 5), (9, 8), (20, 9)]
"""Batches of each worker's loaders in three epochs, and in a later `fit`."""


class NewLoaders(L.LightningDataModule):
    """A new loader for each epoch: of batches, or of batches of two loaders."""

    def __init__(self, worker: int, mode: str) -> None:
        super().__init__()
        self.worker, self.mode = worker, mode

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        batches = EPOCHS[self.trainer.current_epoch][self.worker]
        loader = stream(self.worker, batches)
        if self.mode == "one":
            return loader
        other = stream(self.worker, 30 if self.mode == "min_size" else 2)
        return CombinedLoader({"a": loader, "b": other}, self.mode)  # type: ignore[arg-type]


class CountsBatches(Classifier):
    def __init__(self) -> None:
        super().__init__("chain")
        self.batches: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.batches.append(0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches[-1] += 1
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)


MODES = ["one", "max_size_cycle", "max_size", "min_size"]


def fit_in_epochs_of_all_lengths(worker: int, mode: str) -> tuple[list[int], int | float | None]:
    module, data = CountsBatches(), NewLoaders(worker, mode)
    trainer = make_trainer(make_strategy("local_sgd"), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, datamodule=data)
    return module.batches, trainer.limit_train_batches


def test_an_epoch_is_as_long_as_its_own_loaders(trained: Any) -> None:
    assert [found["modes"] for found in trained[0]] == [dict.fromkeys(MODES, ([6, 3, 8, 9], 1.0))] * 2


# Loaders of unknown length: an error on all workers.


class Unsized(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, worker: int, batches: int) -> None:
        self.worker, self.batches = worker, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (batch_of(self.worker, step) for step in range(self.batches))


def fit_unsized(worker: int, lengths: tuple[int, int], folder: str, options: dict[str, Any]) -> dict[str, Tensor]:
    module, options = Classifier("small"), dict(options)
    callbacks = [ModelCheckpoint(folder)] if options.pop("saves", False) else []
    validation = held_out(worker) if options.pop("validates", False) else None
    trainer = make_trainer(
        make_strategy(), **{"max_epochs": 2, **options}, enable_checkpointing=bool(callbacks), callbacks=callbacks
    )
    trainer.fit(module, DataLoader(Unsized(worker, lengths[worker]), batch_size=None), validation)
    return clone_state(module)


def assert_all_raise(folder: Path, options: dict[str, Any]) -> None:
    for outcome in run_trainers_to_the_end(fit_unsized, 2, LENGTHS, str(folder), options, timeout=30):
        assert isinstance(outcome.error, WorkersDisagree), outcome
        assert "ran out of data" in str(outcome.error)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"validates": True, "saves": True}, {"saves": True, "reload_dataloaders_every_n_epochs": 1}],
    ids=["alone", "with validation", "with a checkpoint and new loaders after each epoch"],
)
def test_loaders_of_unknown_length_that_end_apart_stop_all_workers(options: dict[str, Any], tmp_path: Path) -> None:
    """Collectives of ModelCheckpoint and of Lightning's loops must not pair with another worker's sync."""
    assert_all_raise(tmp_path, options)


def test_loaders_of_unknown_length_work_if_all_workers_take_the_same_steps(trained: Any) -> None:
    """The borders of their epochs may differ, as they are not borders of rounds."""
    mine, theirs = (found["unsized"] for found in trained[0])

    assert_equal_states(mine, theirs, exactly=True)


# Parts of the data.

SAMPLES = 24


class Numbered(Dataset[tuple[Tensor, Tensor, int]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        images, labels = batch_of(0, index)
        return images[0], labels[0], index


class Seeing(Classifier):
    """Notes the numbers of the samples that it sees."""

    def __init__(self) -> None:
        super().__init__("chain")
        self.trained: dict[int, list[int]] = {}
        self.validated: dict[int, list[int]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained.setdefault(self.current_epoch, []).extend(batch[2].tolist())
        return super().training_step(batch[:2], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.setdefault(self.current_epoch, []).extend(batch[2].tolist())
        super().validation_step(batch[:2], batch_idx)


def see(
    worker: int, data: str, seed: int = 0, epochs: int = 2, **options: Any
) -> tuple[dict[int, list[int]], dict[int, list[int]], list[str]]:
    """The samples of each epoch's training and validation, and the warnings."""
    L.seed_everything(seed, verbose=False)
    module = Seeing()
    options = {"use_distributed_sampler": True, **options}
    trainer = make_trainer(make_strategy("local_sgd", data=data), max_epochs=epochs, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(Numbered(), 4, shuffle=True), DataLoader(Numbered(), 4))
    return module.trained, module.validated, [str(warning.message) for warning in caught]


def orders_of_copies(worker: int) -> dict[str, tuple[list[int], int]]:
    """The order of the first epoch, and the number of warnings that ``data="copy"`` has no effect."""
    cases: dict[str, dict[str, Any]] = {
        "seed 0": {},
        "seed 1": {"seed": 1},
        "seed 1 again": {"seed": 1},
        "no sampler": {"use_distributed_sampler": False},
        "seeded apart": {"use_distributed_sampler": False, "callbacks": [SeedPerWorker(1)]},
        "overfit": {"overfit_batches": 2},
    }
    found = {}
    for name, options in cases.items():
        trained, _, told = see(worker, "copy", epochs=1, **options)
        found[name] = trained[0], sum("data='copy' has no effect" in text for text in told)
    return found


@pytest.mark.parametrize("data", ["shard", "copy"])
def test_each_worker_sees_its_part_of_the_data_or_all_of_it_in_its_own_order(trained: Any, data: str) -> None:
    everything = list(range(SAMPLES))
    mine, theirs = (found["seen"][data] for found in trained[0])

    for epoch in range(2):
        assert sorted(mine[1][epoch] + theirs[1][epoch]) == everything, "validation is not sharded"
        if data == "shard":
            assert sorted(mine[0][epoch] + theirs[0][epoch]) == everything
        else:
            assert sorted(mine[0][epoch]) == sorted(theirs[0][epoch]) == everything
            different = [mine[0][epoch], theirs[0][epoch], everything]
            assert len({tuple(order) for order in different}) == 3
        assert len(mine[0][epoch]) == len(theirs[0][epoch])
    for orders, _ in (mine, theirs):
        assert orders[0] != orders[1], "the second epoch has the order of the first"


def test_copies_have_an_order_of_the_worker_and_the_seed_or_a_warning_says_why_not(trained: Any) -> None:
    mine, theirs = (found["orders"] for found in trained[0])

    orders = {tuple(each[name][0]) for each in (mine, theirs) for name in ("seed 0", "seed 1", "seeded apart")}
    assert len(orders) == 6
    assert [each["seed 1 again"] for each in (mine, theirs)] == [each["seed 1"] for each in (mine, theirs)]
    for name in ("no sampler", "overfit"):
        assert mine[name][0] == theirs[name][0]
    told = {name: warned for name, (_, warned) in mine.items()}
    assert told == {**dict.fromkeys(mine, 0), "no sampler": 1, "overfit": 1}  # on worker 0 only


def test_a_stream_is_made_for_one_pass() -> None:
    """The tests of epochs rely on this."""
    loader = stream(0, 2)
    seen = [images for _ in range(2) for images, _ in loader]
    assert all(torch.equal(images, batch_of(0, step)[0]) for step, images in enumerate(seen))
    assert len(seen) == 4
