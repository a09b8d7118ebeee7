"""The length of a training in local steps, as its Trainer plans it."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from resist_lightning.comm.collective import Collective


def total_steps(trainer: pl.Trainer, collective: Collective) -> int | None:
    """Local steps of a training from its beginning to its end, of the worker with the fewest; None if not known.

    Collective: every worker must call this, in the same order.
    """
    return _fewest(estimated_steps(trainer), collective)


def steps_left(trainer: pl.Trainer, collective: Collective) -> int | None:
    """The part of :func:`total_steps` that is still to come; call it when a checkpoint's progress is loaded.

    Collective: every worker must call this, in the same order.
    """
    return _fewest(_estimated_left(trainer), collective)


def estimated_steps(trainer: pl.Trainer) -> float:
    """Local steps of a training from its beginning to its end, if every batch has one; infinity if not known."""
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # Lightning cannot say it where the accumulation of gradients changes
        return float("inf")
    return steps if steps >= 0 else float("inf")  # it is -1 for data of unknown length without max_steps


def _estimated_left(trainer: pl.Trainer) -> float:
    left, epochs = float("inf"), trainer.max_epochs
    if trainer.max_steps >= 0:
        left = trainer.max_steps - trainer.global_step
    if epochs is not None and epochs >= 0 and math.isfinite(trainer.num_training_batches):
        # In epochs of this training: those of a checkpoint may have had other numbers of batches.
        accumulated = trainer.accumulate_grad_batches
        in_epoch = math.ceil(trainer.num_training_batches / accumulated)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        in_mid_epoch = trainer.fit_loop.restarting and not progress.is_last_batch
        begun = progress.current.processed // accumulated if in_mid_epoch else 0
        left = min(left, in_epoch * (epochs - trainer.current_epoch) - begun)
    return max(left, 0)


def _fewest(steps: float, collective: Collective) -> int | None:
    """The fewest of all workers' steps: epochs end together, with the shortest; None where one is not known."""
    known = int(steps) if steps < float("inf") else -1
    fewest = min(int(row[0]) for row in collective.gather_numbers([known]))
    return fewest if fewest >= 0 else None
