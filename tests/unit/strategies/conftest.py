"""Fixtures for tests before any process starts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest

from resist_lightning.strategies.launching import processes
from tests.helpers.trainers import QUIET


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process fails the test."""

    def refuse(*args: Any, **_: Any) -> None:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(processes, "start_processes", refuse)


@pytest.fixture
def trainer_with() -> Callable[..., L.Trainer]:
    """Makes a quiet Trainer of two CPU workers; nothing has started yet."""

    def make(strategy: Any, **options: Any) -> L.Trainer:
        return L.Trainer(**{**QUIET, "strategy": strategy, "devices": 2, "max_epochs": 1, **options})

    return make
