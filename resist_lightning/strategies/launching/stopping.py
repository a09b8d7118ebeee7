"""Stops spawned workers: forwards the signals of the main process, which only waits for them."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.call import _interrupt
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException

from resist_lightning.errors import process_name
from resist_lightning.strategies.launching.signals import SAME_SECONDS
from resist_lightning.strategies.patches import Patches, do_nothing

_EXIT_CODES = {128 + signal.SIGTERM: signal.SIGTERM, 128 + signal.SIGINT: signal.SIGINT}


class Forwarder:
    """Passes SIGTERM and SIGINT on to the workers, which stop together; a second one ends the main process at once.

    Args:
        kill: sends a signal to the workers that have been started.
        limit: seconds after the first signal in which the workers must have ended.
        members: processes of each worker.
        first_rank: of the workers of this host.
    """

    def __init__(self, kill: Callable[[int], None], limit: float, members: int = 1, first_rank: int = 0) -> None:
        self._kill = kill
        self._limit = limit
        self._members = members
        self._first_rank = first_rank
        self._originals: dict[int, Any] = {}
        self._received = 0
        self._first_at = 0.0

    @contextmanager
    def waiting(self, trainer: pl.Trainer | None) -> Iterator[None]:
        """Inside, the main process waits for the workers, and forwards signals to them.

        Raises:
            SIGTERMException: if the workers have stopped because of SIGTERM.
            KeyboardInterrupt: if they have because of SIGINT (Ctrl-C).
        """
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for number in _EXIT_CODES.values():
                original = signal.getsignal(number)
                if original not in (signal.SIG_IGN, None):
                    self._originals[number] = original
                    signal.signal(number, self._forward)
        try:
            yield
        except BaseException as error:
            if trainer is not None:
                _save_nothing_more(trainer)
            # A signal may have reached the workers alone; their exit code says so.
            stopped = isinstance(error, ProcessExitedException) and (self._received or _EXIT_CODES.get(error.exit_code))
            if stopped:
                raise _exception_of(stopped) from None
            raise
        finally:
            for taken, original in self._originals.items():
                signal.signal(taken, original)
            self._originals = {}

    def stopping(self, codes: Set[int]) -> bool:
        """Whether a signal stops the workers, so that those that end first, with these codes, have not failed."""
        # It may have reached the workers alone, as the first exit code says.
        if not self._received and codes and codes <= _EXIT_CODES.keys():
            self._received, self._first_at = _EXIT_CODES[min(codes)], time.monotonic()
        return bool(self._received)

    def check(self, workers: Sequence[BaseProcess]) -> None:
        """Called repeatedly while waiting: workers that hang must not block the main process for ever.

        Raises:
            SIGTERMException: if SIGTERM was passed on, and workers have not ended within the limit.
            KeyboardInterrupt: likewise after SIGINT (Ctrl-C).
        """
        if not self._received or time.monotonic() - self._first_at < self._limit:
            return
        # They may hang in a collective whose partner has ended.
        late = []
        for rank, worker in enumerate(workers, start=self._first_rank):
            if worker.is_alive():
                late.append(f"{process_name(rank, self._members)} (pid {worker.pid})")
        sys.stderr.write(
            f"{', '.join(late)}: still running {self._limit:g} s (timeout=) after "
            f"{signal.Signals(self._received).name}: terminated without a checkpoint.\n"
        )
        raise _exception_of(self._received)

    def _forward(self, number: int, _: FrameType | None) -> None:
        if self._received and time.monotonic() - self._first_at < SAME_SECONDS:
            return  # a terminal and its shell both send it
        again = bool(self._received)
        self._received, self._first_at = number, time.monotonic()
        self._kill(number)
        if again:
            raise _exception_of(number)


def start_fork_server() -> None:
    """Start the server of the start method ``forkserver`` so that no signal to the process group ends it."""
    resource_tracker.ensure_running()  # it would be started below, and let the signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _EXIT_CODES.values())
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ending(trainer: pl.Trainer | None) -> Iterator[None]:
    """Wraps a worker's run: callbacks get an exception here, where the model is and a checkpoint can be written.

    Raises:
        SystemExit: in the place of KeyboardInterrupt, with an exit code that tells the main process of it.
    """
    if hasattr(signal, "pthread_sigmask"):  # a fork server's children inherit its blocked signals
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _EXIT_CODES.values())
    try:
        yield
    except BaseException as error:
        if trainer is not None:
            _interrupt(trainer, error)
            trainer._teardown()
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from None
        raise


def _exception_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SIGTERMException(128 + number)


def _save_nothing_more(trainer: pl.Trainer) -> None:
    """Keep callbacks from saving: the main process has the model as it was before the training."""
    patches = Patches()
    usual = trainer.strategy.on_exception

    def then(exception: BaseException) -> None:  # called right after the callbacks
        patches.remove()
        usual(exception)

    for callback in trainer.checkpoint_callbacks:
        patches.replace(callback, "on_exception", do_nothing)
    patches.replace(trainer.strategy, "on_exception", then)
