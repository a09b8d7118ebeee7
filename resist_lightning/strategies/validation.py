"""Orders the hooks of a validation: callbacks that swap weights swap those of the sub-network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from resist_lightning.engine.engine import Engine
from resist_lightning.strategies.averages import Averages


class ValidationOrder:
    """Ends the full model before ``on_validation_end`` where weights were swapped before it was assembled.

    Callbacks and the module are called before the strategy at the start of a validation, and at its end. One that
    puts other weights into the module in ``on_validation_start`` (averages, or a schedule-free optimizer) puts the old
    ones back in ``on_validation_end``, and must find there the weights that it left. Otherwise the full model stays
    until the strategy's turn, so that ``on_validation_end`` can save and export it.

    Args:
        trainer: whose validation loop is patched.
        engine: of this worker.
        averages: shown instead of the weights, before any callback swaps them.
    """

    def __init__(self, trainer: pl.Trainer, engine: Engine, averages: Averages) -> None:
        self._loop: Any = trainer.fit_loop.epoch_loop.val_loop
        self._engine = engine
        self._averages = averages
        patched = vars(self._loop)
        patched["on_run_start"] = self._after(self._note, self._loop.on_run_start)
        patched["_on_evaluation_end"] = self._after(self._end_if_swapped, self._loop._on_evaluation_end)

    def remove(self) -> None:
        """Put the loop's own methods back."""
        del self._loop.on_run_start, self._loop._on_evaluation_end

    def _note(self) -> None:
        if self._engine.running:
            self._averages.show()
            self._engine.observation.note_weights()

    def _end_if_swapped(self) -> None:
        if self._engine.observing and self._engine.observation.swapped:
            self._engine.end_observation()

    def _after(self, first: Callable[[], None], usual: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            first()
            return usual(*args, **kwargs)

        return called
