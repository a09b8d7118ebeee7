"""Resuming with what Lightning or a data set does by itself; one worker shows it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from tests.helpers.plain import CLASSES, Classifier
from tests.helpers.trainers import make_strategy, make_trainer
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import Augmented, SavesAt

STOP = 3


class Tunable(Classifier):
    lr = 0.05

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def test_a_resumed_run_keeps_the_learning_rate_that_was_found(tmp_path: Path) -> None:
    def fit(ckpt_path: str | None, *callbacks: L.Callback) -> tuple[dict[str, Tensor], int, float]:
        L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
        module = Tunable("preact", 7)
        finder = LearningRateFinder(num_training_steps=16, early_stop_threshold=None)
        trainer = make_trainer(
            make_strategy("local_sgd"), max_epochs=1, callbacks=[finder, *callbacks], default_root_dir=tmp_path
        )
        trainer.fit(
            module, DataLoader(ConcatDataset([Augmented()] * 3), batch_size=4, shuffle=True), ckpt_path=ckpt_path
        )
        return clone_state(module), trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]

    unbroken, steps, found = fit(None, SavesAt(str(tmp_path), (STOP,)))
    resumed, resumed_steps, rate = fit(f"{tmp_path}/{STOP}.ckpt")

    assert found != Tunable.lr
    assert (resumed_steps, rate) == (steps, found)
    assert_equal_states(resumed, unbroken, exactly=True)


class Shuffled(IterableDataset[tuple[Tensor, Tensor]]):
    """Draws from a buffer by torch's global generator, or by a generator of its own."""

    def __init__(self, own: bool) -> None:
        self.own = own

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left, generator = list(range(8)), random.Random(1)
        while left:
            place = generator.randrange(len(left)) if self.own else int(torch.randint(len(left), ()))
            number = left.pop(place)
            yield torch.full((4, 3, 8, 8), number / 8), torch.full((4,), number % CLASSES)


class Dropping(Classifier):
    def __init__(self) -> None:
        super().__init__("preact", 7)
        self.drop = nn.Dropout(0.5)
        self.seen: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(float(batch[0].flatten()[0]))
        return super().training_step((self.drop(batch[0]), batch[1]), batch_idx)


@pytest.mark.parametrize("own", [True, False])
def test_a_data_set_that_draws_beside_dropout_is_named_where_it_may_go_on_otherwise(own: bool, tmp_path: Path) -> None:
    def fit(ckpt_path: str | None, *callbacks: L.Callback) -> list[float]:
        L.seed_everything(1, verbose=False)
        module = Dropping()
        trainer = make_trainer(make_strategy("local_sgd"), max_epochs=1, callbacks=[*callbacks])
        trainer.fit(module, DataLoader(Shuffled(own), batch_size=None), ckpt_path=ckpt_path)
        return module.seen

    unbroken = fit(None, SavesAt(str(tmp_path), (STOP,)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = fit(f"{tmp_path}/{STOP}.ckpt")

    assert any("iterable data set draws" in str(warning.message) for warning in caught) is not own
    assert (resumed == unbroken[STOP:]) is own
