"""Starts the watchdog for a strategy and converts connection errors into ``WorkerLost``."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException, _TunerExitException

from resist_lightning.engine.engine import Engine
from resist_lightning.faults.heartbeats import Heartbeats
from resist_lightning.faults.host import this_process
from resist_lightning.faults.surroundings import Surroundings
from resist_lightning.faults.watchdog import Watchdog
from resist_lightning.schedule.progress import Activity
from resist_lightning.strategies.launching.children import Children, State

PARENT = "RESIST_LIGHTNING_PARENT"
"""Environment variable with the id of the process that started this worker by running the script again."""

_LONGEST = 500  # characters of an error that are reported to the others


class Guard:
    """Watches the other workers on behalf of a strategy.

    Args:
        silence: time without a heartbeat after which a worker counts as lost.
    """

    def __init__(self, silence: timedelta) -> None:
        self.silence = silence
        self.children: Children | None = None
        self._failed = self._stopped = False
        self._watchdog: Watchdog | None = None

    @property
    def state(self) -> State:
        """Whether the others are watched, whether this worker has failed, and whether all have agreed to stop."""
        if self._failed or self._stopped:
            return "failed" if self._failed else "stopped"
        return "watched" if self._watchdog is not None else "unwatched"

    def begin(self, trainer: pl.Trainer, engine: Callable[[], Engine | None], timeout: timedelta) -> None:
        """Start the watchdog, unless this worker is alone. Collective: every worker must call this, in the group."""
        if trainer.world_size == 1:
            return
        environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        where = f"{environment.main_address}:{environment.main_port}"
        children = self.children

        def activity() -> Activity | None:
            running = engine()
            return running.activity if running is not None else None

        self._failed = self._stopped = False
        own = this_process(trainer.global_rank, trainer.strategy.group.members)  # type: ignore[attr-defined]
        heartbeats = Heartbeats(own, trainer.world_size)
        heartbeats.introduce()
        self._watchdog = Watchdog(
            heartbeats,
            Surroundings(
                activity=activity,
                store=f"the store at {where}, which worker 0 or torchrun's agent serves,",
                how_to_resume=lambda: how_to_resume(trainer),
                how_ended=children.how_ended if children is not None else lambda _: None,
                orphaned=parent_watcher(),
                before_exit=children.kill if children is not None else lambda: None,
            ),
            silence=self.silence.total_seconds(),
            timeout=timeout.total_seconds(),
        )
        self._watchdog.start()

    def look_up(self) -> None:
        """Send a heartbeat with this worker's present activity, at once."""
        if self._watchdog is not None:
            self._watchdog.wake()

    def check(self) -> None:
        """Raise WorkerLost if a worker is known to be lost. Cheap enough for every batch."""
        if self._watchdog is not None:
            self._watchdog.check()

    def end(self) -> None:
        """Stop watching: from here on workers may end at any time."""
        if self._watchdog is not None:
            watchdog, self._watchdog = self._watchdog, None
            watchdog.post_end("done")

    @contextmanager
    def around(self, ends_together: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Report errors raised inside to the others, and convert a broken connection into the WorkerLost behind it.

        Args:
            ends_together: whether all workers are ending now, so that the signal's exception is no failure.
        """
        try:
            yield
        except BaseException as error:
            by_signal = isinstance(error, (KeyboardInterrupt, SIGTERMException))
            self._stopped = by_signal and ends_together()
            if self._watchdog is None or self._stopped or isinstance(error, _TunerExitException):
                raise  # the last one is how Lightning ends a search for a learning rate
            self._failed = True
            watchdog = self._watchdog
            # It waits for the heartbeats that tell which worker's loss has broken a connection.
            lost = watchdog.explain(error)
            if lost is None:  # this worker's own error
                watchdog.post_end("failed", _one_line(error))
                self._watchdog = None
                raise
            verdict = watchdog.verdict
            # A frozen process cannot end by itself, and would outlive the run.
            if self.children is not None and verdict is not None and verdict.frozen:
                self.children.kill(verdict.frozen)
            watchdog.post_end("gave up", verdict.text if verdict is not None else str(lost))
            self._watchdog = None
            if lost is error:
                raise
            raise lost from error


def how_to_resume(trainer: pl.Trainer) -> str:
    """A sentence on how to resume: from the snapshots, or the newest checkpoint that the callbacks know."""
    strategy: Any = trainer.strategy
    if strategy.saver.collected:
        return "Ray restarts the workers if FailureConfig(max_failures=...) allows it; see get_checkpoint()."
    snapshots = strategy.resumer.snapshot_folder
    if snapshots is not None:
        again = "torchrun resumes from there by itself if it may restart the workers; otherwise resume"
        return f"Snapshots are in {str(snapshots)!r}: {again} with Trainer.fit(..., ckpt_path={str(snapshots)!r})."
    # Callbacks name a checkpoint before it is written, and other callbacks may remove it.
    known = [strategy.saver.last_written]
    for callback in trainer.checkpoint_callbacks:
        known += [getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", "")]
    paths = [path for path in known if path and os.path.exists(path)]
    if paths:
        return f"Resume with Trainer.fit(..., ckpt_path={max(paths, key=os.path.getmtime)!r})."
    return (
        "No checkpoint of this run is known, so it must start over; ModelCheckpoint(every_n_train_steps=..., "
        "save_last=True) writes some to resume from."
    )


def _one_line(error: BaseException) -> str:
    """An error of this worker in one line, for the others."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(".")
    return f"{text}." if len(text) <= _LONGEST else f"{text[:_LONGEST]}...."


def parent_watcher() -> Callable[[], str]:
    """A function that tells, in words, if the process that started this worker, and must outlive it, has ended."""
    main = multiprocessing.parent_process()
    parent = os.getppid()
    by_script = os.environ.get(PARENT) == str(parent)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ

    def orphaned() -> str:
        if main is not None and not main.is_alive():
            return f"the main process (pid {main.pid}), which started this worker, has ended."
        if (by_script or by_torchrun) and os.getppid() != parent:
            return f"the process (pid {parent}) that started this worker has ended."
        return ""

    return orphaned
