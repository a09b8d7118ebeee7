from __future__ import annotations

import os
import signal
from subprocess import Popen  # a fixture refuses `subprocess.Popen`
from typing import Any

import pytest

from resist_lightning.strategies.launching import children
from resist_lightning.strategies.launching.children import Children


def test_a_child_that_dies_while_the_workers_start_is_named_and_all_are_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(children, "BEAT_SECONDS", 0.05)
    killed, kill = [], os.kill

    def spare_this_process(pid: int, number: int) -> None:
        if pid == os.getpid():
            killed.append(number)
        else:
            kill(pid, number)

    monkeypatch.setattr(os, "kill", spare_this_process)
    sound, doomed = Popen(["sleep", "60"]), Popen(["sleep", "60"])
    observed = Children([sound, doomed], 1.0, 1.0, lambda: "unwatched", first_rank=5)
    doomed.kill()
    observed._observer.join(10)
    observed._leave_none()

    assert sound.wait(10) == -signal.SIGKILL
    assert killed == [signal.SIGKILL]
    said = f"rank 6 (pid {doomed.pid}) was killed by signal 9 (SIGKILL); all workers are killed.\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize(("state", "code"), [("stopped", 0), ("failed", -signal.SIGKILL)])
def test_a_child_that_stops_as_agreed_has_the_timeout_to_end_and_after_an_error_less(state: Any, code: int) -> None:
    """It had as long as after an error: one that still saved at the exit of worker 0 was killed."""
    child = Popen(["sleep", "0.5"])
    Children([child], 0.1, 30.0, lambda: state)._leave_none()
    assert child.wait(10) == code
