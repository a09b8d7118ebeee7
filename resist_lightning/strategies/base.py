"""The base class of the strategies: passes Lightning's hooks on to the objects that do the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from resist_lightning.engine.engine import Engine
from resist_lightning.engine.registry import refuse_lazy
from resist_lightning.methods.config import CommonConfig
from resist_lightning.strategies.building import building, loading, move_built, undo_layer_sync, without_module
from resist_lightning.strategies.data.shards import own_order, warn_without_own_order
from resist_lightning.strategies.first import FirstEvaluates, check_full_model, evaluate_alone
from resist_lightning.strategies.launching.checks import check_callbacks, check_run
from resist_lightning.strategies.launching.guard import Guard
from resist_lightning.strategies.launching.launchers import make_launcher
from resist_lightning.strategies.launching.processes import ProcessLauncher
from resist_lightning.strategies.local_steps import LocalSteps, take_step
from resist_lightning.strategies.messages import MessagesStrategy
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.process_group import ProcessGroup
from resist_lightning.strategies.saving.checkpoint_io import or_atomic
from resist_lightning.strategies.saving.optimizer_groups import groups_of, load_optimizers
from resist_lightning.strategies.saving.resumer import Resumer
from resist_lightning.strategies.saving.saver import Saver
from resist_lightning.strategies.session import FitSession, making_training_loaders


class SubnetStrategy(MessagesStrategy):
    """Base of the strategies: every worker trains its part of the module and syncs once a round.

    Lightning shards data and reduces metrics for subclasses of ``DDPStrategy`` only; the module is never wrapped in
    DDP. After an error nothing is sent any more, so that no worker waits for one that is gone.
    """

    strategy_name: str

    def __init__(self, config: CommonConfig, options: StrategyOptions, data: Literal["shard", "copy", "same"]) -> None:
        super().__init__(**options.for_lightning())
        self.config = config
        self.options = options
        self._data = data  # a shard per worker, all of it in a worker-specific order, or the same on all
        self.group = ProcessGroup(options)
        self.guard = Guard(options.silence)
        self.resumer = Resumer(options)
        self.saver = Saver(forgiving=options.on_save_error == "warn")
        self.steps = LocalSteps()
        self.session: FitSession | None = None  # of the newest `fit`
        self.first: FirstEvaluates | None = None

    @property
    @override
    def engine(self) -> Engine | None:
        """The engine that trains and syncs this worker's part; None before the first ``fit``."""
        return self.session.engine if self.session is not None else None

    # Before the training: launcher, process group, loaders, model.

    @override
    def _configure_launcher(self) -> None:
        self._launcher = make_launcher(self, self._start_method, sync_batchnorm=self._layer_sync is not None)

    def check_before_launch(self, trainer: pl.Trainer) -> None:
        """Called by the launcher, before any process starts: raise for runs that cannot work."""
        check_full_model(trainer, self.engine)
        check_run(trainer, self.config, self.options, self.num_nodes * self.num_processes)

    @override
    def setup_environment(self) -> None:
        """Called in each worker when it starts, before the user's hooks."""
        super().setup_environment()
        trainer = self._trainer()
        if trainer.state.fn == TrainerFn.FITTING:
            self.group.split(self.num_processes)
            self.guard.begin(trainer, lambda: self.engine, self.options.timeout)
            self.session = FitSession(trainer, self.config, self._data, self.guard, self.resumer, self.steps)
            self.first = self.session.first
            self.resumer.begin_fit(trainer, self.session.patches)
        else:
            self.first = evaluate_alone(trainer, self.config)

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        assert self.cluster_environment is not None
        self.group.join(self.cluster_environment, self._get_process_group_backend(), self.root_device)
        super().setup_distributed()

    @override
    def _get_process_group_backend(self) -> str:
        devices = self.parallel_devices or []
        if self._process_group_backend is None and self.root_device.type == "cuda" and len(set(devices)) < len(devices):
            return "gloo"  # NCCL refuses several ranks on one GPU
        return str(super()._get_process_group_backend())

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Called for each loader: a shard per process, or all data in a worker-specific order, shared by members."""
        kwargs = super().distributed_sampler_kwargs
        if not making_training_loaders(self.session):
            return self.first.whole_data(kwargs) if self.first is not None else kwargs
        return own_order(kwargs, self.group.members, self.config.seed) if self._data == "copy" else kwargs

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Called for each loader, behind Lightning's own changes to it."""
        if making_training_loaders(self.session) and self._data == "copy" and self.world_size > self.group.members:
            warn_without_own_order(dataloader, self.distributed_sampler_kwargs, self._trainer())
        return super().process_dataloader(dataloader)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Called when the module is complete and loaded: make optimizers and the engine."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_callbacks(trainer, self.config)  # again: the module may have added some
        else:
            refuse_lazy(trainer.lightning_module)
        if fitting or self.first is None:
            super().setup(trainer)
        else:
            self.first.set_up(self, trainer)
        if fitting:
            self._session().make_engine()

    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        """Entered for ``configure_model``, and by ``Trainer.init_module``."""
        return building(self, super().tensor_init_context(empty_init=False), empty=bool(empty_init))

    @override
    def model_to_device(self) -> None:
        move_built(self._trainer(), self.root_device)

    @override
    def configure_ddp(self) -> None:
        """Called by ``setup``; the module is not wrapped in DDP, which would send gradients in every step."""

    # The training: steps are counted within a batch, and everything else happens between two.

    @override
    def on_train_start(self) -> None:
        self._session().begin_training(self._prepare)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._session().before_batch(batch_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._session().training_step(*args, **kwargs)

    @override
    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        self._session().prepare_backward(closure_loss)

    @override
    def block_backward_sync(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._session().replicas.local_gradients()

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: torch.nn.Module | None = None, **kwargs: Any
    ) -> Any:
        """Called for every step of every optimizer of Lightning's; one that a gradient scaler skips counts too."""
        step = partial(super().optimizer_step, model=model, **kwargs)
        output = take_step(self._trainer(), step, optimizer, closure)
        self._session().count_step()
        return output

    @override
    def on_train_end(self) -> None:
        self._session().end_training()

    @override
    def on_validation_start(self) -> None:
        if self.session is not None:
            self.session.begin_validation()

    @override
    def on_validation_end(self) -> None:
        if self.session is not None:
            self.session.end_validation()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self.guard.check()  # for every batch of every loop, so a lost worker ends validations and tests too
        return super().batch_to_device(batch, device, dataloader_idx)

    # Saving and loading.

    @property  # type: ignore[explicit-override] # which mypy does not see here
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin that reads and writes the model's file: the Trainer's, or else :class:`AtomicIO`."""
        self._checkpoint_io = or_atomic(self._checkpoint_io)  # in the constructor it would pass for the user's
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The full model's state. Collective in training: every worker must call this, as in save_checkpoint."""
        # Not by the trainer: the main process of forked workers has a module that no trainer is attached to.
        assert self.lightning_module is not None
        module = self.lightning_module
        state = self.resumer.state_of(module)
        return self.saver.take(module, self.session, state, self.checkpoint_io, interrupted=self.interrupted)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The parameter groups only: optimizer state differs between workers, and each writes its own file."""
        return groups_of(optimizer)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        load_optimizers(self, checkpoint, super().load_optimizer_state_dict)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write the full model, and beside it this package's own state. Collective, as Trainer.save_checkpoint."""
        write = partial(self.checkpoint_io.save_checkpoint, checkpoint, filepath, storage_options=storage_options)
        self.saver.save(checkpoint, filepath, write, self.checkpoint_io, self.global_rank, interrupted=self.interrupted)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        self.saver.remove(filepath, self.checkpoint_io, self.global_rank, self.group.members)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        path = self.saver.find(checkpoint_path)
        options = {} if weights_only is None else {"weights_only": weights_only}  # unknown to Lightning 2.5
        read = partial(super().load_checkpoint, path, **options)
        return self.resumer.load(path, self.checkpoint_io, read, self._trainer())

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        # A snapshot has each worker's part and no full model; and a worker with only a part has no memory for one.
        if not self.resumer.from_snapshot and not (self.engine is not None and self.engine.incomplete):
            with loading(self._trainer(), self.root_device):
                super().load_model_state_dict(checkpoint, strict=strict)
        self.resumer.take(checkpoint, self._trainer())

    @override
    def teardown(self) -> None:
        """Called at the end, after an error too: leave the group, and move this worker's part to the CPU."""
        if self.first is not None:
            self.first.remove()
        if self.session is not None:
            self.session.remove()
        self.saver.end(self.checkpoint_io)
        self.group.leave(self.guard, self.barrier, interrupted=self.interrupted)
        with without_module(self):
            super().teardown()
        if self.session is not None:
            self.session.end()
        undo_layer_sync(self)
        if isinstance(self._launcher, ProcessLauncher):
            self._launcher.restore_interrupt()

    @property
    @override
    def interrupted(self) -> bool:
        """Whether an error or the user has ended the run, so that nothing may be sent any more."""
        trainer = self.lightning_module._trainer if self.lightning_module is not None else None
        return trainer is not None and trainer.interrupted and not self.ends_together()

    def ends_together(self) -> bool:
        """Whether all workers act upon a signal now: they may communicate and save, although the run is interrupted."""
        return self.session is not None and self.session.signals.acting

    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _session(self) -> FitSession:
        assert self.session is not None
        return self.session

    def _prepare(self, engine: Engine) -> None:
        """Called before the engine starts from the loaded state. Collective: every worker must call this."""
