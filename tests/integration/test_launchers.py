"""The ways to start workers that users have: they train the same, bit for bit. The slowest tests of the suite."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from resist_lightning import Config, ResISTStrategy, WorkerLost
from tests.helpers import dying
from tests.helpers.interrupted import fit_twice
from tests.helpers.launched import STEPS, Data, train
from tests.helpers.plain import Classifier, evaluate
from tests.helpers.processes import run_workers
from tests.helpers.programs import ROOT, as_a_main_process, run_module, run_program
from tests.helpers.trainers import make_trainer, train_by_hand
from tests.helpers.training import assert_equal_states, clone_state

PATIENCE_SECONDS = 200  # for importing Lightning in several processes on a busy machine
SCRIPT = "tests.helpers.launched"
TORCHRUN = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]

pytestmark = pytest.mark.timeout(PATIENCE_SECONDS + 30)


def by_hand(worker: int) -> dict[str, Any]:
    module = Classifier()
    train_by_hand(worker, module, Config(local_steps=3, min_blocks=1), STEPS)
    return clone_state(module)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The weights that a plain loop with the engine gives, and their metrics."""
    state = run_workers(by_hand, 2)[0]
    module = Classifier()
    module.load_state_dict(state)
    return {"state": state, "metrics": {f"val/{key}": value for key, value in evaluate(module, 2).items()}}


def assert_as_expected(found: dict[str, Any], expected: dict[str, Any], start_method: str) -> None:
    assert_equal_states(found["state"], expected["state"], exactly=True)
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
    assert Path(found["best"]).name == f"{start_method}-step={STEPS}.ckpt"
    assert (found["group left"], found["training"]) == (False, False)


def script(folder: str) -> str:
    return run_program(["-m", SCRIPT, "popen", folder], ROOT, timeout=PATIENCE_SECONDS)


def torchrun(folder: str) -> str:
    return run_module("torch.distributed.run", *TORCHRUN, "-m", SCRIPT, "popen", folder)


def spawn(folder: str) -> str:
    return run_module(SCRIPT, "spawn", folder)


@pytest.mark.parametrize(
    ("launch", "start_method", "workers"),
    [(script, "popen", (0, 1)), (torchrun, "popen", (0, 1)), (spawn, "spawn", (0,))],
)
def test_launchers_train_what_the_plain_loop_trains(
    launch: Callable[[str], str], start_method: str, workers: tuple[int, ...], expected: Any, tmp_path: Path
) -> None:
    output = launch(str(tmp_path))

    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"{start_method}-worker{w}.pt" for w in workers]
    for worker in workers:
        found = torch.load(tmp_path / f"{start_method}-worker{worker}.pt", weights_only=False)
        assert_as_expected(found, expected, start_method)
        if start_method == "popen":
            assert found["tested"] == found["metrics"]
    assert output.count("4 residual blocks are partitioned over 2 worker(s), 2, 2 a worker") == 1


# Fork: from a worker that has imported everything, so that it costs no more than the training.


def fork(_: int, folder: str) -> dict[str, Any]:
    as_a_main_process()
    return train("fork", folder, Classifier())


def test_forked_workers_train_what_the_plain_loop_trains(expected: Any, tmp_path: Path) -> None:
    assert_as_expected(run_workers(fork, 1, str(tmp_path))[0], expected, "fork")


def fork_and_save(_: int, folder: str) -> None:
    as_a_main_process()
    strategy = ResISTStrategy(local_steps=3, min_blocks=1, start_method="fork")
    trainer = make_trainer(strategy, max_epochs=1, devices=2)
    trainer.fit(Classifier(), datamodule=Data())
    trainer.save_checkpoint(f"{folder}/end.ckpt")


def test_a_checkpoint_saved_by_the_main_process_of_forked_workers_can_be_resumed(tmp_path: Path) -> None:
    run_workers(fork_and_save, 1, str(tmp_path))

    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["resist_lightning"]["scale"] == 0.5
    assert (saved["resist_lightning"]["round"], saved["resist_lightning"]["step"]) == (2, 2)


def interrupt_and_fit_again(_: int, to_all: bool, folder: str) -> tuple[bool, int, bool]:
    as_a_main_process()
    main = os.getpid()

    def interrupt() -> None:
        while not Path(folder, "training").exists():
            time.sleep(0.05)
        (os.killpg if to_all else os.kill)(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    return fit_twice("fork", folder)


@pytest.mark.parametrize("to_all", [False, True])
def test_an_interrupt_leaves_no_worker_and_the_next_fit_works(to_all: bool, tmp_path: Path) -> None:
    """A notebook's kernel is interrupted alone, a terminal's Ctrl-C reaches the workers too.

    Up to version 0.1 forked workers stayed alive, and the next fit died of EADDRINUSE.
    """
    (found,) = run_workers(interrupt_and_fit_again, 1, to_all, str(tmp_path), timeout=PATIENCE_SECONDS)

    assert found == (True, 0, True)


def interrupt_a_worker_that_hangs(_: int, folder: str) -> float:
    """A worker that is alone is given up by no other one. Returns seconds."""

    def harm() -> None:
        os.kill(os.getppid(), signal.SIGINT)
        dying.hang()

    as_a_main_process()
    dying.HARMS["interrupt"] = harm
    dying.TIMEOUT = timedelta(seconds=3)
    started = time.monotonic()
    with pytest.raises(SystemExit):
        dying.train("interrupt", 0, folder, "fork", workers=1)
    return time.monotonic() - started


def test_a_worker_that_hangs_does_not_keep_an_interrupted_main_process(tmp_path: Path) -> None:
    assert run_workers(interrupt_a_worker_that_hangs, 1, str(tmp_path))[0] < PATIENCE_SECONDS / 2


class Leaving(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            sys.exit(0)


def fork_and_leave(_: int, folder: str) -> list[str]:
    as_a_main_process()
    tempfile.tempdir = folder
    strategy = ResISTStrategy(local_steps=3, min_blocks=1, start_method="fork")
    trainer = make_trainer(strategy, max_epochs=1, devices=1)  # of two, the second would hear of the first
    with pytest.raises(WorkerLost, match=r"worker 0 ended with exit code 0 and without results: .* sys\.exit"):
        trainer.fit(Leaving(), datamodule=Data())
    return os.listdir(folder)


def test_workers_that_leave_by_themselves_do_not_keep_the_main_process_waiting(tmp_path: Path) -> None:
    assert run_workers(fork_and_leave, 1, str(tmp_path))[0] == []
