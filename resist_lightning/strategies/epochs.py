"""Epochs that end for all workers at once, whatever their loaders hold."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from resist_lightning.verbs import Collective


def end_epochs_together(trainer: pl.Trainer, dataloader: object, collective: Collective) -> None:
    """Limit the training epochs of all workers to the shortest loader.

    Collective: every worker must call this, in the same order. Loaders of unknown length are left alone: if they end at
    different steps, the header of the next sync stops the run with an error.

    Args:
        trainer: its ``limit_train_batches`` is lowered, before Lightning reads it.
        dataloader: this worker's training loader.
        collective: the workers.
    """
    lengths = [int(row[0]) for row in collective.gather_numbers([_length(dataloader)])]
    if len(set(lengths)) > 1 and min(lengths) >= 0:
        rank_zero_warn(
            f"the workers' training loaders have {lengths} batches; every epoch ends after {min(lengths)} for all of "
            "them. Shard the data evenly to use all of it."
        )
        trainer.limit_train_batches = _shorter(trainer.limit_train_batches, min(lengths))


def _length(dataloader: object) -> int:
    """Number of batches; -1 if unknown."""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return -1


def _shorter(limit: int | float | None, batches: int) -> int:
    """Lightning's limit, a number (int) or share (float) of batches, applied to the shortest loader."""
    return min(limit, batches) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
