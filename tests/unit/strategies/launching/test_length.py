"""The length of a training in local steps: all of it, and what is left of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from resist_lightning.strategies.launching.length import steps_left, total_steps
from tests.helpers.threads import ThreadCollective, run_threads


def steps_of(collective: ThreadCollective, estimates: list[float]) -> int | None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=estimates[collective.worker])
    return total_steps(trainer, collective)


@pytest.mark.parametrize(
    ("estimates", "steps"), [([80, 80], 80), ([80, 76], 76), ([80, float("inf")], None), ([80, -1], None), ([0, 80], 0)]
)
def test_a_run_has_as_many_steps_as_its_shortest_worker(estimates: list[float], steps: int | None) -> None:
    assert run_threads(steps_of, 2, estimates)[0] == [steps, steps]


def left_of(collective: ThreadCollective, options: dict[str, Any]) -> int | None:
    usual = {"max_epochs": 4, "max_steps": -1, "current_epoch": 1, "global_step": 20, "batches": (20, 21)}
    usual |= {"accumulate_grad_batches": 1, "processed": 0, "last": False, "restarting": True, **options}
    progress = SimpleNamespace(current=SimpleNamespace(processed=usual["processed"]), is_last_batch=usual["last"])
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress), restarting=usual["restarting"])
    trainer: Any = SimpleNamespace(**usual, fit_loop=loop, num_training_batches=usual["batches"][collective.worker])
    return steps_left(trainer, collective)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"current_epoch": 0, "global_step": 0}, 80),
        ({}, 60),
        ({"processed": 7}, 53),
        ({"processed": 20, "last": True}, 60),  # the epoch has ended
        ({"processed": 7, "restarting": False}, 60),  # another `fit`, which begins with a new epoch
        ({"processed": 7, "accumulate_grad_batches": 3}, 19),  # epochs of 7, of which 2 are taken
        ({"current_epoch": 5}, 0),
        ({"max_steps": 50}, 30),
        ({"max_steps": 90}, 60),
        ({"max_steps": 50, "max_epochs": -1}, 30),
        ({"max_steps": 50, "batches": (float("inf"), float("inf"))}, 30),
        ({"batches": (float("inf"), float("inf"))}, None),
    ],
)
def test_what_is_left_is_counted_in_epochs_of_this_training_or_up_to_max_steps(
    options: dict[str, Any], left: int | None
) -> None:
    assert run_threads(left_of, 2, options)[0] == [left, left]
