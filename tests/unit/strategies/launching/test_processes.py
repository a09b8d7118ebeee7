from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from resist_lightning.strategies.launching import processes
from resist_lightning.strategies.launching.processes import _start_method_of_python, wait_for
from resist_lightning.strategies.launching.stopping import Forwarder


@pytest.fixture
def in_a_process_of_joblib() -> Iterator[None]:
    importlib.import_module("joblib.externals.loky")  # registers the method
    usual = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("loky", force=True)
    yield
    multiprocessing.set_start_method(usual, force=True)


@pytest.mark.usefixtures("in_a_process_of_joblib")
def test_workers_are_told_a_start_method_that_python_knows() -> None:
    """Under Hydra's launcher by joblib, spawned workers ended with "cannot find context for 'loky'"."""
    with _start_method_of_python("spawn"):
        assert spawn.get_preparation_data("worker")["start_method"] == "spawn"
    assert multiprocessing.get_start_method() == "loky"


def test_a_known_start_method_stays() -> None:
    usual = multiprocessing.get_start_method(allow_none=True)
    with _start_method_of_python("spawn"):
        assert multiprocessing.get_start_method(allow_none=True) == usual


def end(number: int, code: int, seconds: float, folder: Path) -> None:
    """Worker 1 ends at once; worker 0 saves first, and has been stopped by SIGTERM."""
    if number == 1:
        sys.exit(code)
    time.sleep(seconds)
    (folder / "saved").touch()
    sys.exit(128 + signal.SIGTERM)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ENDING_SECONDS", 0.1)
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.05)


def wait_for_two(folder: Path, *, code: int, seconds: float, limit: float, received: int = 0) -> None:
    workers: Any = start_processes(end, (code, seconds, folder), nprocs=2, start_method="fork", join=False)
    forwarder = Forwarder(lambda _: None, limit)
    try:
        with forwarder.waiting(None):
            if received:
                os.kill(os.getpid(), received)
            wait_for(workers, forwarder)
    finally:
        for worker in workers.processes:
            worker.kill()
            worker.join()


@pytest.mark.parametrize(
    ("code", "received", "error"),
    [(143, 0, SIGTERMException), (130, 0, KeyboardInterrupt), (143, signal.SIGTERM, SIGTERMException)],
)
def test_after_a_signal_a_worker_that_saves_longer_than_the_others_has_until_the_limit(
    code: int, received: int, error: type[BaseException], tmp_path: Path
) -> None:
    """Worker 0 writes in a thread (`AsyncCheckpointIO`) or to a slow disk: it was killed after 30 s, in silence."""
    with pytest.raises(error):
        wait_for_two(tmp_path, code=code, seconds=0.5, limit=60.0, received=received)
    assert (tmp_path / "saved").exists()


def test_a_worker_that_still_saves_at_the_limit_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SIGTERMException):
        wait_for_two(tmp_path, code=143, seconds=60.0, limit=0.3)
    said = capfd.readouterr().err
    assert "worker 0 (pid " in said
    assert "still running 0.3 s (timeout=) after SIGTERM: terminated without a checkpoint" in said
    assert "worker 1" not in said


def test_where_a_worker_has_failed_the_others_are_ended_soon(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="process 1 terminated with exit code 3"):
        wait_for_two(tmp_path, code=3, seconds=60.0, limit=60.0)
    assert not (tmp_path / "saved").exists()
