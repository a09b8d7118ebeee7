"""The places where Lightning's loops would talk or draw random numbers behind the strategy's back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng


class LoopPatches:
    """Replaces methods of a trainer's loops, and puts them back.

    * ``_TrainingEpochLoop._broadcast_sigterm_tensor`` broadcasts on the default group before every batch (Lightning
      2.5.2 and later), which makes local steps lock-step again, and swallows the error of a dead peer. The flag it
      carries travels in the header of each sync instead.
    * The validation loop draws a seed for its loader's iterator from the global generator, so a run that validates
      would train on other augmentations than one that does not.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._undo: list[tuple[Any, str]] = []
        epoch_loop = trainer.fit_loop.epoch_loop
        if hasattr(epoch_loop, "_broadcast_sigterm_tensor"):
            self._replace(epoch_loop, "_broadcast_sigterm_tensor", _say_nothing)
        self._replace(epoch_loop.val_loop, "run", _isolated(epoch_loop.val_loop.run))

    def remove(self) -> None:
        """Put the original methods back."""
        for owner, name in self._undo:
            delattr(owner, name)
        self._undo = []

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        setattr(owner, name, method)
        self._undo.append((owner, name))


def _say_nothing() -> None:
    """In the place of a broadcast."""


def _isolated(run: Callable[..., Any]) -> Callable[..., Any]:
    def run_isolated(*args: Any, **kwargs: Any) -> Any:
        with isolate_rng():
            return run(*args, **kwargs)

    return run_isolated
