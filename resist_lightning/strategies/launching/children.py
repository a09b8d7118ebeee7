"""Observes the workers that worker 0 started by re-running the script, and leaves none behind."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, TypeAlias

from resist_lightning.faults.failure_detector import BEAT_SECONDS
from resist_lightning.faults.reasons import name_of_exit

State: TypeAlias = Literal["unwatched", "watched", "failed", "stopped"]


class Children:
    """Replaces Lightning's observer, which kills worker 0 before it can report what happened.

    Args:
        processes: the children; kept as an attribute.
        grace: seconds that worker 0 has to end by itself when a child has failed under its watch, and that the children
            have when worker 0 has failed.
        stop_seconds: seconds that the children have at the exit of worker 0 when all have agreed to stop: one may save
            for longer than worker 0.
        state: whether worker 0 watches the others, whether it has failed, and whether all have agreed to stop.
        first_rank: of the children.
    """

    def __init__(
        self,
        processes: list[subprocess.Popen[bytes]],
        grace: float,
        stop_seconds: float,
        state: Callable[[], State],
        first_rank: int = 1,
    ) -> None:
        self.processes = processes
        self._first_rank = first_rank
        self.follow(state, grace, stop_seconds)
        self._pid = os.getpid()
        self._leaving = threading.Event()
        self._observer = threading.Thread(target=self._observe, name="resist_lightning children", daemon=True)
        self._observer.start()
        atexit.register(self._leave_none)

    @property
    def of_this_process(self) -> bool:
        """Whether this process has started them; a fork of worker 0 has not."""
        return os.getpid() == self._pid

    def follow(self, state: Callable[[], State], grace: float, stop_seconds: float) -> None:
        """Observe the children for a later Trainer of the script, which trains in the same processes."""
        self._state, self._grace, self._stop_seconds = state, grace, stop_seconds

    def how_ended(self, pid: int) -> str | None:
        """The end of a child, in words; None if it runs, or is none of these."""
        for process in self.processes:
            code = process.poll()
            if process.pid == pid and code is not None:
                return name_of_exit(code)
        return None

    def kill(self, pid: int | None = None) -> None:
        """Kill one child, or all that still run. A child stopped by SIGSTOP cannot be ended otherwise."""
        for process in self.processes:
            if pid in (None, process.pid) and process.poll() is None:
                process.kill()

    def _observe(self) -> None:
        """Wait for a child that fails; then end all, as Lightning does, but give worker 0 time to report what happened.

        Once all have agreed to stop, each process ends by itself.
        """
        while True:
            failed = [process for process in self.processes if process.poll()]
            if failed:
                break
            if all(process.poll() == 0 for process in self.processes):
                return
            if self._leaving.wait(BEAT_SECONDS):
                return
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline and self._state() in ("watched", "failed"):
            if self._leaving.wait(BEAT_SECONDS):
                return
        if self._state() == "stopped":
            return
        self.kill()
        # Worker 0 did not fail by itself: it may hang in a call that waits for the child.
        if self._state() != "failed":
            child = failed[0]
            rank = self._first_rank + self.processes.index(child)
            sys.stderr.write(
                f"rank {rank} (pid {child.pid}) {name_of_exit(child.returncode)}; all workers are killed.\n"
            )
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def _leave_none(self) -> None:
        """At the exit of worker 0 after an error or a signal: wait for the children, then kill those that still run."""
        if not self.of_this_process:
            return
        state = self._state()
        if state in ("failed", "stopped"):
            deadline = time.monotonic() + (self._stop_seconds if state == "stopped" else self._grace)
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            self.kill()
        self._leaving.set()  # no thread may write while the interpreter ends
        self._observer.join(BEAT_SECONDS)
