"""A seed for every worker: draws differ between workers, can be repeated, and continue in a resumed run."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from resist_lightning import AuxNetStrategy
from resist_lightning.callbacks import SeedPerWorker
from tests.helpers.plain import Classifier
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers
from tests.integration.test_exact_resume import Augmented, SavesAt

Draws = list[tuple[float, float, float]]


class Draws3(Classifier):
    """Draws from every generator in every step."""

    def __init__(self) -> None:
        super().__init__("preact", 7)
        self.drawn: Draws = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return super().training_step(batch, batch_idx)


def fit(worker: int, seed: int, ckpt_path: str | None, *callbacks: L.Callback) -> Draws:
    L.seed_everything(1, verbose=False)
    module = Draws3()
    trainer = make_trainer(make_strategy("local_sgd"), max_epochs=1, callbacks=[SeedPerWorker(seed), *callbacks])
    trainer.fit(module, DataLoader(Augmented(), batch_size=4, shuffle=True), ckpt_path=ckpt_path)
    return module.drawn


def draw(worker: int, folder: str) -> list[Draws]:
    unbroken = fit(worker, 5, None, SavesAt(folder, (2,)))
    return [unbroken, fit(worker, 6, None), fit(worker, 6, f"{folder}/2.ckpt")]


def test_every_worker_has_draws_of_its_own_and_goes_on_with_them(tmp_path: Path) -> None:
    ours, theirs = run_trainers(draw, 2, str(tmp_path))
    for unbroken, other_seed, resumed in (ours, theirs):
        assert resumed == unbroken[2:]
        assert all(a != b for a, b in zip(unbroken[0], other_seed[0], strict=True))
    assert all(a != b for a, b in zip(ours[0][0], theirs[0][0], strict=True))


def test_no_seed_below_0_and_none_where_workers_must_draw_alike() -> None:
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        SeedPerWorker(-1)
    trainer: Any = SimpleNamespace(strategy=AuxNetStrategy(), world_size=2)
    with pytest.raises(ValueError, match="SeedPerWorker contradicts AuxNet"):
        SeedPerWorker(1).setup(trainer, L.LightningModule(), "fit")
