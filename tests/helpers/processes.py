"""Real worker processes for a test: started quickly, watched, and never left behind.

A fork server imports torch once per test session, and every worker is a fork of it: 0.2 s for four workers,
where spawned ones, each importing torch anew, took 9 s (two cores). The server has one thread and never
computes, so forking it is safe; CUDA and OpenMP begin in the workers.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.helpers.worker import Outcome, Task, work

PRELOADED = [
    *("pytest", "hypothesis", "torch", "torch.distributed", "torchvision", "torchmetrics", "resist_lightning"),
    "torch.export._trace",  # imported by torch.fx when it first traces: a quarter of a second
    *("fsspec.implementations.chained", "torch._inductor.sizevars"),
    *("omegaconf", "torch.utils.serialization.config"),  # imported when Lightning first saves a checkpoint
    *("torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks", "torch.distributed.run", "resource"),
    *("hydra.main", "sklearn.datasets", "matplotlib.pyplot"),  # for whole programs
    *("tests.helpers.worker", "tests.helpers.trainers", "tests.helpers.auxnet", "tests.helpers.stages"),
    "tests.helpers.warm",  # must be the last
]

# Time that the others get after the first failure seen, which may be the consequence of another one.
GRACE_SECONDS = 0.3


class WorkerDied(RuntimeError):
    """A worker ended without a result: by a signal, or by ``os._exit``."""


class WorkersTimedOut(RuntimeError):
    """Workers still ran at the timeout; the message has the stacks of each."""


class WorkerTraceback(Exception):
    """The cause of an exception from a worker: the worker's number and its traceback."""

    def __str__(self) -> str:
        return str(self.args[0])


def run_workers(
    target: Callable[..., Any],
    workers: int,
    *args: Any,
    timeout: float = 60.0,
    collective_timeout: float | None = None,
) -> list[Any]:
    """Call ``target(worker, *args)`` in ``workers`` processes, one gloo group; return the values in order.

    Args:
        target: function of a module; each worker calls it with its own number first.
        workers: number of processes.
        args: given to every worker, pickled (tensors are copied).
        timeout: seconds after which all workers are killed.
        collective_timeout: of the process group, in seconds; ``timeout`` by default.

    Raises:
        BaseException: the error of the first worker to fail; its number and traceback are the cause.
        WorkerDied: a worker was killed by a signal (which is named) or left without returning.
        WorkersTimedOut: not all had finished at the timeout.
    """
    with _crew(target, workers, args, timeout, collective_timeout) as crew:
        _watch(crew, timeout, stop_at_failure=True)
        _raise_first_failure(crew)
        _raise_if_running(crew, timeout)
        return [worker.outcome.value for worker in crew]


def run_workers_to_the_end(
    target: Callable[..., Any],
    workers: int,
    *args: Any,
    timeout: float = 60.0,
    collective_timeout: float | None = None,
) -> list[Outcome]:
    """Like ``run_workers``, but no failure ends the others; returns every worker's outcome, for tests of failures.

    Raises:
        WorkersTimedOut: not all had ended at the timeout, so some worker hangs.
    """
    with _crew(target, workers, args, timeout, collective_timeout) as crew:
        _watch(crew, timeout, stop_at_failure=False)
        _raise_if_running(crew, timeout)
        return [worker.outcome for worker in crew]


@dataclass
class _Worker:
    """A worker, seen from its parent."""

    number: int
    process: ForkServerProcess
    connection: Connection
    stacks: Path
    message: Outcome | None = None
    silent: bool = False
    running: bool = True

    @property
    def outcome(self) -> Outcome:
        end = "still running" if self.running else _name_of_exit(self.process.exitcode)
        return replace(self.message or Outcome(), end=end)

    @property
    def failed(self) -> bool:
        return self.outcome.error is not None or (not self.running and self.process.exitcode != 0)

    @property
    def handles(self) -> list[Any]:
        return [self.process.sentinel] if self.silent else [self.process.sentinel, self.connection]

    def listen(self) -> None:
        """Receive the worker's outcome, if it has sent one, and notice its end."""
        ended = bool(wait([self.process.sentinel], 0))
        if not self.silent and self.connection.poll():
            self.silent = True
            with suppress(EOFError):  # it died without sending one
                self.message = pickle.loads(self.connection.recv_bytes())
        if ended:
            self.process.join()
            self.running = False

    def show_stacks(self) -> None:
        """Have the worker and its forks write the stacks of their threads, even of those inside a collective."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """End the worker and all that it started: its whole process group."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():  # before its setsid there is no such group
            self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _crew(
    target: Callable[..., Any],
    workers: int,
    args: tuple[Any, ...],
    timeout: float,
    collective_timeout: float | None,
) -> Iterator[list[_Worker]]:
    """Start the workers; at exit all are dead."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    seconds = timeout if collective_timeout is None else collective_timeout
    call = pickle.dumps((target, args))
    crew: list[_Worker] = []
    with tempfile.TemporaryDirectory(prefix="run_workers_") as folder:
        try:
            for number in range(workers):
                ours, theirs = context.Pipe(duplex=False)
                task = Task(number, workers, call, Path(folder), dict(os.environ), seconds)
                process = context.Process(target=work, args=(task, theirs))
                _start(process)
                theirs.close()
                crew.append(_Worker(number, process, ours, task.stacks))
            yield crew
        finally:
            for worker in crew:
                worker.kill()


def _start(process: ForkServerProcess) -> None:
    try:
        process.start()
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"the fork server ended while it imported {', '.join(PRELOADED)}") from error


def _watch(crew: list[_Worker], timeout: float, *, stop_at_failure: bool) -> None:
    """Listen until all have ended, the time is up, or (a little after) the first failure."""
    deadline = time.monotonic() + timeout
    failed = False
    while running := [worker for worker in crew if worker.running]:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return
        wait([handle for worker in running for handle in worker.handles], remaining)
        for worker in running:
            worker.listen()
        if stop_at_failure and not failed and any(worker.failed for worker in crew):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _raise_first_failure(crew: list[_Worker]) -> None:
    failures = sorted((worker for worker in crew if worker.failed), key=_order_of_failure)
    if not failures:
        return
    first, outcome = failures[0], failures[0].outcome
    others = "".join(f"\nafterwards, {_in_words(worker)}" for worker in failures[1:])
    if outcome.error is None:
        raise WorkerDied(_in_words(first) + others)
    raise outcome.error from WorkerTraceback(f"\n\nworker {first.number} of {len(crew)}:\n{outcome.traceback}{others}")


def _order_of_failure(worker: _Worker) -> tuple[int, float, int]:
    """Sort key, causes before consequences: a death makes peers raise, an exception may make gloo abort in a peer."""
    outcome = worker.outcome
    if outcome.error is not None:
        return (1, outcome.raised_at, worker.number)
    return (2 if outcome.end == "SIGABRT" else 0, 0.0, worker.number)


def _raise_if_running(crew: list[_Worker], timeout: float) -> None:
    running = [worker for worker in crew if worker.running]
    if not running:
        return
    for worker in running:
        worker.show_stacks()
    time.sleep(0.2)
    stacks = "".join(
        f"\nworker {worker.number}{' (it has returned a value)' if worker.message else ''}:\n"
        f"{worker.stacks.read_text() if worker.stacks.exists() else 'not begun'}"
        for worker in running
    )
    raise WorkersTimedOut(
        f"{len(running)} of {len(crew)} workers still ran after {timeout:g} s and were killed{stacks}"
    )


def _in_words(worker: _Worker) -> str:
    outcome = worker.outcome
    if outcome.error is not None:
        return f"worker {worker.number} raised {type(outcome.error).__name__}: {outcome.error}"
    when = "after" if worker.message else "before"
    return f"worker {worker.number} ended with {outcome.end}, {when} it returned a value"


def _name_of_exit(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"
