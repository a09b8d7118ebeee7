"""The base of the strategies: Lightning's hooks in the order of a training, passed on to the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from resist_lightning.comm.group import group_exists, messages_sent
from resist_lightning.comm.torch_collective import default_collective
from resist_lightning.engine.engine import Engine
from resist_lightning.engine.registry import make_layout, refuse_lazy
from resist_lightning.methods.config import CommonConfig
from resist_lightning.strategies.averages import Averages, check_averages
from resist_lightning.strategies.host import LightningHost
from resist_lightning.strategies.launching.launchers import (
    ScriptLauncher,
    check_callbacks,
    refuse_launch,
    warn_of_messages,
    warn_of_one_round,
)
from resist_lightning.strategies.launching.processes import ProcessLauncher
from resist_lightning.strategies.launching.signals import Signals
from resist_lightning.strategies.loop_patches import LoopPatches, resume_from_path_given
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.saving.checkpoint_callbacks import resolve_file_urls
from resist_lightning.strategies.saving.data_position import Position
from resist_lightning.strategies.saving.restarts import check_shrinking
from resist_lightning.strategies.saving.strategy import SavingStrategy
from resist_lightning.strategies.saving.trainer_state import TrainerState
from resist_lightning.strategies.validation import ValidationOrder


class SubnetStrategy(SavingStrategy):
    """Base of the strategies: every worker trains its part of the module and syncs once a round.

    Args:
        config: of the method.
        options: how workers are started and watched, and what is saved.
        data: the training data of a worker: its shard, all of it in a worker-specific order, or the same on all.
    """

    strategy_name: str

    def __init__(self, config: CommonConfig, options: StrategyOptions, data: Literal["shard", "copy", "same"]) -> None:
        super().__init__(options)
        self.config = config
        self._data = data
        self._patches: LoopPatches | None = None
        self._order: ValidationOrder | None = None
        self._averages: Averages | None = None
        self._stepped = False
        self._sent = 0  # collectives of this process, up to this batch

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._layer_sync is not None:
            raise ValueError(
                "sync_batchnorm=True contradicts local training: it would communicate in every step. Leave it out; "
                "the full model has batch-norm statistics of all workers anyway."
            )
        refuse_launch(self.cluster_environment, self.accelerator, self._start_method)
        if self._start_method == "popen":
            self._launcher = ScriptLauncher(self, self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = ProcessLauncher(self, start_method=self._start_method)

    def check_before_launch(self, trainer: pl.Trainer) -> None:
        """Called by the launcher, before any process starts: raise for what cannot work."""
        resolve_file_urls(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_callbacks(trainer)
        check_averages(trainer, self.config)
        check_shrinking(self.options)
        module = self.lightning_module
        if module is None or is_overridden("configure_model", module):
            return  # the workers make the model, after the launch
        if not (is_overridden("setup", module) and any(is_lazy(tensor) for tensor in module.parameters())):
            make_layout(module, self.config, self.num_nodes * self.num_processes)

    @override
    def setup_environment(self) -> None:
        """Called in each worker when it starts, before the user's hooks, any of which may make the training loaders."""
        super().setup_environment()
        trainer = self._trainer()
        if trainer.state.fn == TrainerFn.FITTING:
            self.signals = Signals(trainer)
            position = Position(trainer, keep_loaders=lambda: self.engine is not None and self.engine.clock.due)
            self._trainer_state = TrainerState(trainer, position)
            self._averages = Averages(trainer, lambda: self.engine)
            self._patches = LoopPatches(trainer, position, self.signals, default_collective())

    @property
    def _making_training_loaders(self) -> bool:
        return self._patches is not None and self._patches.making_loaders

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Called by Lightning for each loader: a shard per worker, or the full data set in a worker-specific order."""
        kwargs = super().distributed_sampler_kwargs
        if self._data == "copy" and self._making_training_loaders:
            return {
                "num_replicas": 1,
                "rank": 0,
                "seed": self.config.seed * kwargs["num_replicas"] + self.global_rank,
            }
        return kwargs

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Called when the module is complete and loaded: make optimizers and the engine."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_callbacks(trainer)
            check_averages(trainer, self.config)
            self.setup_optimizers(trainer)
        elif group_exists():
            refuse_lazy(self.model)
            _sync_module_states(self.model)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._make_engine(trainer)

    @override
    def on_train_start(self) -> None:
        """Called last before the first batch: from here on a worker holds its part of the module only."""
        assert self.engine is not None
        self.guard.look_up()
        if self._order is not None:  # LearningRateFinder has trained in this `fit`, and has put everything back
            self._order.remove()
            self._make_engine(self._trainer())
        assert self._averages is not None
        self._order = ValidationOrder(self._trainer(), self.engine, self._averages)
        self.engine.swaps.add(self._lightning_optimizers)
        self._start_engine(self.engine)
        self._averages.begin()
        if self.config.trains_alone:
            warn_of_one_round(self._trainer(), self.config.local_steps)
        self.engine.sync.guard.stepping = False

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Called for each batch, by automatic and manual optimization: the module is called to train."""
        assert self.engine is not None
        with self.engine.sync.guard.training_step():
            return super().training_step(*args, **kwargs)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Called before each batch: the only place where training syncs, and where signals take effect."""
        assert self.engine is not None
        assert self.signals is not None
        self._stepped = False
        self.engine.steps.check_batch(self._trainer().accumulate_grad_batches)
        self.guard.check()
        # In this order: a sync tells all workers of signals, and the snapshot before they act has that sync in it.
        if self.engine.sync_if_due():
            self._write_snapshot(self.engine)
        self.signals.act()
        if batch_idx == 1:  # the first batch has logged its metrics
            warn_of_messages(self._trainer())
        self._talked, self._sent = False, messages_sent()

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Called for every step of every optimizer of Lightning's; one that a gradient scaler skips counts too."""
        if self._scaled_by_hand():
            # A gradient scaler fails for an optimizer without gradients, such as one whose parameters are all absent.
            made = closure()
            if _has_nothing_here(optimizer):
                self._count_step()
                return made

            def closure() -> Any:
                return made

        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._count_step()
        return output

    def _scaled_by_hand(self) -> bool:
        assert self.lightning_module is not None
        scaler = getattr(self.precision_plugin, "scaler", None)
        return scaler is not None and not self.lightning_module.automatic_optimization

    def _count_step(self) -> None:
        """Called after every step of every optimizer, a raw one too. The first in a batch makes it a local step."""
        if self._stepped or self.engine is None or not self.engine.running:
            return
        self._stepped = True
        self.engine.count_step()
        if messages_sent() != self._sent and not self._talked and self.config.trains_alone:
            self._warn_once(_UNKNOWN_MESSAGES)

    @override
    def on_train_end(self) -> None:
        """Called last after the training, unless it was interrupted: the module becomes the full model."""
        if self.engine is not None and self.engine.running:
            self.engine.finish()
            if self._restarts is not None:
                self._restarts.end()
            self.resume_state = self.engine.checkpoint_state()
            assert self.signals is not None
            self.signals.act()

    @override
    def on_validation_start(self) -> None:
        """Called after the callbacks' and the module's own: assemble the full model."""
        if self.engine is not None and self.engine.running:
            self.engine.begin_observation()

    @override
    def on_validation_end(self) -> None:
        """Called after ModelCheckpoint has saved: return to the sub-network."""
        if self.engine is not None and self.engine.observing:
            self.engine.end_observation()
        if self._averages is not None:
            self._averages.hide()
        if self.engine is not None:
            self.engine.observation.forget_notes()

    @override
    def teardown(self) -> None:
        """Called at the end, after an error too."""
        if self._patches is not None:
            self._patches.remove()
            self._patches = None
        if self._order is not None:
            self._order.remove()
            self._order = None
        if self._averages is not None:
            self._averages.remove()
            self._averages = None
        if self._restarted:
            resume_from_path_given(self._trainer())
        super().teardown()  # leaves the group while signals can still be noted
        if self.engine is not None:
            self.engine.abandon()
        if self.signals is not None:
            signals, self.signals = self.signals, None
            signals.remove()
        if isinstance(self._launcher, ProcessLauncher):
            self._launcher.restore_interrupt()

    def _make_engine(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        assert self.signals is not None
        optimizers = [o._optimizer if isinstance(o, LightningOptimizer) else o for o in self.optimizers]
        self.engine = Engine(
            module,
            optimizers,
            self.config,
            forward_context=self.precision_plugin.forward_context,
            host=LightningHost(trainer, self.signals, self._data),
        )
        self.engine.steps.on_step = self._count_step
        assert self._averages is not None
        self._averages.follow(self.engine)
        rank_zero_info(f"{type(self).__name__}: {self.engine.layout.describe()}")


def _has_nothing_here(optimizer: Optimizer) -> bool:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return any(p.is_meta for p in parameters) and all(p.grad is None for p in parameters)


_UNKNOWN_MESSAGES = (
    "something sends messages in a training step: torch.distributed, or a metric with dist_sync_on_step=True. The "
    "workers wait for each other in every step, and where they are at different steps a message can pair with another "
    "worker's sync. Send them outside of training_step, by the strategy's reduce, broadcast or all_gather."
)
