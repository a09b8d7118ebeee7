"""A worker's session of one ``fit``: patches Lightning's loops, and runs the engine between batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from resist_lightning.comm.members import default_collective
from resist_lightning.comm.replicas import Replicas
from resist_lightning.engine.engine import Engine
from resist_lightning.methods.config import CommonConfig
from resist_lightning.strategies.averages import Averages
from resist_lightning.strategies.building import check_built
from resist_lightning.strategies.data.loader_processes import LoaderShield
from resist_lightning.strategies.first import FirstEvaluates
from resist_lightning.strategies.host import LightningHost
from resist_lightning.strategies.launching.checks import (
    check_memory,
    warn_of_batches_without_step,
    warn_of_early_end,
    warn_of_short_training,
)
from resist_lightning.strategies.launching.guard import Guard
from resist_lightning.strategies.launching.length import steps_left, total_steps
from resist_lightning.strategies.launching.signals import Signals
from resist_lightning.strategies.local_steps import LocalSteps, clip_if_any, unwrapped, warn_of_metrics
from resist_lightning.strategies.loop_patches import LoopPatches
from resist_lightning.strategies.patches import Patches, after
from resist_lightning.strategies.saving.checkpoint_callbacks import CheckpointCallbacks
from resist_lightning.strategies.saving.data_position import Position
from resist_lightning.strategies.saving.restarts import check_other_workers
from resist_lightning.strategies.saving.resumer import Resumer
from resist_lightning.strategies.saving.trainer_state import TrainerState
from resist_lightning.strategies.summary import division_in_words, sent_in_words
from resist_lightning.strategies.validation import order_validation


class FitSession:
    """A worker's part in one ``fit``. It is made before any hook of the user's, and its state can be read after it.

    Attributes:
        engine: of this worker; None until the module is complete.
        patches: undone by :meth:`remove`.
        signals: the signal handlers of this worker.
        first: the validations that worker 0 runs alone; None where all workers evaluate.
        trainer_state: the trainer's state for an exact resume.
        checkpoint_callbacks: learn of a failure to save.
        loops: the patched loops.
    """

    def __init__(
        self, trainer: pl.Trainer, config: CommonConfig, data: str, guard: Guard, resumer: Resumer, steps: LocalSteps
    ) -> None:
        self.engine: Engine | None = None
        self._trainer = trainer
        self._config = config
        self._data = data
        self._guard = guard
        self._resumer = resumer
        self._steps = steps
        self._has_trained = False
        self._synced_early = False
        self._told_of_overlap = False
        self._told_of_batches = False
        self.patches = Patches()
        collective = default_collective()
        self.signals = Signals(trainer, collective.members)
        # A hook of the user's may make the training loaders and start their processes, long before the first batch.
        self._shield = LoaderShield(self.signals.handled)
        self._shield.install()
        position = Position(trainer, keep_loaders=self._may_save_before_batch)
        self.trainer_state = TrainerState(trainer, position)
        self._averages = Averages(trainer, self._running, self.patches)
        self.checkpoint_callbacks = CheckpointCallbacks(trainer, self.patches, self._at_the_end)
        val_loop = trainer.fit_loop.epoch_loop.val_loop
        self.first = FirstEvaluates(trainer, self._running, self.patches) if config.first_evaluates else None
        if self.first is not None:
            self.first.patch_run(val_loop)  # before its random numbers are set apart, on all workers
        plugin = trainer.precision_plugin
        self.patches.replace(plugin, "clip_grad_by_value", partial(clip_if_any, plugin.clip_grad_by_value))
        self.loops = LoopPatches(trainer, position, self.signals, collective, self.patches)
        order_validation(trainer, self._running, self._averages, self.patches)
        if self.first is not None:
            self.first.patch_end(val_loop)
        self.patches.replace(val_loop, "on_run_start", after(self._sync_early, val_loop.on_run_start))

    def make_engine(self) -> Engine:
        """Make the engine, when the module is complete and its optimizers are made."""
        trainer = self._trainer
        strategy: Any = trainer.strategy
        self.engine = engine = Engine(
            trainer.lightning_module,
            [unwrapped(optimizer) for optimizer in strategy.optimizers],
            self._config,
            forward_context=trainer.precision_plugin.forward_context,
            host=LightningHost(trainer, self.signals, self._data, default_collective().members),
            total_steps=total_steps(trainer, default_collective()) if self._config.needs_total_steps else None,
            device=strategy.root_device,
        )
        check_other_workers(strategy.options, engine.layout)
        engine.replicas.find_unused_parameters = strategy.options.find_unused_parameters
        engine.steps.on_step = self.count_step  # for steps that Lightning does not see
        self._averages.follow(engine)
        division = division_in_words(engine.layout, engine.collective.members)
        rank_zero_info(f"{type(strategy).__name__}: {division}")
        check_built(engine, trainer, self.patches)
        return engine

    def begin_training(self, prepare: Callable[[Engine], None]) -> None:
        """Called before the first batch: from here on this worker holds its part of the module only.

        Collective: every worker must call this.

        Args:
            prepare: called when the state to resume from is known, before the engine starts.
        """
        trainer, engine = self._trainer, self.engine
        assert engine is not None
        self._guard.look_up()
        if self._has_trained:  # LearningRateFinder has trained in this `fit`, and has put everything back
            engine = self.make_engine()
        self._has_trained = True
        engine.swaps.add(trainer.strategy._lightning_optimizers)
        if self._config.needs_total_steps:
            engine.resumption.steps_left = steps_left(trainer, engine.collective)
        self._resumer.start(engine, self.trainer_state, prepare, type(trainer.strategy).__name__)
        check_memory(engine, trainer)
        self._averages.begin()
        self._steps.begin_training()
        if engine.collective.workers > 1:
            warn_of_short_training(trainer, engine.clock, engine.layout.without_effect, alone=self._config.trains_alone)
        engine.sync.part_guard.stepping = False  # not None, as in a plain loop: `training_step` tells

    def before_batch(self, batch_idx: int) -> None:
        """Called before each batch: the only place where training syncs, and where signals take effect."""
        engine = self.engine
        assert engine is not None
        engine.steps.check_batch(self._trainer.accumulate_grad_batches)
        self._guard.check()
        # In this order: a sync tells all workers of signals, and the snapshot before they act has that sync in it.
        synced = engine.sync_if_due() or self._synced_early
        if synced:
            self._synced_early = False
            self._tell_of_overlap(engine)
            self._resumer.write_snapshot(engine, self.trainer_state, ending=self.signals.ending)
        # Not between the border of an overlapped sync and its end, when it is applied and the snapshot has it.
        if not engine.sync.under_way:
            # A request may be known from an evaluation in mid-round, where no snapshot can be written.
            self.signals.act(may_end=synced or not self._resumer.writes_snapshots)
        if batch_idx == 1:  # the first batch has logged its metrics
            warn_of_metrics(self._trainer)
        self._steps.begin_batch()
        if engine.collective.workers > 1 and not self._told_of_batches:
            self._told_of_batches = warn_of_batches_without_step(self._trainer, engine, self._steps.idle)

    @property
    def replicas(self) -> Replicas:
        """The members of this worker."""
        assert self.engine is not None
        return self.engine.replicas

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's training step, so that the gradients of a worker's members are averaged."""
        assert self.engine is not None
        module = self._trainer.lightning_module
        call = self.replicas.call if module.automatic_optimization else self.replicas.call_with_backward
        with self.engine.sync.part_guard.training_step():
            return call(module.training_step, *args, **kwargs)

    def prepare_backward(self, loss: Tensor) -> None:
        """Called before each backward pass."""
        assert self.engine is not None
        self.engine.losses.note(loss, self.engine.clock.step)
        if not self._trainer.lightning_module.automatic_optimization:
            self.replicas.prepare_backward(loss)

    def count_step(self) -> None:
        """Called after every step of every optimizer, a raw one too."""
        if (engine := self._running()) is not None:
            self._steps.count(engine)

    def end_training(self) -> None:
        """Called after the training, unless it was interrupted: the module becomes the full model."""
        if (engine := self._running()) is not None:
            if engine.collective.workers > 1 and not self.signals.ending:
                warn_of_early_end(self._trainer, engine)
            engine.finish()
            if engine.collective.workers > 1:
                rank_zero_info(f"{type(self._trainer.strategy).__name__}: {sent_in_words(engine)}")
            self._resumer.finish(engine, interrupted=self.signals.ending)
            self.signals.act()

    def begin_validation(self) -> None:
        """Called after the callbacks' and the module's own hooks: assemble the full model."""
        if (engine := self._running()) is not None:
            engine.begin_observation()

    def end_validation(self) -> None:
        """Called after ModelCheckpoint has saved: return to this worker's part."""
        if self.engine is None:
            return
        if self.engine.observing:  # unless weights were swapped: see `order_validation`
            self.engine.end_observation()
        self._averages.hide()
        self.engine.observation.own.forget_notes()

    def remove(self) -> None:
        """Undo all but the signal handlers, which must note signals until this worker has left the group."""
        self.patches.remove()
        self._shield.remove()

    def end(self) -> None:
        """Called last, after an error too. Signals that came too late for all workers to agree on are raised here."""
        if self.engine is not None:
            self.engine.abandon()
        self.signals.remove()

    def _sync_early(self) -> None:
        """Called before a validation and its hooks: run a sync that is due, so that it finds shared layers equal."""
        engine = self._running()
        if engine is not None and self._config.sync_before_evaluation:
            with torch.inference_mode(False):
                self._synced_early |= engine.sync_if_due()

    def _tell_of_overlap(self, engine: Engine) -> None:
        chosen = engine.layout.overlaps.in_words()
        if chosen and not self._told_of_overlap:
            self._told_of_overlap = True
            rank_zero_info(f"{type(self._trainer.strategy).__name__}: {chosen}")

    def _running(self) -> Engine | None:
        """The engine while it trains."""
        return self.engine if self.engine is not None and self.engine.running else None

    def _at_the_end(self) -> AbstractContextManager[None]:
        """Entered where callbacks save after an exception: the guard looks no more where all have agreed to stop."""
        return self._guard.around() if self.signals.acting else nullcontext()

    def _may_save_before_batch(self) -> bool:
        due = self.engine is not None and (self.engine.clock.due or self._synced_early)
        return due or self.signals.agreed


def making_training_loaders(session: FitSession | None) -> bool:
    """Whether Lightning makes the training's loaders now; ``session`` is None before the first ``fit``."""
    return session is not None and session.loops.making_loaders
