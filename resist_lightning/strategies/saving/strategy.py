"""Saving and loading: checkpoints that hold the full model, and from which a run resumes exactly."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from resist_lightning.checkpoint.files import check_loadable
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.comm.group import group_exists
from resist_lightning.comm.torch_collective import default_collective
from resist_lightning.engine.engine import Engine
from resist_lightning.engine.registry import attach_hooks
from resist_lightning.errors import CheckpointNotWritten
from resist_lightning.strategies.loop_patches import resume_from
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.process_group import GroupStrategy
from resist_lightning.strategies.saving import checkpoint_files
from resist_lightning.strategies.saving.checkpoint_callbacks import CheckpointCallbacks, report_not_written
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY
from resist_lightning.strategies.saving.checkpoint_io import forgive_thread, load_checkpoint, snapshots_at, write_model
from resist_lightning.strategies.saving.restarts import Restarts, report_resume
from resist_lightning.strategies.saving.trainer_state import TrainerState


class SavingStrategy(GroupStrategy):
    """A strategy whose workers hold parts of the model, and whose checkpoints hold all of it."""

    def __init__(self, options: StrategyOptions) -> None:
        super().__init__(options)
        self._restarts: Restarts | None = None  # where snapshots are written
        self._source: Restarts | None = None  # snapshots from which the run resumes
        self._restarted = False
        self._checked = False  # whether what Lightning and its loaders add was found loadable
        self._unwritten = False  # whether the newest checkpoint could not be written
        self._trainer_state: TrainerState | None = None  # since the last `fit` began
        self._loaded_from: _PATH = ""
        self._resume_state: dict[str, Any] = {}
        self._resume_for: nn.Module | None = None
        self.last_written = ""  # the newest checkpoint that exists; callbacks name theirs before it is written
        self._saved: dict[str, Any] = {}
        self._own: dict[str, Any] | None = None
        self._written_as: dict[str, str] = {}  # worker 0's names of checkpoints that this worker named differently
        self._callbacks: CheckpointCallbacks | None = None
        self._snapshot: dict[str, Any] | None = None

    @property
    def snapshot_folder(self) -> str | None:
        """The folder of this run's snapshots, once there are some."""
        folder = self._restarts.folder if self._restarts is not None else None
        return str(folder.path) if folder is not None and folder.newest_first() else None

    @override
    def setup_environment(self) -> None:
        """Called in each worker when it starts. After a restart by torchrun the run resumes from snapshots."""
        super().setup_environment()
        trainer, self._restarts = self._trainer(), None
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._callbacks = CheckpointCallbacks(trainer)
        if (folder := self.options.snapshot_folder) is not None:
            self._restarts = Restarts(folder, self.options, default_collective())
            self._restarted = self._restarts.restarted()
            if self._restarted:
                resume_from(trainer, str(folder))

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The full model's. Collective in training: every worker must call this, as Trainer.save_checkpoint does."""
        if self._trainer_state is not None and self._trainer_state.dumping:
            return {}
        engine = self.engine
        if engine is None or not engine.running:
            self._saved, self._own = self.resume_state, None
            if self._trainer_state is not None:
                self._saved = self._trainer_state.with_modes(self._saved)
            return super().lightning_module_state_dict()
        if self.interrupted:
            return {}  # save_checkpoint refuses to write it
        if engine.observing:
            return self._copy_full_model(engine)
        with engine.layout.showing_companion(), engine.full_model("checkpoint"):
            return self._copy_full_model(engine)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The parameter groups only: optimizer state differs between workers, and each writes its own file."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return {**inner.state_dict(), "state": {}}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write the full model, and what only this package reads under a key of its own.

        Collective: every worker must call this, as Trainer.save_checkpoint does; its files go where worker 0 says.
        """
        # Lightning has called `lightning_module_state_dict` just before, which left these.
        own, saved = self._own, self._saved
        self._own, self._saved = None, {}
        if self.engine is not None and self.engine.running and self.interrupted:
            refused = f"{filepath} is not written: after an error no worker can assemble the full model."
            report_not_written(refused, self._callbacks)
            return
        collective = default_collective() if group_exists() and not self.interrupted else SoloCollective()
        if not self.is_global_zero and collective.workers == 1:
            return  # the workers have parted, or one has failed before the training: worker 0 alone writes the model
        if "optimizer_states" not in checkpoint:
            own = None  # weights only
        if saved:
            checkpoint[CHECKPOINT_KEY] = saved
        if own is not None and not self._checked:
            check_loadable(own["host"])
        path = checkpoint_files.agree_on_path(filepath, collective)
        self._written_as[str(filepath)] = path
        save = partial(super().save_checkpoint, checkpoint, filepath, storage_options=storage_options)
        write = partial(write_model, save, checkpoint, path, self.checkpoint_io, self.options.on_save_error == "warn")
        failure = None
        with self.engine.activity.during("saving") if self.engine is not None and own is not None else nullcontext():
            try:
                checkpoint_files.save_together(checkpoint, own, path, write, collective)
            except CheckpointNotWritten as error:
                if self.options.on_save_error == "raise":
                    raise
                failure = error
        self._unwritten = failure is not None
        if failure is not None:
            report_not_written(f"{failure} The training goes on.", self._callbacks)
        elif own is not None:
            self.last_written = path

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Called by callbacks, on all workers: each removes what it has written, if what takes its place is there."""
        if self._unwritten:
            rank_zero_warn(f"{filepath} is kept: the checkpoint that should take its place could not be written.")
            return
        super().remove_checkpoint(filepath)
        checkpoint_files.remove(self._written_as.pop(str(filepath), filepath), self.global_rank)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Called by Lightning to resume, or to evaluate a checkpoint."""
        path = checkpoint_path
        if not checkpoint_files.exists(path):
            path = self._written_as.get(str(path), path)
        self._loaded_from, self._snapshot, self._source = path, None, None
        folder = snapshots_at(path, self.checkpoint_io)
        if folder is not None and self._trainer().state.fn == TrainerFn.FITTING:
            return self._load_snapshot(folder)
        options = {} if weights_only is None else {"weights_only": weights_only}  # unknown to Lightning 2.5
        return load_checkpoint(partial(super().load_checkpoint, path, **options), path, self.checkpoint_io)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the full model; what belongs to the training is restored in :meth:`setup`."""
        if self._snapshot is None:
            super().load_model_state_dict(checkpoint, strict=strict)
        state = dict(checkpoint.get(CHECKPOINT_KEY, {}))
        if self._trainer().state.fn != TrainerFn.FITTING:
            for within in ("files", "modes"):  # a later fit resumes from the full model alone
                state.pop(within, None)
        self.resume_state = state

    @property
    def resume_state(self) -> dict[str, Any]:
        """The state of the training that made the module's weights; empty for any other module.

        Setting it attaches to the module what belongs to the full model and does not fold into weights.
        """
        return self._resume_state if self._resume_for is self.lightning_module else {}

    @resume_state.setter
    def resume_state(self, state: dict[str, Any]) -> None:
        self._resume_state, self._resume_for = state, self.lightning_module
        if self.lightning_module is not None:
            attach_hooks(self.lightning_module, state)

    @override
    def teardown(self) -> None:
        """Called at the end, after an error too: callbacks are the user's again."""
        if self._callbacks is not None:
            self._callbacks.remove()
            self._callbacks = None
        if self.options.on_save_error == "warn":
            forgive_thread(self.checkpoint_io, wait=True)
        super().teardown()

    def _start_engine(self, engine: Engine) -> None:
        """Start the engine from what was loaded. Collective: every worker must call this."""
        snapshot, self._snapshot = self._snapshot, None
        read = partial(checkpoint_files.read_own, self.resume_state, self._loaded_from, self.global_rank)
        own = snapshot["own"] if snapshot is not None else read()
        same = engine.restore(self.resume_state, own)
        if self._source is not None and not same:
            engine.resumption.put(engine.layout.full_tensors(self._source.states()))
        self._source = None
        if self._restarts is not None:
            self._restarts.begin()
        self._prepare(engine)
        assert self._trainer_state is not None
        modes = self._trainer_state.position.modes
        # The engine starts with the modes that the run began with: what was switched later is a change of these.
        modes.begin(engine.layout.module)
        exact = engine.start()
        modes.apply(self.resume_state.get("modes", {}))
        if own is not None and exact:
            self._trainer_state.load_state_dict(own["host"])
        if self.resume_state:
            source, files = str(self._loaded_from or "the training before"), "files" in self.resume_state
            report_resume(type(self).__name__, source, engine, same=same, exact=exact, files=files)

    def _prepare(self, engine: Engine) -> None:
        """Called before the engine starts from what was loaded. Collective: every worker must call this."""

    def _load_snapshot(self, path: Path) -> dict[str, Any]:
        """What Lightning keeps in checkpoints, from a folder of snapshots. Collective: every worker must call this."""
        own_folder = self._restarts is not None and self._restarts.folder.path.resolve() == path.resolve()
        self._source = self._restarts if own_folder else Restarts(path, self.options, default_collective())
        assert self._source is not None
        self._snapshot = self._source.choose()
        if self._restarted:
            self._source.check_workers()
        return {**self._snapshot["lightning"], "state_dict": {}, CHECKPOINT_KEY: self._snapshot["place"]}

    def _write_snapshot(self, engine: Engine) -> None:
        """Between two rounds, before the batch that has been fetched is trained. Sends nothing."""
        ending = self.signals is not None and self.signals.ending
        if self._restarts is None or not (ending or self._restarts.due(engine.clock.round)):
            return
        assert self._trainer_state is not None
        state = {
            "place": self._trainer_state.with_modes(engine.resumption.place()),
            "own": {**engine.resumption.state_dict(), "host": self._trainer_state.state_dict(engine)},
            "lightning": self._trainer_state.checkpoint_without_model(),
        }
        if not self._checked:
            check_loadable({**state["lightning"], **state["own"]["host"]})
            self._checked = True
        self._restarts.write(state, engine.clock.round)

    def _copy_full_model(self, engine: Engine) -> dict[str, Any]:
        assert self._trainer_state is not None
        self._saved = self._trainer_state.with_modes(engine.checkpoint_state())
        self._own = {**engine.resumption.state_dict(), "host": self._trainer_state.state_dict(engine)}
        state = super().lightning_module_state_dict()
        return {key: v.detach().cpu().clone() if isinstance(v, Tensor) else v for key, v in state.items()}
