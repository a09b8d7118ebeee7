"""Patches of Lightning's loops where they would communicate, draw random numbers or lose their position unnoticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from resist_lightning.comm.collective import Collective
from resist_lightning.strategies.data.equal_epochs import end_epochs_together
from resist_lightning.strategies.finetuning import not_in_optimizer
from resist_lightning.strategies.launching.signals import Signals
from resist_lightning.strategies.saving.data_position import Position


class LoopPatches:
    """Replaces methods of a trainer's loops, and puts them back.

    * ``_TrainingEpochLoop._broadcast_sigterm_tensor`` broadcasts on the default group before every batch (Lightning
      2.5.2 and later), which makes local steps lock-step again, and swallows the error of a dead peer. The flag it
      carries travels in the header of each sync instead.
    * The validation loop draws a seed for its loader's iterator from the global generator, so a run that validates
      would train on other augmentations than one that does not. So it is where a resumed run passes over a validation
      (Lightning 2.5.1 and later).
    * The training loaders are made by whoever asks first: the loop, or a hook or ``configure_optimizers`` of the user's
      that reads ``trainer.estimated_stepping_batches``. The stage of the trainer does not say it.
    * Workers' epochs of different lengths end together.
    * Iterators and batches are made in the loops, and :class:`Position` notes the random state before each.
    * Lightning warns a run that resumes in mid-epoch that its loader starts anew, which ours does not.
    * ``LearningRateFinder`` does not search where a run is resumed.
    * ``BaseFinetuning.filter_on_optimizer`` compares parameters by value, and those of an absent block have none.
    * ``_SignalConnector.register_signal_handlers`` registers a handler that broadcasts on the default group; ours are
      installed right after it.

    Args:
        trainer: the trainer whose loops are patched.
        position: told of iterators, batches and validation.
        signals: installed when Lightning has installed its own.
        collective: the workers whose epochs end together.

    Attributes:
        making_loaders: whether the loaders that Lightning makes now are those of the training.
    """

    def __init__(self, trainer: pl.Trainer, position: Position, signals: Signals, collective: Collective) -> None:
        self.making_loaders = False
        self._undo: list[tuple[Any, str, Any]] = []
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if hasattr(epoch_loop, "_broadcast_sigterm_tensor"):
            self._replace(epoch_loop, "_broadcast_sigterm_tensor", _send_nothing)
        val_loop: Any = epoch_loop.val_loop
        self._replace(val_loop, "run", _isolated(val_loop.run, position))
        if hasattr(val_loop, "increment_progress_to_evaluation_end"):
            skip = val_loop.increment_progress_to_evaluation_end
            self._replace(val_loop, "increment_progress_to_evaluation_end", _isolated(skip, position))
        load, begin, fetch = fit_loop._load_combined_loader_states, epoch_loop.on_run_start, epoch_loop._on_before_fetch

        def before_iterator() -> None:
            assert fit_loop._combined_loader is not None
            end_epochs_together(fit_loop._combined_loader, collective)
            position.note_iterator()

        self._replace(fit_loop, "setup_data", self._noting_loaders(fit_loop.setup_data, position))
        self._replace(fit_loop, "_load_combined_loader_states", _both(load, before_iterator))
        self._replace(fit_loop, "on_advance_start", _both(position.note_epoch, fit_loop.on_advance_start))
        self._replace(epoch_loop, "on_run_start", lambda fetcher: position.begin_epoch(begin, fetcher))
        self._replace(epoch_loop, "_on_before_fetch", _both(position.note_fetch, fetch))
        self._replace(epoch_loop, "reset", _unless_exact(epoch_loop.reset, position))
        self._replace(BaseFinetuning, "filter_on_optimizer", staticmethod(not_in_optimizer))
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        for callback in callbacks:
            if isinstance(callback, LearningRateFinder):
                self._replace(callback, "on_fit_start", _unless_resuming(callback.on_fit_start, trainer))
        connector = trainer._signal_connector
        self._replace(connector, "register_signal_handlers", _both(connector.register_signal_handlers, signals.install))

    def remove(self) -> None:
        """Put the original methods back."""
        for owner, name, original in reversed(self._undo):
            if original is None:  # the class of the owner has it
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._undo = []

    def _noting_loaders(self, setup_data: Callable[[], None], position: Position) -> Callable[[], None]:
        def setup_training_data() -> None:
            self.making_loaders = True
            try:
                setup_data()
            finally:
                self.making_loaders = False
            position.note_made()

        return setup_training_data

    def _replace(self, owner: Any, name: str, method: Any) -> None:
        self._undo.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, method)


def resume_from(trainer: pl.Trainer, path: str) -> None:
    """Have the running ``fit`` resume from ``path``, whatever ``ckpt_path`` its caller gave."""
    connector = trainer._checkpoint_connector
    start = connector.resume_start
    vars(connector)["resume_start"] = lambda _=None, **options: start(path, **options)


def resume_from_path_given(trainer: pl.Trainer) -> None:
    """Undo :func:`resume_from`."""
    vars(trainer._checkpoint_connector).pop("resume_start", None)


def _send_nothing() -> None:
    """Replaces a broadcast."""


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _unless_resuming(search: Callable[..., None], trainer: pl.Trainer) -> Callable[..., None]:
    """A search for the learning rate loads its own checkpoint, and Lightning then forgets the one to resume."""

    def search_or_not(*args: Any) -> None:
        if trainer._checkpoint_connector._loaded_checkpoint:
            rank_zero_info("LearningRateFinder searches nothing: the run goes on with the checkpoint's learning rate.")
        else:
            search(*args)

    return search_or_not


def _unless_exact(reset: Callable[[], None], position: Position) -> Callable[[], None]:
    def reset_quietly() -> None:
        if not position.pending:
            return reset()  # catch_warnings would make every warning new
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
            return reset()

    return reset_quietly


def _isolated(run: Callable[..., Any], position: Position) -> Callable[..., Any]:
    def run_isolated(*args: Any, **kwargs: Any) -> Any:
        with position.outside_validation(), isolate_rng():
            return run(*args, **kwargs)

    return run_isolated
