"""Differences between workers' Trainers are reported before the training; NaN in one worker ends all."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from resist_lightning import NotFinite, WorkersDisagree
from tests.helpers.plain import Classifier
from tests.helpers.trainers import fit, make_strategy, run_trainers_to_the_end

ODD = 1


def start(worker: int, how: str) -> None:
    os.environ["PL_GLOBAL_SEED"] = str(worker if how == "seed" else 0)
    odd = worker == ODD
    strategy = make_strategy(seed=int(odd and how == "seed of the partitions"))
    options = {"max_epochs": 2 if odd and how == "max_epochs" else 1, "use_distributed_sampler": True}
    fit(worker, Classifier(optimizer="adamw" if odd and how == "optimizer" else "sgd"), 4, strategy, **options)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("seed", "seed_everything: worker 0 0, worker 1 1"),
        ("seed of the partitions", "seed: worker 0 0, worker 1 1"),
        ("max_epochs", "max_epochs: worker 0 1, worker 1 2"),
        ("optimizer", "optimizer 0: worker 0 SGD, worker 1 AdamW"),
    ],
)
def test_trainers_that_differ_do_not_start(how: str, said: str) -> None:
    for outcome in run_trainers_to_the_end(start, 2, how):
        assert isinstance(outcome.error, WorkersDisagree), outcome.traceback
        assert said in str(outcome.error)


class Spoilt(Classifier):
    """A module whose loss is NaN on worker 1 in the second round."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx == 4 and self.trainer.global_rank == ODD else loss


def go_on(worker: int, policy: str) -> bool:
    module = Spoilt()
    fit(worker, module, 10, make_strategy(non_finite=policy))
    return all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


def test_nan_in_one_worker_ends_all_at_the_next_sync() -> None:
    for outcome in run_trainers_to_the_end(go_on, 2, "raise"):
        assert isinstance(outcome.error, NotFinite), outcome.traceback
        assert f"after local step 3 of round 1: worker {ODD} in " in str(outcome.error)


def test_with_drop_the_training_goes_on_and_ends_with_numbers() -> None:
    assert [outcome.value for outcome in run_trainers_to_the_end(go_on, 2, "drop")] == [True, True]
