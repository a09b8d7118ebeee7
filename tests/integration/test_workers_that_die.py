"""Whatever happens to one worker, the others end with an error that names it, and no process is left behind."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessRaisedException

from resist_lightning import WorkerLost
from resist_lightning.faults.watchdog import EXIT_CODE
from resist_lightning.strategies.launching import processes
from tests.helpers import dying
from tests.helpers.interpreters import warm
from tests.helpers.plain import Classifier
from tests.helpers.processes import run_workers, run_workers_to_the_end
from tests.helpers.programs import as_a_main_process, be_program, write_to
from tests.helpers.trainers import run_trainers_to_the_end
from tests.helpers.worker import Outcome

PATIENCE_SECONDS = 120
NAME = r"worker {} \(host .+, pid \d+\) "

pytestmark = pytest.mark.timeout(PATIENCE_SECONDS + 30)


# Processes that exist already, as under torchrun.


def train(
    worker: int, harm: str, doomed: int, folder: str, workers: int, timeout: float, face: str, overlap: int
) -> None:
    dying.TIMEOUT = dying.timedelta(seconds=timeout)
    saving = ModelCheckpoint(folder, every_n_train_steps=dying.AT_STEP // 2, save_last=True)
    options = {"face": face, "overlap": overlap, "callbacks": [saving], "enable_checkpointing": True}
    dying.train(harm, doomed, folder, workers=workers, **options)


def harm(
    what: str, doomed: int, folder: Path, workers: int = 2, limit: float = 60.0, face: str = "resist", overlap: int = 0
) -> list[Outcome]:
    arguments = what, doomed, str(folder), workers, limit, face, overlap
    return run_trainers_to_the_end(train, workers, *arguments, timeout=PATIENCE_SECONDS)


def assert_lost(outcome: Outcome, worker: int, how: str, folder: Path) -> None:
    assert isinstance(outcome.error, WorkerLost), outcome
    said = str(outcome.error)
    assert re.match(NAME.format(worker) + how, said), said
    # The last heartbeat may be some steps old, as such small steps are shorter than the time between heartbeats.
    assert re.search(r"(last doing:|still in) [a-z -]+, round [34], local step \d", said), said
    assert said.endswith(f"Resume with Trainer.fit(..., ckpt_path='{folder}/last.ckpt').")


# With an overlap of two steps the worker dies in the step in which the sync of its round is under way.
@pytest.mark.parametrize(("face", "overlap"), [("resist", 2), ("ist", 0)])
def test_a_killed_worker_is_named_by_all_others_with_what_it_did_and_how_to_resume(
    face: str, overlap: int, tmp_path: Path
) -> None:
    outcomes = harm("kill", 1, tmp_path, workers=3, face=face, overlap=overlap)

    assert outcomes[1].end == "SIGKILL"
    for other in (0, 2):
        assert_lost(outcomes[other], 1, r"ended without reporting an error", tmp_path)


def test_a_worker_that_hangs_is_named_and_ended(tmp_path: Path) -> None:
    outcomes = harm("load:hang", 1, tmp_path, limit=5.0)

    assert_lost(outcomes[0], 1, r"is alive, but has not reached the handshake for 5 s: it is still in ", tmp_path)
    assert outcomes[1].end == f"exit code {EXIT_CODE}"


# Launchers: worker 0, or the main process, has children.


def running(folder: Path) -> list[int]:
    """Pids of the workers that still run, or are stopped."""
    found = []
    for path in folder.glob("pid*"):
        with suppress(OSError):
            pid = int(path.read_text())
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(pid)
    return found


def run_script(folder: Path, what: str, doomed: int) -> str:
    """Run the script until none of its workers is left; returns its output."""
    outcomes = run_workers_to_the_end(be_script, 2, str(folder), what, str(doomed), timeout=PATIENCE_SECONDS)
    assert outcomes[1].value == [], outcomes
    return (folder / "output").read_text()


def be_script(number: int, folder: str, *harm: str) -> list[int]:
    as_a_main_process()
    if number == 1:
        return witness(Path(folder))
    write_to(f"{folder}/output")
    warm()
    be_program("tests.helpers.dying", *harm, folder)
    return []


def witness(folder: Path) -> list[int]:
    """Wait for a main process's workers; returns those left, which ``run_workers_to_the_end`` would kill at its end."""
    deadline = time.monotonic() + PATIENCE_SECONDS / 2
    while (len(list(folder.glob("pid*"))) < 2 or running(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(list(folder.glob("pid*"))) == 2
    return running(folder)


@pytest.mark.parametrize(
    ("what", "doomed", "how"),
    [
        ("train then raise", 1, r"failed with KeyError: 'a mistake'"),
        ("kill", 0, r"ended without reporting an error"),
    ],
)
def test_of_a_script_nobody_is_left_behind(what: str, doomed: int, how: str, tmp_path: Path) -> None:
    stderr = run_script(tmp_path, what, doomed)

    error = (tmp_path / f"error{1 - doomed}").read_text()
    assert re.match("WorkerLost: " + NAME.format(doomed) + how, error), stderr
    assert re.search(r"last doing: [a-z -]+, round \d+, local step \d+", error)
    assert (doomed == 1) == ("raise KeyError" in stderr)  # the worker's own traceback


def test_after_ctrl_c_a_script_goes_on_in_all_workers_and_has_a_checkpoint(tmp_path: Path) -> None:
    run_script(tmp_path, "SIGINT", 1)

    for worker in range(2):
        assert (tmp_path / f"error{worker}").read_text() == "SystemExit: 1"
        assert (tmp_path / f"after{worker}").exists()
    assert_saved(tmp_path)


def assert_saved(folder: Path) -> None:
    saved = torch.load(folder / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == dying.AT_STEP + 2  # counted from 0, where the round ends
    Classifier().load_state_dict(saved["state_dict"], strict=True)


def fork_and_terminate(_: int, folder: str) -> None:
    as_a_main_process()
    with pytest.raises(SIGTERMException):
        dying.train("SIGTERM", 1, folder, "fork")


def test_sigterm_to_a_main_process_and_its_forked_workers_leaves_a_checkpoint(tmp_path: Path) -> None:
    run_workers(fork_and_terminate, 1, str(tmp_path), timeout=PATIENCE_SECONDS)

    assert running(tmp_path) == []
    assert_saved(tmp_path)


def fork(_: int, harm: str, how: str, folder: str) -> None:
    as_a_main_process()
    processes.ENDING_SECONDS = 2.0  # a frozen worker does not use this time
    # The error of worker 0, or of the main process.
    with pytest.raises((WorkerLost, ProcessRaisedException), match=NAME.format(1) + how):
        dying.train(harm, 1, folder, "fork")


@pytest.mark.parametrize(
    ("harm", "how"),
    [
        ("segv", r"was killed by signal 11 \(SIGSEGV\)"),
        ("stop", r"has sent no heartbeat for \d+ s: it is frozen"),
    ],
)
def test_of_forked_workers_the_one_that_came_to_harm_is_named(harm: str, how: str, tmp_path: Path) -> None:
    run_workers(fork, 1, harm, how, str(tmp_path), timeout=PATIENCE_SECONDS)

    assert running(tmp_path) == []


def fork_and_be_killed(number: int, folder: str) -> list[int]:
    as_a_main_process()
    if number == 1:
        return witness(Path(folder))
    dying.HARMS["kill"] = lambda: os.kill(os.getppid(), signal.SIGKILL)
    dying.train("kill", 1, folder, "fork")
    return []


def test_forked_workers_end_when_their_main_process_does(tmp_path: Path) -> None:
    main, seen = run_workers_to_the_end(fork_and_be_killed, 2, str(tmp_path), timeout=PATIENCE_SECONDS)

    assert main.end == "SIGKILL"
    assert seen.value == [], seen
