"""Patches ``ModelCheckpoint`` for workers that see different metrics, and for disks that refuse a file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from resist_lightning.errors import CheckpointNotWritten
from resist_lightning.strategies.patches import Patches


class Refused(CheckpointNotWritten):
    """Tells a callback that its checkpoint was not written; the training continues."""


class CheckpointCallbacks:
    """Patches a trainer's ``ModelCheckpoint`` callbacks.

    * ``_monitor_candidates``: file names and the best checkpoints follow worker 0's metrics on all workers. A metric
      without ``sync_dist`` would give every worker names, and an order, of its own.
    * ``_save_checkpoint`` and ``on_exception``: a file that was not written is neither announced, nor linked to, nor
      uploaded.

    Of all callbacks that save, ``on_exception`` is called inside ``at_the_end()``.

    Args:
        trainer: of this worker.
        patches: for as long as the training lasts.
        at_the_end: makes a context in which a broken connection raises the loss of the worker behind it.

    Attributes:
        saving: whether such a callback is saving, which learns of a failure by :class:`Refused`.
    """

    def __init__(
        self, trainer: pl.Trainer, patches: Patches, at_the_end: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.saving = False
        self._at_the_end = at_the_end
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                patches.replace(callback, "_monitor_candidates", self._alike(callback._monitor_candidates))
                patches.replace(callback, "_save_checkpoint", self._unless_refused(callback._save_checkpoint))
                patches.replace(callback, "on_exception", self._unannounced(callback.on_exception))
            patches.replace(callback, "on_exception", self._explained(callback.on_exception))

    def _alike(self, candidates: Callable[[pl.Trainer], dict[str, Any]]) -> Callable[[pl.Trainer], dict[str, Any]]:
        """Use worker 0's metrics. Collective: every worker asks for its metrics where a checkpoint may be due."""

        def worker_0s(trainer: pl.Trainer) -> dict[str, Any]:
            found = candidates(trainer)
            # From the CPU: a tensor would arrive on worker 0's device.
            mine = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in found.items()}
            theirs: dict[str, Any] = trainer.strategy.broadcast(mine)
            return theirs

        return worker_0s

    def _unless_refused(self, save: Callable[..., None]) -> Callable[..., None]:
        def save_or_warn(*args: Any) -> None:
            # `on_exception` saves by this method, and announces what it has saved.
            announcing, self.saving = self.saving, True
            try:
                save(*args)
            except Refused as error:
                if announcing:
                    raise  # to `on_exception`, which would announce it next
                rank_zero_warn(str(error))
            finally:
                self.saving = announcing

        return save_or_warn

    def _explained(self, on_exception: Callable[..., None]) -> Callable[..., None]:
        def save(*args: Any) -> None:
            with self._at_the_end():
                on_exception(*args)

        return save

    def _unannounced(self, on_exception: Callable[..., None]) -> Callable[..., None]:
        def save_or_warn(*args: Any) -> None:
            self.saving = True
            try:
                on_exception(*args)
            except Refused as error:
                rank_zero_warn(str(error))
            finally:
                self.saving = False

        return save_or_warn


def report_not_written(text: str, callbacks: CheckpointCallbacks | None) -> None:
    """Raise in the callback that asked for a checkpoint, which must not announce it; without one, warn the user."""
    if callbacks is not None and callbacks.saving:
        raise Refused(text)
    rank_zero_warn(text)


def resolve_file_urls(trainer: pl.Trainer) -> None:
    """Correct ``dirpath="file:///folder"``, whose ``file:`` Lightning reads as a folder in the current one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            _, found, folder = str(callback.dirpath).partition("/file:/")
            if found:
                callback.dirpath = f"/{folder}"
