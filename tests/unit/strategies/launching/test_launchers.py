"""A script has the same number of processes to its end; launches are tested in ``tests/integration``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.fabric.utilities.rank_zero
import lightning_utilities.core.rank_zero
import pytest

from resist_lightning import ResISTStrategy
from resist_lightning.strategies.launching.guard import PARENT
from resist_lightning.strategies.launching.launchers import ScriptLauncher


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, trainer_with: Any) -> Callable[[int], None]:
    """A new script, in which a Trainer with so many devices begins to launch."""
    monkeypatch.setattr(ScriptLauncher, "_numbers", None)

    def begin(devices: int) -> None:
        launcher = trainer_with(ResISTStrategy(), devices=devices).strategy.launcher
        launcher._check_numbers()
        if launcher.cluster_environment.local_rank() == 0:
            monkeypatch.setenv("LOCAL_RANK", "0")  # as Lightning does once it has started the processes

    return begin


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(PARENT, str(os.getppid()))
    for module in (lightning.fabric.utilities.rank_zero, lightning_utilities.core.rank_zero):
        monkeypatch.setattr(module.rank_zero_only, "rank", 0)  # a Trainer sets it


def test_more_processes_than_the_first_trainer_of_a_script_has_started_are_refused(
    launch: Callable[[int], None],
) -> None:
    """They were waited for until the timeout."""
    launch(1)
    launch(1)
    said = r"Trainer\(devices=2, num_nodes=1\) does not fit .* rank 0\): .* for devices=1, num_nodes=1\. Give all"
    with pytest.raises(ValueError, match=said):
        launch(2)


@pytest.mark.usefixtures("in_worker")
def test_a_worker_without_a_place_in_a_later_trainer_is_told_so(launch: Callable[[int], None]) -> None:
    """It ended with an IndexError, and worker 0 trained alone."""
    launch(2)
    launch(2)
    with pytest.raises(ValueError, match=r"devices=1, num_nodes=1\) does not fit .* rank 1\): .*is_global_zero"):
        launch(1)


def test_worker_0_may_test_alone(launch: Callable[[int], None]) -> None:
    launch(2)
    launch(1)
    launch(2)


def test_processes_that_were_started_by_hand_may_have_any_number(
    launch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch(1)
    launch(2)
