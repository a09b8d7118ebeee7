"""The life of one worker of ``run_workers``; the parent's side is ``processes``."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tests.helpers.leaks import die_with_parent


@dataclass(frozen=True)
class Outcome:
    """The outcome of a worker.

    Attributes:
        value: return value of the target.
        error: exception of the target, or None.
        traceback: of ``error``, as text.
        raised_at: ``time.monotonic()`` of ``error``; the clock is the same for all processes.
        end: end of the process: "exit code 0", or the name of a signal; "still running" until then.
    """

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    raised_at: float = 0.0
    end: str = "still running"


@dataclass(frozen=True)
class Task:
    """A worker's task.

    Attributes:
        number: the worker's number.
        workers: number of workers.
        call: the target and its arguments, pickled, so that a failure to unpickle is reported like any exception.
        folder: common to all workers of this call.
        environment: of the parent now; the fork server's is that of its start.
        collective_timeout: of the process group, in seconds.
    """

    number: int
    workers: int
    call: bytes
    folder: Path
    environment: dict[str, str]
    collective_timeout: float

    @property
    def stacks(self) -> Path:
        """The file to which the worker writes its threads' stacks on SIGUSR1."""
        return self.folder / f"stacks{self.number}"


def work(task: Task, parent: Connection) -> None:
    """Join the group, call the target, report to the parent, leave the group."""
    os.setsid()
    # As in a script: by default a child of the fork server would start loader processes by its own server, in seconds.
    multiprocessing.set_start_method("fork", force=True)
    threading.Thread(target=die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(task.environment)
    with task.stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            _join_group(task)
            target, args = pickle.loads(task.call)
            message = pickle.dumps(Outcome(value=target(task.number, *args)))
        except BaseException as error:  # noqa: BLE001 - the parent raises it again
            failure = Outcome(error=_portable(error), traceback=traceback.format_exc(), raised_at=time.monotonic())
            parent.send_bytes(pickle.dumps(failure))
            raise SystemExit(1) from None  # at once, and without a collective: the peers must notice
        parent.send_bytes(message)
        _leave_together()
        faulthandler.unregister(signal.SIGUSR1)


def _join_group(task: Task) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{task.folder / 'rendezvous'}",
        rank=task.number,
        world_size=task.workers,
        timeout=timedelta(seconds=task.collective_timeout),
    )
    # A target that leaves the group at once, or fails, must not close connections that a slower peer is still making.
    distributed.barrier()


def _leave_together() -> None:
    """Leave the group when all have finished: sockets closed early can fail a peer's last collective."""
    if distributed.is_initialized():
        with suppress(RuntimeError):  # a peer failed, and reports it itself
            distributed.barrier()
        distributed.destroy_process_group()


def _portable(error: BaseException) -> BaseException:
    """``error`` if it can be pickled, else a RuntimeError with its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - pickling calls any code
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
