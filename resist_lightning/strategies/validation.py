"""Orders the hooks of a validation: callbacks that swap weights swap those of the sub-network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from resist_lightning.engine.engine import Engine
from resist_lightning.strategies.averages import Averages
from resist_lightning.strategies.patches import Patches, after


def order_validation(
    trainer: pl.Trainer, engine: Callable[[], Engine | None], averages: Averages, patches: Patches
) -> None:
    """End the full model before ``on_validation_end`` where weights were swapped before it was assembled.

    Callbacks and the module are called before the strategy at the start of a validation, and at its end. One that
    puts other weights into the module in ``on_validation_start`` (averages, or a schedule-free optimizer) puts the old
    ones back in ``on_validation_end``, and must find there the weights that it left. Otherwise the full model stays
    until the strategy's turn, so that ``on_validation_end`` can save and export it.
    """

    def note_weights() -> None:
        if (training := engine()) is not None:
            averages.show()
            training.observation.note_weights()

    def end_if_swapped() -> None:
        training = engine()
        if training is not None and training.observing and training.observation.own.swapped:
            training.end_observation()

    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    patches.replace(loop, "on_run_start", after(note_weights, loop.on_run_start))
    patches.replace(loop, "_on_evaluation_end", after(end_if_swapped, loop._on_evaluation_end))
