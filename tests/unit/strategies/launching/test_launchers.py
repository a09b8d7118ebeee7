"""A script has the same number of processes to its end; launches are tested in ``tests/integration``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from resist_lightning import ResISTStrategy
from resist_lightning.strategies.launching.guard import PARENT
from resist_lightning.strategies.launching.launchers import ScriptLauncher


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, trainer_with: Any) -> Callable[[int], None]:
    """A new script, in which a Trainer with so many devices begins to launch."""
    monkeypatch.setattr(ScriptLauncher, "_numbers", None)

    def begin(devices: int) -> None:
        trainer_with(ResISTStrategy(), devices=devices).strategy.launcher._check_numbers()
        monkeypatch.setenv("LOCAL_RANK", "0")  # as Lightning does once it has started the processes

    return begin


@pytest.mark.parametrize(("first", "later"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("in_worker", [False, True])
def test_a_later_trainer_of_a_script_with_another_number_of_processes_is_refused(
    first: int, later: int, in_worker: bool, launch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two after one waited for a process that nobody starts; of one after two, the second process had no device."""
    if in_worker:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv(PARENT, str(os.getppid()))
    launch(first)
    launch(first)
    said = rf"Trainer\(devices={later}, num_nodes=1\) would train .* for devices={first}, num_nodes=1\. Give all"
    with pytest.raises(ValueError, match=said):
        launch(later)


def test_processes_that_were_started_by_hand_may_have_any_number(
    launch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch(1)
    launch(2)
