"""Runs the workers of a training until they have ended or the time is up, and reports the end of each."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from experiments.faults.faults import thaw
from experiments.faults.training import Settings, environment, train_as_forked
from experiments.harness.links.namespaces import free_port

ROOT = Path(__file__).resolve().parents[2]
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
START_SECONDS = 120.0  # for starting, and for training until the fault strikes
LAUNCHER_SECONDS = 35.0  # torchrun gives a worker that does not answer to SIGTERM 30 s before it kills it
AFTERWARDS_SECONDS = 3.0  # for processes that end by themselves when their launcher has ended
POLL_SECONDS = 0.01


@dataclass
class Ended:
    """The end of a training: exits, errors and left-overs."""

    # of each worker: ``exit code 0``, ``SIGKILL``, ``ended`` (where a launcher alone knows), ``running``
    ends: list[str] = field(default_factory=list)
    errors: list[dict[str, Any] | None] = field(default_factory=list)  # of each worker: type, text and moment, or None
    struck: dict[str, Any] | None = None  # the time of the strike, the worker's activity, and its local steps; or None
    hung: list[int] = field(default_factory=list)  # workers, other than a frozen one, that still ran at the limit
    survived_until: float | None = None  # when the last of them ended
    # exit of a frozen worker after SIGCONT; None where nothing was frozen, or somebody had ended it
    thawed: str | None = None
    # state letters (``S`` sleeps, ``T`` is stopped) of all processes that were still there
    left_over: list[str] = field(default_factory=list)
    returncode: int | None = None  # of the launcher
    output: str = ""  # of all


def run_training(settings: Settings, folder: Path, launcher: str = "forked", *, limit: float = START_SECONDS) -> Ended:
    """Train in a new folder, and watch.

    The launcher is ``forked``, ``popen`` or ``torchrun``; the limit is in seconds from the strike to the end of the last
    survivor.
    """
    folder.mkdir(parents=True)
    settings.write(folder)
    ctypes.CDLL(None).prctl(SUBREAPER, 1)  # so that orphans of a run stay to be found
    try:
        return (_Forked if launcher == "forked" else _Launched)(settings, folder, launcher, limit).run()
    finally:
        kill_all()


class _Watch:
    """The common part of all ways to start workers."""

    def __init__(self, settings: Settings, folder: Path, launcher: str, limit: float) -> None:
        self.settings = settings
        self.folder = folder
        self.launcher = launcher
        self.limit = limit
        self.workers = range(settings.workers)
        frozen = settings.fault is not None and settings.fault.kind == "freeze"
        self.frozen = settings.fault.worker if settings.fault is not None and frozen else None
        self.survivors = [worker for worker in self.workers if worker != self.frozen]

    def run(self) -> Ended:
        """Start, wait for the survivors, thaw a frozen worker, note the left-over processes, and kill them."""
        self.start()
        survived_until = self.until(self.survivors_ended, self.limit)
        hung = [worker for worker in self.survivors if self.running(worker)]
        # Before the survivors have ended it could go on together with them: then nothing would have been tested.
        thawed = self.thaw() if self.frozen is not None and survived_until is not None else None
        self.settle()
        ended = Ended(
            ends=self.ends(),
            errors=[read_json(self.folder / f"error-{worker}.json") for worker in self.workers],
            struck=self.struck(),
            hung=hung,
            survived_until=survived_until,
            thawed=thawed,
            left_over=[state(pid) for pid in descendants() if pid not in self.known()],
            returncode=self.returncode(),
        )
        self.end()
        outputs = sorted(self.folder.glob("output*.txt"))
        ended.output = "".join(path.read_text(errors="replace") for path in outputs)
        return ended

    def start(self) -> None:
        raise NotImplementedError

    def running(self, worker: int) -> bool:
        raise NotImplementedError

    def ends(self) -> list[str]:
        """The end of each worker, see `Ended`."""
        raise NotImplementedError

    def frozen_process(self) -> tuple[int, Callable[[], int | None]] | None:
        """Pid and exit code (None while it is there) of the frozen worker; None where a launcher knows it alone."""
        raise NotImplementedError

    def end(self) -> None:
        """Kill the processes that were started here."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait for processes that end by themselves after the workers."""

    def known(self) -> set[int | None]:
        """Processes that are no left-overs: `ends` covers them."""
        return set()

    def returncode(self) -> int | None:
        """The launcher's exit code."""
        return None

    def thaw(self) -> str | None:
        """Continue a frozen worker: it must find that the others are gone. None if somebody has ended it."""
        process = self.frozen_process()
        if process is None or process[1]() is not None:
            return None
        pid, exitcode = process
        thaw(pid)
        wait_for(lambda: exitcode() is not None, self.limit)
        return name_of_exit(exitcode())

    def until(self, done: Callable[[], bool], limit: float) -> float | None:
        """Wait; returns the time when it was done, or None where the limit, counted from the strike, came first."""
        start = time.monotonic()
        while not done():
            struck = self.struck()
            deadline = start + START_SECONDS if struck is None else struck["at"] + limit
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)
        return time.monotonic()

    def survivors_ended(self) -> bool:
        return not any(self.running(worker) for worker in self.survivors)

    def struck(self) -> dict[str, Any] | None:
        return read_json(self.folder / "struck.json")


class _Forked(_Watch):
    """Processes that no launcher watches."""

    def start(self) -> None:
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            raise RuntimeError(
                f"this process has {threads} threads, but a process to fork may have only one; set OMP_NUM_THREADS=1."
            )
        port, context = free_port(), multiprocessing.get_context("fork")
        self.processes: list[ForkProcess] = []
        for worker in self.workers:
            self.processes.append(context.Process(target=train_as_forked, args=(worker, self.folder, port)))
            self.processes[-1].start()

    def running(self, worker: int) -> bool:
        return self.processes[worker].exitcode is None

    def ends(self) -> list[str]:
        return [name_of_exit(process.exitcode) for process in self.processes]

    def frozen_process(self) -> tuple[int, Callable[[], int | None]]:
        assert self.frozen is not None
        process = self.processes[self.frozen]
        assert process.pid is not None
        return process.pid, lambda: process.exitcode

    def known(self) -> set[int | None]:
        return {process.pid for process in self.processes}

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


class _Launched(_Watch):
    """Processes started as a user starts a script."""

    def start(self) -> None:
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={self.settings.workers}"]
        torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command = [sys.executable, *(torchrun if self.launcher == "torchrun" else [])]
        command += ["-m", "experiments.faults.training", str(self.folder)]
        with (self.folder / "output.txt").open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment(self.folder)}, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def running(self, worker: int) -> bool:
        try:
            pid = int((self.folder / f"pid-{worker}").read_text())
        except (FileNotFoundError, ValueError):
            return self.process.poll() is None  # not begun
        if pid == self.process.pid:
            return self.process.poll() is None
        return state(pid) not in ("", "Z", "X")

    def ends(self) -> list[str]:
        return ["running" if self.running(worker) else "ended" for worker in self.workers]

    def frozen_process(self) -> tuple[int, Callable[[], int | None]] | None:
        """Worker 0's process, which is Lightning's launcher itself; else None."""
        lightnings = self.launcher == "popen" and self.frozen == 0
        return (self.process.pid, self.process.poll) if lightnings else None

    def settle(self) -> None:
        self.until(lambda: self.process.poll() is not None, self.limit + LAUNCHER_SECONDS)
        wait_for(lambda: not descendants(), AFTERWARDS_SECONDS)

    def returncode(self) -> int | None:
        return self.process.poll()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_for(done: Callable[[], bool], seconds: float) -> None:
    """Wait until it is done, at most for so many seconds."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def descendants() -> list[int]:
    """Living descendants of this process, orphans too."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent, letter = _parent_and_state(int(entry.name))
            if letter not in ("", "Z", "X"):
                children.setdefault(parent, []).append(int(entry.name))
    found, ask = [], [os.getpid()]
    while ask:
        of_one = children.get(ask.pop(), [])
        found += of_one
        ask += of_one
    return found


def kill_all() -> None:
    """Kill all descendants of this process, and wait for them."""
    for pid in descendants():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def state(pid: int) -> str:
    """The letter of ``/proc``: ``R``, ``S``, ``T`` for stopped, ``Z``; empty where there is no such process."""
    return _parent_and_state(pid)[1]


def _parent_and_state(pid: int) -> tuple[int, str]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, ""
    return int(fields[1]), fields[0]


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file; None where it is missing, or being written."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content


def name_of_exit(exitcode: int | None) -> str:
    """``exit code 1``, ``SIGKILL`` or ``running``."""
    if exitcode is None:
        return "running"
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
