"""Who of the others is lost, for a strategy: begins the watch, and turns errors into the one that says it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException, _TunerExitException

from resist_lightning.faults.heartbeats import Heartbeats
from resist_lightning.faults.watchdog import Surroundings, Watchdog
from resist_lightning.schedule.progress import Activity
from resist_lightning.strategies.launching.children import Children, State

PARENT = "RESIST_LIGHTNING_PARENT"
"""Tells a worker which process has started it by running the script again."""


class Guard:
    """What a strategy does about workers that are lost.

    Args:
        silence: after how long without a sign a worker counts as lost.
    """

    def __init__(self, silence: timedelta) -> None:
        self.silence = silence
        self.children: Children | None = None
        self._failed = self._stopped = False
        self._watch: Watchdog | None = None

    @property
    def state(self) -> State:
        """Whether the others are watched, whether this worker has failed, and whether all have agreed to stop."""
        if self._failed or self._stopped:
            return "failed" if self._failed else "stopped"
        return "watched" if self._watch is not None else "unwatched"

    def begin(self, trainer: pl.Trainer, activity: Callable[[], Activity | None], timeout: timedelta) -> None:
        """Begin to watch; call it where the group exists.

        Args:
            trainer: of this worker.
            activity: what this worker is doing.
            timeout: after how long a worker that waits for another one gives up.
        """
        environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        where = f"{environment.main_address}:{environment.main_port}"
        children = self.children
        self._failed = self._stopped = False
        self._watch = Watchdog(
            Heartbeats(trainer.global_rank, trainer.world_size),
            Surroundings(
                activity=activity,
                store=f"the store at {where}, which worker 0 or torchrun's agent serves,",
                how_to_resume=lambda: how_to_resume(trainer),
                how_ended=children.how_ended if children is not None else lambda _: None,
                orphaned=_parent_watcher(),
                before_exit=children.kill if children is not None else lambda: None,
            ),
            silence=self.silence.total_seconds(),
            timeout=timeout.total_seconds(),
        )
        self._watch.start()

    def look_up(self) -> None:
        """Tell the others at once what this worker is doing; call it when there is an activity to tell of."""
        if self._watch is not None:
            self._watch.wake()

    def check(self) -> None:
        """Costs nothing. Raises WorkerLost if a worker is known to be lost."""
        if self._watch is not None:
            self._watch.check()

    def end(self) -> None:
        """Stop watching; call it where the workers part."""
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.tell("done")

    @contextmanager
    def around(self, ends_together: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """What is raised inside is told to the others; a broken connection becomes the WorkerLost that explains it.

        Args:
            ends_together: whether all workers are ending now, so that the signal's exception is no failure.
        """
        try:
            yield
        except BaseException as error:
            self._stopped = isinstance(error, (KeyboardInterrupt, SIGTERMException)) and ends_together()
            if self._watch is None or self._stopped or isinstance(error, _TunerExitException):
                raise
            self._failed = True
            watch = self._watch
            lost = watch.explain(error)
            if lost is None:
                watch.tell("failed", _in_words(error))
                self._watch = None
                raise
            verdict = watch.verdict
            if self.children is not None and verdict is not None and verdict.frozen:
                self.children.kill(verdict.frozen)
            watch.tell("gave up", verdict.text if verdict is not None else str(lost))
            self._watch = None
            if lost is error:
                raise
            raise lost from error


def how_to_resume(trainer: pl.Trainer) -> str:
    """A sentence with the folder of snapshots, or the newest checkpoint that the trainer's callbacks know."""
    strategy: Any = trainer.strategy
    snapshots = strategy.snapshot_folder
    if snapshots is not None:
        again = "torchrun goes on from there by itself if it may start the workers again; otherwise resume"
        return f"Snapshots are in {str(snapshots)!r}: {again} with Trainer.fit(..., ckpt_path={str(snapshots)!r})."
    known = [strategy.last_written] + [
        getattr(callback, name, "")
        for callback in trainer.checkpoint_callbacks
        for name in ("last_model_path", "best_model_path")
    ]
    paths = [path for path in known if path and os.path.exists(path)]
    if paths:
        return f"Resume with Trainer.fit(..., ckpt_path={max(paths, key=os.path.getmtime)!r})."
    return (
        "No checkpoint of this run is known, so it begins anew; ModelCheckpoint(every_n_train_steps=..., "
        "save_last=True) leaves some to resume from."
    )


def _in_words(error: BaseException) -> str:
    """An error of a worker, for the others."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(".")
    return f"{text[:500]}{'...' if len(text) > 500 else ''}."


def _parent_watcher() -> Callable[[], str]:
    """Says whether the process has ended that started this worker, where that one must outlive it."""
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
