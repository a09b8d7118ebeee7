"""Shields data loader processes from stop signals, and ends them with their worker."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker, util
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.utils.data._utils import signal_handling

from resist_lightning.comm.sockets import close_inherited

_DIE_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


class LoaderShield:
    """While installed, keeps signals that are meant for the worker from its loader processes.

    SLURM, torchrun and terminals signal all processes of a worker. A loader process that dies of it takes the worker
    down, before the point where all workers stop together. So each daemonic process that this one starts by
    :mod:`multiprocessing`, in whatever way, does nothing on these signals, dies at once when this process does, and
    leaves the worker's connections alone. ``Process.terminate()`` kills it.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self._signals = tuple(signals)
        self._usual: Callable[[Any], None] | None = None

    def install(self) -> None:
        """Shield processes that are started from now on."""
        if self._usual is not None or not hasattr(signal, "pthread_sigmask"):  # Windows
            return
        self._usual = usual = BaseProcess.start
        BaseProcess.start = lambda process: self._start(process, usual)  # type: ignore[assignment]
        # When this process ends, multiprocessing terminates loader processes: the loader's handler would raise.
        util.Finalize(None, signal.signal, (signal.SIGCHLD, signal.SIG_DFL), exitpriority=100)

    def remove(self) -> None:
        """Leave processes that are started from now on as they are."""
        if self._usual is not None:
            BaseProcess.start, self._usual = self._usual, None  # type: ignore[method-assign,assignment]

    def _start(self, process: Any, usual: Callable[[Any], None]) -> None:
        if not process.daemon or process._target is None:
            usual(process)
            return
        method = process._start_method or multiprocessing.get_start_method()
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        process._target = _Shielded(process._target, self._signals, parent, by_server=method == "forkserver")
        if method != "fork":
            resource_tracker.ensure_running()  # it would be started below, and let the signals in again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)  # new processes inherit it, while they begin
        try:
            usual(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        process._popen.terminate = process._popen.kill


@dataclass
class _Shielded:
    """The target of a shielded process.

    Args:
        target: the original one.
        signals: the signals that it ignores.
        parent: the process with which it dies; 0 if the thread that starts it may end earlier.
        by_server: whether a fork server starts it, which another process may have started, and which may live on.
    """

    target: Callable[..., Any]
    signals: Sequence[int]
    parent: int
    by_server: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        close_inherited()
        if self.by_server:
            threading.Thread(target=_end_with_worker, name="resist_lightning loader", daemon=True).start()
        elif self.parent and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != self.parent:
                os._exit(1)  # the parent ended before prctl was called
        torch_handlers: Any = signal_handling
        usual = torch_handlers._set_worker_signal_handlers

        def set_handlers() -> None:
            """Set torch's handlers, then ours: torch's ends the process on SIGTERM."""
            signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
            usual()
            self.ignore()

        torch_handlers._set_worker_signal_handlers = set_handlers  # called first by the loop of a loader process
        self.ignore()
        return self.target(*args, **kwargs)

    def ignore(self) -> None:
        """Ignore them by handlers, which programs started by the process do not inherit, unlike SIG_IGN and masks."""
        for number in self.signals:
            signal.signal(number, _do_nothing)
            signal.siginterrupt(number, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)


def _end_with_worker() -> None:
    worker = multiprocessing.parent_process()
    assert worker is not None
    worker.join()
    os._exit(1)


def _do_nothing(_: int, __: FrameType | None) -> None:
    """A signal handler that does nothing."""
