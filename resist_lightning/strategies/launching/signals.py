"""Signal handlers: a signal noted by one worker is acted upon by all of them before the same batch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from resist_lightning.errors import process_name

SAME_SECONDS = 2.0
"""Signals that come so soon after the first are taken for the same one: a terminal and torchrun both send them."""

_TERMINATE, _INTERRUPT, _REQUEUE = 1, 2, 4

_EXIT_CODE = 128 + signal.SIGTERM  # as shells have it; to torchrun, 0 means that the training has come to its end


class Signals:
    """Replaces Lightning's signal handlers while the workers train.

    Lightning's handler of SIGTERM broadcasts where it stands, and pairs with another worker's sync; a Ctrl-C ends each
    worker in another step. Here a worker notes the signal, tells the others at the next handshake, and all act upon it
    before the same batch. A second signal ends the worker at once.

    Args:
        trainer: of this process.
        members: processes of each worker.

    Attributes:
        acting: whether all workers are ending together, so that they may still communicate and save.
        handled: the signals that are noted.
    """

    def __init__(self, trainer: pl.Trainer, members: int = 1) -> None:
        self.acting = False
        self._trainer = trainer
        self._members = members
        self._noted = self._agreed = 0
        self._first_at = 0.0
        self._originals: dict[int, Any] = {}
        self._bits = {signal.SIGTERM: _TERMINATE, signal.SIGINT: _INTERRUPT}
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._bits[environment.requeue_signal] = _REQUEUE
        self.handled = tuple(self._bits)
        self._announced = 0

    @property
    def requests(self) -> int:
        """Bits of the requests to this worker that are still pending."""
        return self._noted

    @property
    def agreed(self) -> bool:
        """Whether all workers know of a request that they may act upon before the next batch."""
        return bool(self._agreed)

    @property
    def ending(self) -> bool:
        """Whether all workers know that they end, at the latest where the round does."""
        return bool(self._agreed & (_TERMINATE | _INTERRUPT))

    def install(self) -> None:
        """Install the handlers. Python allows it in the main thread only; elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread() or self._originals:
            return
        for number, bit in self._bits.items():
            original = signal.getsignal(number)
            if original in (signal.SIG_IGN, None):
                continue  # whoever started this process wants it to live on
            if bit == _REQUEUE and not callable(original):
                continue  # Lightning has installed no handler that could requeue the job
            self._originals[number] = original
            signal.signal(number, self._note)

    def remove(self) -> None:
        """Restore the original handlers, and raise again signals that came too late for all workers to agree on."""
        for number, original in self._originals.items():
            if signal.getsignal(number) == self._note:  # else the user has installed another one since
                signal.signal(number, original)
        replaced, self._originals = [*self._originals], {}
        noted, self._noted = self._noted, 0
        self.acting = False
        if self._trainer.interrupted:
            return  # the signal has done what it was sent for
        for number in replaced:
            if noted & self._bits[signal.Signals(number)]:
                signal.raise_signal(number)

    def on_requests(self, requests: Iterable[int]) -> None:
        """Take the requests of all workers, by rank, at a handshake: now every worker knows them."""
        for rank, request in enumerate(requests):
            self._agreed |= request
            for number, bit in self._bits.items():
                if request & bit:
                    self._announce(rank, number)

    def act(self, *, may_end: bool = True) -> None:
        """Act upon the requests that all workers know. Collective: every worker must call this, at the same place.

        Args:
            may_end: whether the run may end here; otherwise requests to end it stay for a later call.

        Raises:
            SIGTERMException: if a worker has received SIGTERM.
            KeyboardInterrupt: if a worker has received SIGINT (Ctrl-C).
        """
        agreed = self._agreed if may_end else self._agreed & _REQUEUE
        self._agreed &= ~agreed
        if agreed & _REQUEUE:
            # Noted no more, so that the next one counts: a job may be requeued several times.
            self._noted &= ~_REQUEUE
            self._announced &= ~_REQUEUE
            number = next(number for number, bit in self._bits.items() if bit == _REQUEUE)
            self._originals[number](number, None)
        if agreed & (_TERMINATE | _INTERRUPT):
            self.acting = True
        if agreed & _TERMINATE:
            self._trainer._signal_connector.received_sigterm = True
            raise SIGTERMException(_EXIT_CODE)
        if agreed & _INTERRUPT:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler. It may run between any two instructions: it takes no lock and calls no collective."""
        bit = self._bits[signal.Signals(number)]
        already_ending = self._noted & (_TERMINATE | _INTERRUPT)
        if bit != _REQUEUE and already_ending and time.monotonic() - self._first_at > SAME_SECONDS:
            self.acting = False  # the others may be elsewhere: nothing may be sent, so nothing is saved
            if bit == _INTERRUPT:
                raise KeyboardInterrupt
            raise SIGTERMException(_EXIT_CODE)
        if not already_ending:
            if not self._noted & bit:
                self._announce(self._trainer.global_rank, number)
            if bit != _REQUEUE:
                self._first_at = time.monotonic()
        self._noted |= bit

    def _announce(self, rank: int, number: int) -> None:
        """Print a signal once for all workers: worker 0 does it, for those of others when a handshake brings them."""
        bit = self._bits[signal.Signals(number)]
        if self._trainer.global_rank != 0 or self._announced & bit:
            return
        if bit == _REQUEUE:
            text = "all workers save a checkpoint when this round ends."
        elif self._announced & (_TERMINATE | _INTERRUPT):
            return  # one of the two stops the workers already
        else:
            text = "all workers stop when this round ends. A second signal stops at once, without a checkpoint."
        self._announced |= bit
        # Not print(), which fails where the signal has interrupted another print().
        name = process_name(rank, self._members)
        os.write(2, f"{name}: {signal.Signals(number).name}: {text}\n".encode())
