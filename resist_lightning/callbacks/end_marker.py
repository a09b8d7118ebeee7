"""A callback that tells evaluators of other processes when a training has ended."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from resist_lightning.checkpoint.followed_folder import END_MARKER, mark_end, remove_end
from resist_lightning.strategies.saving.checkpoint_files import local_path


class EndMarker(Callback):
    """Writes ``training_ended.json`` beside the checkpoints when ``fit`` is complete, and removes it when it begins.

    So a :class:`~resist_lightning.evaluator.CheckpointEvaluator` knows that no more checkpoints will come. A run that
    ends with an error or a signal writes none: it may be resumed. With ``fast_dev_run``, which saves nothing, it leaves
    the folder alone. Works with any strategy.

    Raises:
        ValueError: when ``fit`` starts, if no ``ModelCheckpoint`` writes to a local folder, or one waits for
            validations that are switched off.
    """

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the marker of the run before."""
        folders = _folders(trainer)
        if not folders and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                "EndMarker needs a ModelCheckpoint that writes to a local folder, where an evaluator looks for it. Add "
                "ModelCheckpoint(dirpath=FOLDER), or remove the callback."
            )
        _check_that_it_saves(trainer)
        if trainer.is_global_zero:
            for folder in folders:
                remove_end(folder)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the marker; all checkpoints are on disk by now, also those that a thread has written."""
        if trainer.is_global_zero:
            for folder in _folders(trainer):
                try:
                    mark_end(folder, trainer.global_step)
                except OSError as error:
                    rank_zero_warn(
                        f"{folder / END_MARKER} could not be written ({error}), so an evaluator ends after its "
                        "`silence` only. The training itself has succeeded."
                    )


def _folders(trainer: pl.Trainer) -> list[Path]:
    found: list[Path] = []
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return found  # another training may be running there
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            folder = local_path(callback.dirpath)
            if folder is not None:
                found.append(folder)
    return found


def _check_that_it_saves(trainer: pl.Trainer) -> None:
    """Raise for a ModelCheckpoint that would never save without validations, as it waits for one or for its metric."""
    if trainer.limit_val_batches != 0:
        return
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        # By its name: a module's metrics are unknown until it logs them.
        if callback.monitor is not None and callback.monitor.startswith("val"):
            raise ValueError(
                f"ModelCheckpoint would never save: monitor={callback.monitor!r} comes from validations, and "
                "limit_val_batches=0 has switched them off. Set ModelCheckpoint(monitor='step', mode='max')."
            )
        by_epochs = callback._every_n_epochs > 0 and vars(callback)["_save_on_train_epoch_end"] is None
        if by_epochs and trainer.check_val_every_n_epoch != 1:
            raise ValueError(
                f"ModelCheckpoint would never save: with check_val_every_n_epoch={trainer.check_val_every_n_epoch} it "
                "waits for validations, and limit_val_batches=0 has switched them off. Set "
                "ModelCheckpoint(save_on_train_epoch_end=True)."
            )
