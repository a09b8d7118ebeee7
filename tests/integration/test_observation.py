"""Validating, saving and logging leave the training bit-identical to a run that does none of it (contract 6)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resist_lightning.callbacks import RoundMonitor
from tests.helpers.plain import BATCH_SIZE, Classifier, batch_of
from tests.helpers.trainers import kind_for, make_strategy, make_trainer, run_trainers
from tests.helpers.training import assert_equal_states, clone_state

BATCHES = 4


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images that are changed at random, with all three global generators."""

    def __init__(self, worker: int) -> None:
        batches = [batch_of(worker, step) for step in range(BATCHES)]
        self.images = torch.cat([images for images, _ in batches])
        self.labels = torch.cat([labels for _, labels in batches])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index] * (0.5 + random.random()) + float(np.random.rand())
        return image + torch.randn(image.shape) / 10, self.labels[index]


class Drawing(Classifier):
    """Draws random numbers in validation, too, and notes a checksum of the validated model."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[int] = []

    def on_validation_start(self) -> None:
        self.draw()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.draw()
        super().validation_step(batch, batch_idx)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.seen.append(crc32(b"".join(tensor.numpy().tobytes() for tensor in self.state_dict().values())))

    def draw(self) -> None:
        torch.rand(1)
        random.random()
        np.random.rand()


WATCHED: dict[str, dict[str, Any]] = {
    "validation after every batch": {"val_check_interval": 1},
    "validation in the middle of rounds, and before": {"val_check_interval": 2, "num_sanity_val_steps": 2},
    "checkpoints": {"every_n_train_steps": 1},
    "all of it, with loggers": {"val_check_interval": 2, "every_n_train_steps": 2, "loggers": True},
}


Trained = tuple[dict[str, Tensor], list[int]]


def train(worker: int, seed: int, options: dict[str, Any], folder: str, fixed: dict[str, Any]) -> Trained:
    options = dict(options)
    saves = options.pop("every_n_train_steps", None)
    callbacks: list[L.Callback] = [RoundMonitor()] if options.get("loggers") else []
    if saves:
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=saves, save_top_k=-1))
    trainer = make_trainer(
        make_strategy(**fixed.get("strategy", {})),
        max_epochs=2,
        callbacks=callbacks,
        enable_checkpointing=bool(saves),
        logger=CSVLogger(folder, flush_logs_every_n_steps=1) if options.pop("loggers", False) else False,
        limit_val_batches=1.0 if "val_check_interval" in options else 0,
        log_every_n_steps=1,
        accumulate_grad_batches=fixed.get("accumulate", 1),
        default_root_dir=folder,
        **options,
    )
    L.seed_everything(seed + worker, verbose=False)
    module = Drawing(kind=kind_for(**fixed.get("strategy", {})), dropout=0.2, calls=fixed.get("calls", "net"))
    validation = DataLoader(Augmented(100 + worker), BATCH_SIZE, shuffle=True)
    trainer.fit(module, DataLoader(Augmented(worker), BATCH_SIZE, shuffle=True), validation)
    return clone_state(module), module.seen


BUSIEST = ("validation after every batch", "all of it, with loggers")


def train_all(worker: int, folder: str, fixed: dict[str, Any], watched: Sequence[str]) -> dict[str, Trained]:
    states = {"unwatched": train(worker, 1, {}, folder, fixed), "other seed": train(worker, 2, {}, folder, fixed)}
    for name in watched:
        states[name] = train(worker, 1, WATCHED[name], f"{folder}/{name}", fixed)
    return states


def assert_unchanged(results: list[dict[str, Trained]]) -> None:
    for trained in results:
        states = {name: state for name, (state, _) in trained.items()}
        unwatched, other = states.pop("unwatched"), states.pop("other seed")
        weights = [name for name, value in unwatched.items() if value.is_floating_point()]
        assert all(not torch.equal(unwatched[name], other[name]) for name in weights), "nothing random was used"
        assert states.keys() >= set(BUSIEST)
        for state in states.values():
            assert_equal_states(state, unwatched, exactly=True)


def assert_same_model_seen(results: list[dict[str, Trained]]) -> None:
    mine, theirs = ({name: seen for name, (_, seen) in trained.items()} for trained in results)
    assert mine == theirs, "the workers did not see the same full model"
    every_batch = mine["validation after every batch"]
    assert len(every_batch) == 2 * BATCHES
    assert mine["all of it, with loggers"] == every_batch[1::2]


def test_watching_changes_nothing(tmp_path: Path) -> None:
    results = run_trainers(train_all, 2, str(tmp_path), {}, list(WATCHED))

    assert_unchanged(results)
    assert_same_model_seen(results)


def test_watching_changes_nothing_where_blocks_have_several_holders(tmp_path: Path) -> None:
    fixed = {"strategy": {"min_blocks": 3, "momentum": "travel", "warmup_rounds": 1, "batch_norm": "batch"}}
    results = run_trainers(train_all, 2, str(tmp_path), fixed, BUSIEST)

    assert_unchanged(results)
    assert_same_model_seen(results)


def test_watching_changes_nothing_where_neurons_are_dealt_out_and_gradients_accumulate(tmp_path: Path) -> None:
    """Gradients of a subnet do not fit the full model, and are set aside."""
    fixed = {"accumulate": 4, "strategy": {"face": "ist", "local_steps": 1, "momentum": "travel"}}
    results = run_trainers(train_all, 2, str(tmp_path), fixed, BUSIEST)

    assert_unchanged(results)
    assert_same_model_seen(results)


def test_watching_changes_nothing_while_gradients_accumulate(tmp_path: Path) -> None:
    """Four batches a step, a step a round: the full model is assembled while gradients accumulate."""
    fixed = {"accumulate": 4, "calls": "self", "strategy": {"local_steps": 1, "batch_norm": "running"}}
    results = run_trainers(train_all, 2, str(tmp_path), fixed, BUSIEST)

    assert_unchanged(results)
    assert_same_model_seen(results)
