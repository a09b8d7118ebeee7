"""Seeded loaders in Lightning's loops: the current epoch reaches the data set in any process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from resist_lightning.strategies.data.seeded_loader import seed_loader
from tests.helpers.trainers import QUIET


class Keying(SingleDeviceStrategy):
    """Seeds loaders like AuxNet's strategy."""

    def process_dataloader(self, dataloader: object) -> object:
        progress: Any = self.lightning_module.trainer.fit_loop.epoch_progress  # type: ignore[union-attr]
        return seed_loader(dataloader, 5, lambda: progress.current.processed)


class Drawn(Dataset[Tensor]):
    """Every sample is a random number beside its index."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, float(torch.rand(())), random.random()], dtype=torch.float64)


class Stream(IterableDataset[Tensor]):
    """The same samples as a stream."""

    def __iter__(self) -> Any:
        return (Drawn()[index] for index in range(6))


class Module(L.LightningModule):
    """Remembers the batches of each epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.options = options
        self.seen: dict[int, list[Any]] = {}

    def train_dataloader(self) -> Any:
        return DataLoader(**{"dataset": Drawn(), "batch_size": 2, **self.options})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch.tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: Module, epochs: int = 3, checkpoint: Path | None = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "strategy": Keying("cpu"), "max_epochs": epochs, **options})
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer


def expected(epoch: int, dataset: Any = None) -> list[Any]:
    """The batches of an epoch, read in order by a loader without processes."""
    loader: Any = seed_loader(DataLoader(dataset or Drawn(), batch_size=2), 5, lambda: epoch)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("reload", [0, 1])
@pytest.mark.parametrize("processes", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_each_epoch_of_a_fit_has_its_own_numbers(processes: dict[str, Any], reload: int) -> None:
    module = Module(**processes)

    fit(module, reload_dataloaders_every_n_epochs=reload)

    assert module.seen == {epoch: expected(epoch) for epoch in range(3)}


@pytest.mark.parametrize("processes", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_epochs_that_end_early_do_not_disturb_the_next(processes: dict[str, Any]) -> None:
    module = Module(**processes)

    fit(module, limit_train_batches=1)

    assert module.seen == {epoch: expected(epoch)[:1] for epoch in range(3)}


@pytest.mark.parametrize("processes", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_streams_have_the_numbers_of_the_epoch_also_where_lightning_fetches_ahead(processes: dict[str, Any]) -> None:
    module = Module(dataset=Stream(), **processes)

    fit(module)

    assert module.seen == {epoch: expected(epoch, Stream()) for epoch in range(3)}


def test_a_resumed_fit_goes_on_with_the_epoch_that_it_is_in(tmp_path: Path) -> None:
    fit(Module(), epochs=2).save_checkpoint(tmp_path / "two")
    module = Module()

    fit(module, checkpoint=tmp_path / "two")

    assert module.seen == {2: expected(2)}


def test_a_shorter_loader_that_begins_again_repeats_its_numbers() -> None:
    class Two(Module):
        def train_dataloader(self) -> Any:
            return CombinedLoader([super().train_dataloader(), DataLoader(range(12), batch_size=2)], "max_size_cycle")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[0], batch_idx)

    module = Two()
    fit(module, epochs=2)

    assert module.seen == {epoch: expected(epoch) * 2 for epoch in range(2)}
