"""Patches of Lightning's loops where they would communicate, draw random numbers or lose their position unnoticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from resist_lightning.comm.collective import Collective
from resist_lightning.errors import NotFinite
from resist_lightning.strategies.data.equal_epochs import end_epochs_together
from resist_lightning.strategies.finetuning import not_in_optimizer
from resist_lightning.strategies.launching.signals import Signals
from resist_lightning.strategies.patches import Patches, after, do_nothing
from resist_lightning.strategies.saving.data_position import Position


class LoopPatches:
    """Patches the loops of a trainer that fits.

    Attributes:
        making_loaders: whether the loaders that Lightning makes now are those of the training.
    """

    def __init__(
        self, trainer: pl.Trainer, position: Position, signals: Signals, collective: Collective, patches: Patches
    ) -> None:
        self.making_loaders = False
        self._trained_before = 0  # batches, when the batches of this epoch began
        self._trainer = trainer
        self._position = position
        self._patches = patches
        self._patch_messages(signals)
        self._patch_validation()
        self._patch_loaders(collective)
        self._patch_epochs()
        self._patch_callbacks()

    def _patch_messages(self, signals: Signals) -> None:
        epoch_loop, connector = self._trainer.fit_loop.epoch_loop, self._trainer._signal_connector
        if hasattr(epoch_loop, "_broadcast_sigterm_tensor"):
            # Lightning 2.5.2 and later broadcast on the default group before every batch, which would make local steps
            # lock-step, and swallow the error of a dead peer. The header of each sync carries the flag instead.
            self._patches.replace(epoch_loop, "_broadcast_sigterm_tensor", do_nothing)
        # Lightning's handler of SIGTERM broadcasts, too. Ours take its place as soon as it is there.
        register = after(connector.register_signal_handlers, signals.install)
        self._patches.replace(connector, "register_signal_handlers", register)

    def _patch_validation(self) -> None:
        """Keep a validation's random numbers apart: the loop draws a seed for its loader's iterator."""
        val_loop: Any = self._trainer.fit_loop.epoch_loop.val_loop
        # From Lightning 2.5.1 on, a resumed run skips a validation in the second one.
        for name in ("run", "increment_progress_to_evaluation_end"):
            if hasattr(val_loop, name):
                self._patches.replace(val_loop, name, _isolated(getattr(val_loop, name), self._position))

    def _patch_loaders(self, collective: Collective) -> None:
        """Detect when training loaders are made: by the loop, or by a hook that asks for the number of steps."""
        fit_loop = self._trainer.fit_loop
        position = self._position
        setup_data, load = fit_loop.setup_data, fit_loop._load_combined_loader_states

        def setup_training_data() -> None:
            # The stage of the trainer does not tell which loop's loaders these are.
            self.making_loaders = True
            try:
                setup_data()
            finally:
                self.making_loaders = False
            position.note_made()

        def before_iterator() -> None:
            assert fit_loop._combined_loader is not None
            end_epochs_together(fit_loop._combined_loader, collective)
            position.note_iterator()

        self._patches.replace(fit_loop, "setup_data", setup_training_data)
        # Lightning calls it between the making of the loaders and that of their iterator.
        self._patches.replace(fit_loop, "_load_combined_loader_states", after(load, before_iterator))

    def _patch_epochs(self) -> None:
        """Notify the data position of each epoch and batch, which are counted only in Lightning's loops."""
        fit_loop, epoch_loop = self._trainer.fit_loop, self._trainer.fit_loop.epoch_loop
        position = self._position
        replace = self._patches.replace
        replace(fit_loop, "on_advance_start", after(position.note_epoch, fit_loop.on_advance_start))
        replace(epoch_loop, "on_run_start", partial(position.begin_epoch, epoch_loop.on_run_start))
        replace(epoch_loop, "_on_before_fetch", after(position.note_fetch, epoch_loop._on_before_fetch))
        replace(epoch_loop, "reset", _unless_exact(epoch_loop.reset, position))
        replace(epoch_loop, "on_run_start", after(self._note_trained, epoch_loop.on_run_start))
        replace(epoch_loop, "on_run_start", after(self._accumulate_as_scheduled, epoch_loop.on_run_start))
        replace(fit_loop, "on_advance_end", partial(self._end_epoch, fit_loop.on_advance_end))

    @property
    def _trained(self) -> int:
        """Batches since the training began."""
        total: Any = self._trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def _note_trained(self) -> None:
        self._trained_before = self._trained

    def _accumulate_as_scheduled(self) -> None:
        """Set the gradient accumulation of a resumed epoch, whose start Lightning skips."""
        if self._trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            return  # it begins here, and Lightning has done it
        callbacks: list[Any] = getattr(self._trainer, "callbacks", [])
        for callback in callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(self._trainer)

    def _end_epoch(self, end: Callable[[], None]) -> None:
        """End a resumed epoch as one that began in this run, if it trained a batch of it, so that it has its metrics.

        Lightning skips a ``ReduceLROnPlateau`` at the end of every epoch that is resumed.
        """
        fit_loop = self._trainer.fit_loop
        if not fit_loop._restarting or self._trained == self._trained_before:
            end()
            return
        fit_loop._restarting = False  # as Lightning does right behind the end
        # A run that resumes from the full model alone lacks metrics of validations before: a warning, not an error.
        strict = [config for config in self._trainer.lr_scheduler_configs if config.strict]
        for config in strict:
            config.strict = False
        try:
            end()
        finally:
            for config in strict:
                config.strict = True

    def _patch_callbacks(self) -> None:
        # It compares parameters by value, and those of an absent block have none.
        self._patches.replace(BaseFinetuning, "filter_on_optimizer", staticmethod(not_in_optimizer))
        callbacks: list[Any] = getattr(self._trainer, "callbacks", [])
        for callback in callbacks:
            if isinstance(callback, LearningRateFinder):
                search = _unless_resuming(_failing_as_its_trial(callback.on_fit_start, self._trainer), self._trainer)
                self._patches.replace(callback, "on_fit_start", search)


def _unless_resuming(search: Callable[..., None], trainer: pl.Trainer) -> Callable[..., None]:
    """Skip the search of a resumed run: it loads its own checkpoint, and Lightning then forgets the one to resume."""

    def search_or_not(*args: Any) -> None:
        if trainer._checkpoint_connector._loaded_checkpoint:
            rank_zero_info("LearningRateFinder is skipped: the run resumes with the checkpoint's learning rate.")
        else:
            search(*args)

    return search_or_not


def _failing_as_its_trial(search: Callable[..., None], trainer: pl.Trainer) -> Callable[..., None]:
    """Let a search end with the error of its trial training: Lightning restores its checkpoint before it raises.

    A worker has only a part of the module then, and the others may be elsewhere.
    """
    fit_loop, connector = trainer.fit_loop, trainer._checkpoint_connector

    def search_or_raise(*args: Any) -> None:
        failed: list[BaseException] = []
        patches, usual_run, usual_restore = Patches(), fit_loop.run, connector.restore

        def run() -> None:
            try:
                usual_run()
            except BaseException as error:
                if isinstance(error, NotFinite):
                    error.args = (f"{error} In a search for the learning rate, lower its max_lr.",)
                failed.append(error)
                raise

        def restore(path: Any, *more: Any) -> None:
            if failed:
                trainer.strategy.remove_checkpoint(path)
                raise failed[0]
            usual_restore(path, *more)

        patches.replace(fit_loop, "run", run)
        patches.replace(connector, "restore", restore)
        try:
            search(*args)
        finally:
            patches.remove()

    return search_or_raise


def _unless_exact(reset: Callable[[], None], position: Position) -> Callable[[], None]:
    """Silence Lightning's warning that a run resumed in mid-epoch starts its loader anew, which ours does not."""

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
