"""A run that resumes from a checkpoint of any step equals the uninterrupted run, bit for bit (contract 7)."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from resist_lightning import QSR, PostLocal
from tests.helpers.plain import CLASSES, held_out
from tests.helpers.small import Small
from tests.helpers.trainers import (
    make_strategy,
    make_trainer,
    run_cases,
    run_trainers,
    run_trainers_to_the_end,
)
from tests.helpers.training import assert_equal_states, clone_state

BATCHES = 5  # in an epoch; rounds of three steps may end anywhere in it
EPOCHS = 2


@dataclass(frozen=True)
class Case:
    """A run, and the batches after which it is stopped."""

    workers: int
    face: str
    options: dict[str, Any]
    optimizer: str
    loader: str
    accumulate: int
    stops: tuple[int, ...]
    early: bool = False
    """Whether ``configure_optimizers`` reads the number of steps, which creates the loaders and their iterator."""


FIRST = {"evaluate_on": "first"}  # worker 0 alone has the full model of a checkpoint
CASES = {
    "alone": Case(
        1, "resist", {"momentum": "keep", "batch_norm": "running", "min_blocks": 3, "local_steps": QSR(2, 0.08),
                      "fragments": 2}, "sgd", "shuffled", 1, (5,),
    ),
    "local SGD": Case(  # stopped between the border of a sync and its end
        2, "local_sgd", {"momentum": "reset", "wire": "bf16", "outer": "nesterov", "overlap": 2, "fragments": 2},
        "sgd", "shuffled", 1, (7,), early=True,
    ),
    "local SGD, int2": Case(
        3, "local_sgd", {"momentum": "keep", "wire": "int2", "local_steps": QSR(2, 0.08), "outer": "nesterov",
                         "fragments": 2, **FIRST}, "sgd", "endless", 1, (3,),
    ),
    "momentum stays": Case(  # stopped between the border of a sync and its end
        2, "resist", {"momentum": "keep", "wire": "bf16", "batch_norm": "recalibrate", "outer": "nesterov",
                      "overlap": 2, "finish_rounds": 1}, "adamw", "shuffled", 1, (4,), early=True,
    ),
    "momentum restarts": Case(
        2, "resist", {"momentum": "reset", "batch_norm": "recalibrate", "min_blocks": 3, "outer": "nesterov",
                      "local_steps": QSR(2, 0.015), "fragments": 2}, "adamw", "endless", 2, (6,), early=True,
    ),
    "momentum restarts, int2": Case(
        2, "resist", {"momentum": "reset", "wire": "int2", "batch_norm": "running", "warmup_rounds": 1,
                      "local_steps": PostLocal(1, 4, 3), **FIRST}, "adamw", "endless", 1, (6,), early=True,
    ),
    "momentum travels": Case(
        2, "resist", {"momentum": "travel", "batch_norm": "running", "min_blocks": 3, "outer": "nesterov",
                      "fragments": 2, **FIRST}, "adamw", "endless", 2, (8,), early=True,
    ),
    "momentum travels, bf16": Case(  # stopped before the first step, too
        3, "resist", {"momentum": "travel", "wire": "bf16", "batch_norm": "running", "min_blocks": 3,
                      "fragments": 2, **FIRST}, "sgd", "endless", 2, (1, 6), early=True,
    ),
    "momentum travels, int2": Case(
        2, "resist", {"momentum": "travel", "wire": "int2", "batch_norm": "recalibrate", "warmup_rounds": 1,
                      "finish_rounds": 1}, "adamw", "shuffled", 2, (4,), early=True,
    ),
}  # fmt: skip
"""One to three workers, each policy of momentum with each compression, and each value of the other options."""


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images with noise from every generator that a user's transforms may use."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.full((3, 8, 8), float(index % CLASSES))
        return image + torch.randn(3, 8, 8) + float(np.random.rand()) + random.random(), index % CLASSES


class Endless(IterableDataset[tuple[Tensor, int]]):
    """The same, of unknown length: Lightning fetches one batch ahead."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        data = Augmented()
        for index in torch.randperm(len(data)).tolist():
            yield data[index]


class Noisy(Small):
    """With dropout and a schedule."""

    def __init__(self, optimizer: str = "sgd", seed: int = 7, face: str = "resist", early: bool = False) -> None:
        super().__init__(face, seed)
        self.optimizer = optimizer
        self.early = early
        self.dropout = nn.Dropout(0.2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((self.dropout(batch[0]), batch[1]), batch_idx)

    def configure_optimizers(self) -> Any:
        if self.early:
            assert self.trainer.estimated_stepping_batches
        if self.optimizer == "adamw":
            optimizer: Any = torch.optim.AdamW(self.parameters(), lr=1e-2)
        else:
            optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["lr"] = np.float64(group["lr"])  # as one of `np.logspace`, which no checkpoint may have
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SavesAt(L.Callback):
    def __init__(self, folder: str, batches: tuple[int, ...]) -> None:
        self.folder, self.batches, self.seen = folder, batches, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen in self.batches:
            trainer.save_checkpoint(f"{self.folder}/{self.seen}.ckpt")


def loader_of(worker: int, kind: str, loader_workers: int = 0) -> DataLoader[Any]:
    if kind == "endless":
        return DataLoader(Endless(), batch_size=4, num_workers=loader_workers)
    return DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=loader_workers)


def fit(worker: int, case: Case, ckpt_path: str | None, callbacks: list[L.Callback], **more: Any) -> Noisy:
    L.seed_everything(1000 + worker if ckpt_path is None else 77, verbose=False)
    module = Noisy(case.optimizer, 7 if ckpt_path is None else 8, case.face, case.early)
    trainer = make_trainer(
        make_strategy(case.face, **case.options),
        max_epochs=EPOCHS,
        callbacks=callbacks,
        accumulate_grad_batches=case.accumulate,
        **more,
    )
    trainer.fit(module, loader_of(worker, case.loader), ckpt_path=ckpt_path)
    return module


def unbroken_and_resumed(worker: int, case: Case, folder: str) -> list[dict[str, Tensor]]:
    states = [clone_state(fit(worker, case, None, [SavesAt(folder, case.stops)]))]
    return states + [clone_state(fit(worker, case, f"{folder}/{stop}.ckpt", [])) for stop in case.stops]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict[str, Tensor]]]]:
    return run_cases(unbroken_and_resumed, CASES, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_after_any_batch_is_the_unbroken_run(name: str, trained: dict[str, Any]) -> None:
    assert len(trained[name]) == CASES[name].workers
    for unbroken, *resumed in trained[name]:
        assert len(resumed) == len(CASES[name].stops)
        for state in resumed:
            assert_equal_states(state, unbroken, exactly=True)


# Places where a run is stopped, and kinds of loaders.


class Counts(DataLoader[Any]):
    """A loader with a state dict of its position, like torchdata's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.given = self.skipped = 0

    def __iter__(self) -> Any:
        skipped, self.skipped = self.skipped, 0
        self.given = skipped
        with torch.random.fork_rng(devices=[]):
            order = torch.randperm(4 * BATCHES, generator=torch.Generator().manual_seed(5)).tolist()
        for start in range(skipped * 4, len(order), 4):
            self.given += 1
            images, labels = zip(*(self.dataset[i] for i in order[start : start + 4]), strict=True)
            yield torch.stack(images), torch.tensor(labels)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["given"]


@dataclass(frozen=True)
class Kind:
    """A kind of loaders, of modules or of validation, on two workers; its checkpoints, from which it resumes."""

    name: str
    checkpoints: tuple[str, ...]
    workers: int = 2


KINDS = (
    Kind("two loaders", ("4", "7")),
    Kind("validation", ("before-3", "after-8")),
    Kind("processes", ("7",)),
    Kind("persistent", ("4",)),  # in a later epoch the random state of the processes is lost
    Kind("stateful, plateau", ("7",)),
    Kind("own generator, follows a loss", ("6",)),  # with gradients of two batches
    Kind("new loaders", ("7",)),
)


def fit_kind(worker: int, kind: str, folder: str | None, ckpt_path: str | None = None) -> dict[str, Tensor]:
    """Train a kind; with a folder, save to it."""
    L.seed_everything(1000 + worker if ckpt_path is None else 77, verbose=False)
    made: Any = MODULES.get(kind, Noisy)
    module = made(seed=7 if ckpt_path is None else 8)
    loader: Any = loader_of(worker, "shuffled", int(kind == "processes"))
    if kind == "stateful, plateau":
        loader = Counts(Augmented(), batch_size=4)
    elif kind == "two loaders":
        short = DataLoader(Subset(Augmented(), range(12)), batch_size=4, shuffle=True)
        loader = CombinedLoader([loader, short], "max_size_cycle")
    elif kind == "persistent":
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
    elif kind == "own generator, follows a loss":
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
    renews = {"reload_dataloaders_every_n_epochs": 2} if kind == "new loaders" else {}
    validates = {"val_check_interval": 3} if kind == "validation" else {}
    callbacks = [] if folder is None else saving_for(kind, folder)
    trainer = make_trainer(
        make_strategy(),
        max_epochs=EPOCHS + bool(renews),
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(saving, ModelCheckpoint) for saving in callbacks),
        **validates,
        **renews,
    )
    validation = held_out(worker) if validates or kind == "stateful, plateau" else None
    trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    return clone_state(module)


def saving_for(kind: str, folder: str) -> list[L.Callback]:
    if kind != "validation":
        return [SavesAt(folder, (4, 6, 7))]
    options: dict[str, Any] = {"auto_insert_metric_name": False, "save_top_k": -1}
    return [
        ModelCheckpoint(folder, filename="before-{step}", every_n_train_steps=3, **options),
        ModelCheckpoint(folder, filename="after-{step}", monitor="val/loss", **options),
    ]


def train_kind(worker: int, kind: Kind, folder: str) -> list[dict[str, Tensor]]:
    unbroken = fit_kind(worker, kind.name, folder)
    return [unbroken] + [fit_kind(worker, kind.name, None, f"{folder}/{name}.ckpt") for name in kind.checkpoints]


class Terminates(L.Callback):
    """SIGTERM to one worker after a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and args[-1] == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


def fit_with_validation(worker: int, ckpt_path: str | None, folder: str | None) -> dict[str, Tensor]:
    """In the validation after batch 2 all learn of a signal; half a step's gradients are there, and no sync is due."""
    L.seed_everything(1000 + worker if ckpt_path is None else 77, verbose=False)
    module = Noisy(seed=7 if ckpt_path is None else 8)
    callbacks = [] if folder is None else [Terminates(2), OnExceptionCheckpoint(folder)]
    trainer = make_trainer(
        make_strategy(local_steps=1),
        max_epochs=EPOCHS,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        accumulate_grad_batches=2,
        val_check_interval=3,
    )
    trainer.fit(module, Counts(Augmented(), batch_size=4), held_out(worker), ckpt_path=ckpt_path)
    return clone_state(module)


def unbroken_and_resumed_with_validation(worker: int, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return fit_with_validation(worker, None, None), fit_with_validation(worker, path, None)


def test_a_run_that_a_signal_stops_in_a_validation_resumes_with_its_gradients_and_its_place(tmp_path: Path) -> None:
    stopped = run_trainers_to_the_end(fit_with_validation, 2, None, str(tmp_path), timeout=60)

    assert [type(outcome.error) for outcome in stopped] == [SIGTERMException] * 2
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 3
    for unbroken, resumed in run_trainers(unbroken_and_resumed_with_validation, 2, str(tmp_path / "on_exception.ckpt")):
        assert_equal_states(resumed, unbroken, exactly=True)


class FollowsALoss(Noisy):
    """Steps by hand, on the gradients of two batches; each worker lowers its learning rate by a loss of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        schedule: Any = self.lr_schedulers()
        schedule.step(float(batch_idx * (2 * self.global_rank - 1)))  # falls on worker 0, rises on worker 1
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()["optimizer"]
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2),
        }


class FollowsTheValidation(Noisy):
    """Lowers its learning rate at the end of every epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()["optimizer"]
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        schedule.best = 0.0  # better than any loss
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


class OfTwoLoaders(Noisy):
    """With two loaders, of which the shorter one restarts again and again, in a new order each time."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx) + super().training_step(batch[1], batch_idx)


class Iterates(Noisy):
    """Reads a batch before the training: with persistent processes, by the training's own iterator."""

    def on_fit_start(self) -> None:
        self.trainer.fit_loop.setup_data()
        assert len(self.trainer.train_dataloader) == BATCHES
        next(iter(self.trainer.train_dataloader))


MODULES = {
    "own generator, follows a loss": FollowsALoss,
    "stateful, plateau": FollowsTheValidation,
    "two loaders": OfTwoLoaders,
    "persistent": Iterates,
}


@pytest.fixture(scope="module")
def trained_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict[str, Tensor]]]]:
    return run_cases(train_kind, {kind.name: kind for kind in KINDS}, tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_so_it_is_from_validation_and_with_loaders_of_other_kinds(kind: Kind, trained_kinds: dict[str, Any]) -> None:
    assert len(trained_kinds[kind.name]) == 2
    for unbroken, *resumed in trained_kinds[kind.name]:
        assert len(resumed) == len(kind.checkpoints)
        for state in resumed:
            assert_equal_states(state, unbroken, exactly=True)
