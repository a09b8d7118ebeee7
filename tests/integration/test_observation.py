"""Validating, saving and logging leave the training bit-identical to a run that does none of it (contract 6)."""

from __future__ import annotations

import random
from typing import Any
from zlib import crc32

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resist_lightning.callbacks import RoundMonitor
from tests.helpers.plain import BATCH_SIZE, Classifier, batch_of
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers
from tests.helpers.training import assert_equal_states, clone_state

BATCHES = 4


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images that are changed at random, with all three global generators."""

    def __init__(self, worker: int, count: int = BATCHES) -> None:
        batches = [batch_of(worker, step) for step in range(count)]
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
    # Both after batches 2 and 4, checkpoints alone after batches 1 and 3.
    "validations and more checkpoints, with loggers": {
        "val_check_interval": 2, "num_sanity_val_steps": 2, "every_n_train_steps": 1, "loggers": True,
    },
}  # fmt: skip
EVERYTHING = {"val_check_interval": 1, "num_sanity_val_steps": 2, "every_n_train_steps": 1, "loggers": True}
"""All of it, after every batch."""


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
    module = Drawing(
        kind="chain" if "face" in fixed.get("strategy", {}) else "small", dropout=0.2, calls=fixed.get("calls", "net")
    )
    validation = DataLoader(Augmented(100 + worker, 2), BATCH_SIZE, shuffle=True)
    trainer.fit(module, DataLoader(Augmented(worker), BATCH_SIZE, shuffle=True), validation)
    return clone_state(module), module.seen


FIXED: dict[str, dict[str, Any]] = {
    "blocks have several holders": {
        "strategy": {"min_blocks": 3, "momentum": "travel", "warmup_rounds": 1, "batch_norm": "batch"}
    },
    # Gradients of a subnet do not fit the full model, and are set aside.
    "neurons are dealt out and gradients accumulate": {
        "accumulate": 4, "strategy": {"face": "ist", "local_steps": 1, "momentum": "travel"},
    },
    # Four batches a step, a step a round: the full model is assembled while gradients accumulate.
    "gradients accumulate": {
        "accumulate": 4, "calls": "self", "strategy": {"local_steps": 1, "batch_norm": "running"},
    },
}  # fmt: skip


def train_all(worker: int, folder: str) -> dict[str, dict[str, Trained]]:
    found = {"": {"unwatched": train(worker, 1, {}, folder, {}), "other seed": train(worker, 2, {}, folder, {})}}
    for name, options in WATCHED.items():
        found[""][name] = train(worker, 1, options, f"{folder}/{name}", {})
    for where, fixed in FIXED.items():
        found[where] = {
            "unwatched": train(worker, 1, {}, folder, fixed),
            "everything": train(worker, 1, EVERYTHING, f"{folder}/{where}", fixed),
        }
    return found


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Trained]]]:
    return run_trainers(train_all, 2, str(tmp_path_factory.mktemp("observation")))


def test_watching_changes_nothing(workers: Any) -> None:
    for trained in (found[""] for found in workers):
        states = {name: state for name, (state, _) in trained.items()}
        unwatched, other = states.pop("unwatched"), states.pop("other seed")
        weights = [name for name, value in unwatched.items() if value.is_floating_point()]
        assert all(not torch.equal(unwatched[name], other[name]) for name in weights), "nothing random was used"
        assert states.keys() == WATCHED.keys()
        for state in states.values():
            assert_equal_states(state, unwatched, exactly=True)


def test_all_see_the_same_model_whatever_else_is_watched(workers: Any) -> None:
    mine, theirs = ({name: seen for name, (_, seen) in found[""].items()} for found in workers)
    assert mine == theirs, "the workers did not see the same full model"
    every_batch = mine["validation after every batch"]
    assert len(every_batch) == 2 * BATCHES
    assert mine["validations and more checkpoints, with loggers"] == every_batch[1::2]


@pytest.mark.parametrize("where", FIXED)
def test_watching_changes_nothing_where(workers: Any, where: str) -> None:
    for trained in (found[where] for found in workers):
        assert_equal_states(trained["everything"][0], trained["unwatched"][0], exactly=True)
    mine, theirs = (found[where]["everything"][1] for found in workers)
    assert mine == theirs, "the workers did not see the same full model"
    assert len(mine) == 2 * BATCHES
