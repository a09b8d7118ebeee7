"""Faults, and the callback that makes them happen in one worker.

    Fault("kill", 1, "hand_over", round=2)
    Fault("freeze", 0, "local steps", round=1, step=2)

Nothing of the package is changed for it: it listens to ``engine.activity``, and for the middle of a message or of a file
it waits, in that worker's process only, for the next call of the function that sends or for the kernel's signal.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from typing_extensions import override

from experiments.faults import injections
from resist_lightning.faults.failure_detector import BEAT_SECONDS
from resist_lightning.schedule.progress import Activity
from resist_lightning.strategies.base import SubnetStrategy

KINDS = (
    "kill",  # SIGKILL: it is gone without a word, as after the kernel's out-of-memory killer
    "terminate",  # SIGTERM: it is asked to end, as by Slurm
    "segfault",  # SIGSEGV: it crashes, as in a faulty extension
    "freeze",  # SIGSTOP: it is there, and does nothing
    "interrupt",  # SIGINT: somebody pressed Ctrl-C in this process only
    "raise_error",  # a mistake in the user's code
    "raise_in_loader",  # a sample that cannot be read
    "run_out_of_memory",  # an allocation that the system really refuses
    "fill_disk",  # no more bytes fit into the file: the kernel's limit on the size of files (EFBIG), not a patched `open`
)
WITHOUT_A_WORD = ("kill", "segfault", "freeze")
PLACES = (
    "local steps",  # in a batch, before its backward pass
    "handshake",  # before a sync has sent anything
    "averaging",  # the all-reduce of the shared part has begun
    "hand_over",  # the messages of the blocks are posted, none is waited for
    "evaluation",  # before the full model is assembled
    "saving",  # worker 0: in the middle of the model's file; the others: in the middle of their own
)
WITH_STEP = ("local steps", "saving")
ONLY_PLACE = {"raise_in_loader": "local steps", "fill_disk": "saving"}


class NeverStruck(RuntimeError):
    """The training ended without the fault, so nothing was tested."""


@dataclass(frozen=True)
class Fault:
    """A failure that happens once, in one worker."""

    kind: str  # one of `KINDS`
    worker: int  # the worker that it strikes
    place: str  # one of `PLACES`
    round: int  # the round that the worker is in; for a sync, the one that ends
    step: int = 0  # local steps taken in the round; for ``local steps``, and, as the least, for ``saving``

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("place", self.place, PLACES)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, known))}.")
        only = ONLY_PLACE.get(self.kind, self.place)
        if self.place != only:
            raise ValueError(f"{self.kind} cannot happen at {self.place!r}; it happens at {only!r}.")
        if self.step and self.place not in WITH_STEP:
            raise ValueError(
                f"step={self.step} has a meaning only at {' and '.join(WITH_STEP)}, not at {self.place!r}."
            )

    def __str__(self) -> str:
        """The fault in words, for records and errors."""
        step = f", step={self.step}" if self.place in WITH_STEP else ""
        return f'{self.kind}(worker={self.worker}).at("{self.place}", round={self.round}{step})'


class Injector(L.Callback):
    """Makes one fault happen, once, in its worker; does nothing in the others.

    It notes the moment in a file, by ``time.monotonic()``, which is one clock for all processes.
    """

    def __init__(self, fault: Fault, note: Path | None = None) -> None:
        self.fault = fault
        self.struck = False
        self._note = note
        self._disarm: Callable[[], None] = _nothing

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Arm it, in the fault's worker."""
        if trainer.global_rank != self.fault.worker:
            return
        strategy = trainer.strategy
        assert isinstance(strategy, SubnetStrategy)
        assert strategy.engine is not None
        self._activity = strategy.engine.activity
        self._clock = strategy.engine.clock
        self._activity.listeners.append(self._hear)
        if self.fault.place == "saving":
            self._disarm = injections.while_saving(strategy, self._is_now, self._strike, self.fault.kind)
        elif self.fault.kind == "raise_in_loader":
            self._disarm = injections.in_loader(trainer, self._is_now, self._strike)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Called in every local step."""
        if self.fault.place == "local steps" and self.fault.kind != "raise_in_loader" and self._is_mine(trainer):
            self._strike()

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called when no worker waits for another any more."""
        self._disarm()
        if trainer.global_rank == self.fault.worker and not self.struck:
            raise NeverStruck(f"{self.fault} did not happen: the training ended before it reached that place.")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Called after any error, this fault's too."""
        self._disarm()

    def _is_mine(self, trainer: L.Trainer) -> bool:
        return trainer.global_rank == self.fault.worker and self._is_now()

    def _is_now(self) -> bool:
        if self.struck:
            return False
        if self.fault.place != "local steps":
            return self._clock.round == self.fault.round and self._clock.step >= self.fault.step
        # The first batch of a round is read before the sync that is due.
        coming = (self._clock.round + 1, 0) if self._clock.due else (self._clock.round, self._clock.step)
        return coming == (self.fault.round, self.fault.step)

    def _hear(self, activity: Activity) -> None:
        place = self.fault.place
        if place in injections.SENDING:
            self._disarm()
            self._disarm = _nothing
        if activity.what != place or self.struck or activity.round != self.fault.round:
            return
        if place in injections.SENDING:
            self._disarm = injections.after_next_message(place, self._strike)
        elif place in ("handshake", "evaluation"):
            self._strike()

    def _strike(self) -> None:
        self.struck = True
        if self.fault.worker == 0 and self.fault.kind in WITHOUT_A_WORD:
            # The store goes with it, so the others must have read a heartbeat by then to say what it was doing.
            time.sleep(2 * BEAT_SECONDS)
        if self._note is not None:
            moment = {"at": time.monotonic(), "what": self._activity.what, "steps": self._clock.total_steps}
            self._note.write_text(json.dumps(moment))
        injections.INJECTIONS[self.fault.kind](str(self.fault))


def thaw(pid: int) -> None:
    """End a freeze."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _nothing() -> None:
    """A no-op: there is nothing to put back."""
