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
from tests.helpers.plain import CLASSES, Classifier, held_out
from tests.helpers.trainers import (
    kind_for,
    make_strategy,
    make_trainer,
    run_cases,
    run_trainers,
    run_trainers_to_the_end,
)
from tests.helpers.training import assert_equal_states, clone_state

BATCHES = 5  # in an epoch; rounds of three steps may end anywhere in it
EPOCHS = 2
STOPS_PER_CASE = 2
CASES = (4, 17, 33, 38, 97, 117, 125, 155, 169)
"""Seeds of the drawn cases: one to four workers, each value of each option, and each pair that shares code."""
OPTIONS: dict[str, list[Any]] = {
    "momentum": ["reset", "keep", "travel"],
    "wire": ["fp32", "bf16", "int2"],
    "batch_norm": ["recalibrate", "running"],
    "min_blocks": [1, 3],
    "warmup_rounds": [0, 1],
}
LOCAL_STEPS = [3, QSR(2, 0.08), 3, PostLocal(1, 4, 3)]
"""Lengths of rounds, by the number of the case."""


@dataclass(frozen=True)
class Case:
    """A run, and the steps after which it is stopped."""

    workers: int
    face: str
    options: dict[str, Any]
    optimizer: str
    loader: str
    accumulate: int
    stops: tuple[int, ...]
    early: bool = False
    """Whether ``configure_optimizers`` reads the number of steps, which creates the loaders and their iterator."""


def draw_case(number: int) -> Case:
    drawn = random.Random(number)
    face = drawn.choice(["resist", "resist", "resist", "local_sgd"])
    options = {name: drawn.choice(values) for name, values in OPTIONS.items()}
    if face == "local_sgd":
        options = {"momentum": drawn.choice(["reset", "keep"]), "wire": options["wire"]}
    options["local_steps"] = LOCAL_STEPS[number // 4 % len(LOCAL_STEPS)]
    accumulate = drawn.choice([1, 1, 2])
    batches = EPOCHS * BATCHES
    case = Case(
        workers=1 + number % 4,
        face=face,
        options=options,
        optimizer=drawn.choice(["sgd", "adamw"]),
        loader=drawn.choice(["shuffled", "shuffled", "endless"]),
        accumulate=accumulate,
        stops=tuple(sorted(drawn.sample(range(1, batches), STOPS_PER_CASE))),
        early=number % 2 == 1,
    )
    options["outer"] = drawn.choice(["none", "nesterov"])
    if options["local_steps"] == 3 and options["momentum"] != "travel":
        options["overlap"] = 2  # a stop may then fall between the border of a sync and its end
    if face == "local_sgd" or options["min_blocks"] == 3:
        options["fragments"] = 2
    if face == "resist" and case.loader == "shuffled" and not isinstance(options["local_steps"], QSR):
        options["finish_rounds"] = 1
    if number % 5 in (0, 3):  # cases of two, three and four workers
        options["evaluate_on"] = "first"  # worker 0 alone has the full model of a checkpoint
    return case


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


class Noisy(Classifier):
    """With dropout and a schedule."""

    def __init__(self, optimizer: str = "sgd", seed: int = 7, kind: str = "preact", early: bool = False) -> None:
        super().__init__(kind, seed)
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
    module = Noisy(case.optimizer, 7 if ckpt_path is None else 8, kind_for(case.face), case.early)
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
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, Tensor]]]]:
    cases = {number: draw_case(number) for number in CASES}
    return run_cases(unbroken_and_resumed, cases, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("number", CASES)
def test_a_run_resumed_after_any_batch_is_the_unbroken_run(number: int, trained: dict[int, Any]) -> None:
    assert len(trained[number]) == draw_case(number).workers
    for unbroken, *resumed in trained[number]:
        assert len(resumed) == STOPS_PER_CASE
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


def fit_loader(worker: int, kind: str, ckpt_path: str | None, callbacks: list[L.Callback]) -> dict[str, Tensor]:
    L.seed_everything(1000 + worker if ckpt_path is None else 77, verbose=False)
    made: Any = MODULES.get(kind, Noisy)
    module = made(seed=7 if ckpt_path is None else 8)
    loader: Any = loader_of(worker, "shuffled", int(kind == "processes"))
    if kind == "stateful":
        loader = Counts(Augmented(), batch_size=4)
    elif kind == "two loaders":
        short = DataLoader(Subset(Augmented(), range(12)), batch_size=4, shuffle=True)
        loader = CombinedLoader([loader, short], "max_size_cycle")
    elif kind == "persistent":
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
    elif kind == "own generator":
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
    renews = {"reload_dataloaders_every_n_epochs": 2} if kind == "new loaders" else {}
    validates = {"val_check_interval": 3} if "validation" in kind else {}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)  # else Lightning adds one of its own
    trainer = make_trainer(
        make_strategy(),
        max_epochs=EPOCHS + bool(renews),
        callbacks=callbacks,
        enable_checkpointing=saves,
        **validates,
        **renews,
    )
    validation = held_out(worker) if validates or kind == "plateau" else None
    trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    return clone_state(module)


def unbroken_and_resumed_loader(worker: int, kind: str, folder: str) -> list[dict[str, Tensor]]:
    saving: L.Callback = SavesAt(folder, (4, 7))
    if kind == "validation":
        saving = ModelCheckpoint(folder, filename="{step}", monitor="val/loss", save_top_k=-1)
    if kind == "just before validation":
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    states = [fit_loader(worker, kind, None, [saving])]
    names = ["4", "7"]
    if kind == "validation":
        names = [f"step={step}" for step in (3, 8)]
    elif kind == "just before validation":
        names = [f"step={step}" for step in (3, 6)]
    names = names[:1] if kind == "persistent" else names  # in a later epoch the random state of the processes is lost
    return states + [fit_loader(worker, kind, f"{folder}/{name}.ckpt", []) for name in names]


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


def test_a_run_that_a_signal_stops_in_a_validation_resumes_with_its_gradients_and_its_place(tmp_path: Path) -> None:
    stopped = run_trainers_to_the_end(fit_with_validation, 2, None, str(tmp_path), timeout=60)

    assert [type(outcome.error) for outcome in stopped] == [SIGTERMException] * 2
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 3
    unbroken = run_trainers(fit_with_validation, 2, None, None)
    resumed = run_trainers(fit_with_validation, 2, str(tmp_path / "on_exception.ckpt"), None)
    for state, expected in zip(resumed, unbroken, strict=True):
        assert_equal_states(state, expected, exactly=True)


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
    "follows a loss": FollowsALoss,
    "plateau": FollowsTheValidation,
    "two loaders": OfTwoLoaders,
    "persistent": Iterates,
}
KINDS = (
    "two loaders",
    "validation",
    "just before validation",
    "processes",
    "stateful",
    "persistent",
    "own generator",
    "new loaders",
    "follows a loss",
    "plateau",
)


@dataclass(frozen=True)
class Kind:
    """A kind of loaders and validation, on two workers."""

    name: str
    workers: int = 2


def train_kind(worker: int, kind: Kind, folder: str) -> list[dict[str, Tensor]]:
    return unbroken_and_resumed_loader(worker, kind.name, folder)


@pytest.fixture(scope="module")
def trained_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict[str, Tensor]]]]:
    return run_cases(train_kind, {name: Kind(name) for name in KINDS}, tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize("kind", KINDS)
def test_so_it_is_from_validation_and_with_loaders_of_other_kinds(kind: str, trained_kinds: dict[str, Any]) -> None:
    assert len(trained_kinds[kind]) == 2
    for unbroken, *resumed in trained_kinds[kind]:
        assert resumed
        for state in resumed:
            assert_equal_states(state, unbroken, exactly=True)
