"""Resumes runs from checkpoints and snapshots, and writes a run's snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from resist_lightning.checkpoint.files import check_loadable
from resist_lightning.comm.members import default_collective
from resist_lightning.engine.engine import Engine
from resist_lightning.engine.registry import attach_hooks
from resist_lightning.state.host_copies import copied
from resist_lightning.state.names import as_named_in
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.patches import Patches
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY, read_own
from resist_lightning.strategies.saving.checkpoint_io import load_checkpoint, snapshots_at
from resist_lightning.strategies.saving.members import detached, gather_members, of_member
from resist_lightning.strategies.saving.restarts import Restarts
from resist_lightning.strategies.saving.trainer_state import TrainerState


class Resumer:
    """Loads a run's resume state, starts the engine from it, and writes snapshots of the run."""

    def __init__(self, options: StrategyOptions) -> None:
        self._options = options
        self._snapshots: Restarts | None = None  # of this run
        self._source: Restarts | None = None  # snapshots from which the run resumes
        self._loaded: dict[str, Any] | None = None  # this worker's state in the source
        self._restarted = False  # by torchrun
        self._checked = False  # whether Lightning's and the loaders' part of snapshots was found loadable
        self._loaded_from: _PATH = ""
        self._state: dict[str, Any] = {}
        self._state_of: nn.Module | None = None

    @property
    def snapshot_folder(self) -> str | None:
        """The folder of this run's snapshots, once there are some."""
        folder = self._snapshots.folder if self._snapshots is not None else None
        return str(folder.path) if folder is not None and folder.newest_first() else None

    @property
    def writes_snapshots(self) -> bool:
        """Whether this run writes snapshots."""
        return self._snapshots is not None

    @property
    def from_snapshot(self) -> bool:
        """Whether a snapshot was loaded, which has no state dict of the full model."""
        return self._loaded is not None

    def begin_fit(self, trainer: pl.Trainer, patches: Patches) -> None:
        """Called when a worker begins to fit: after a restart by torchrun, it resumes from the run's snapshots.

        Collective: every worker must call this, in the same order.
        """
        self._snapshots, self._restarted = None, False
        folder = self._options.snapshot_folder
        if folder is None:
            return
        self._snapshots = Restarts(folder, self._options, default_collective())
        self._restarted = self._snapshots.restarted()
        if self._restarted:
            # Whatever `ckpt_path` the caller of `fit` gave: it belongs to the first start.
            connector = trainer._checkpoint_connector
            start = connector.resume_start
            patches.replace(connector, "resume_start", lambda _=None, **options: start(str(folder), **options))

    def load(self, path: _PATH, plugin: CheckpointIO, read: Callable[[], Any], trainer: pl.Trainer) -> dict[str, Any]:
        """Load a checkpoint; or Lightning's part of one, from a folder of snapshots.

        Collective for snapshots: every worker must call this, in the same order.

        Args:
            path: of the checkpoint or of the folder.
            plugin: that ``read`` uses.
            read: reads a checkpoint.
            trainer: of this worker; snapshots are loaded to train only.
        """
        self._loaded_from, self._loaded, self._source = path, None, None
        folder = snapshots_at(path, plugin)
        if folder is None or trainer.state.fn != TrainerFn.FITTING:
            return load_checkpoint(read, path, plugin)
        self._source = self._restarts_at(folder)
        chosen = self._source.choose()
        self._loaded = {**copied({**chosen, "own": {}}), "own": detached(chosen["own"])}
        if self._restarted:
            self._source.check_workers()
        return {**self._loaded["lightning"], "state_dict": {}, CHECKPOINT_KEY: self._loaded["place"]}

    def _restarts_at(self, folder: Path) -> Restarts:
        if self._snapshots is not None and self._snapshots.folder.path.resolve() == folder.resolve():
            return self._snapshots  # it continues the run that it resumes
        return Restarts(folder, self._options, default_collective())

    def take(self, checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> None:
        """Note a loaded checkpoint's state beside the model, which :meth:`start` restores."""
        state = dict(checkpoint.get(CHECKPOINT_KEY, {}))
        if trainer.state.fn != TrainerFn.FITTING:
            # A later fit resumes from the full model alone.
            state.pop("files", None)
            state.pop("modes", None)
            if trainer.global_step == 0 and state:
                # So a later fit trains from its first step, and rounds that are treated apart are counted from there.
                state.update(round=0, step=0, steps_before=0)
                state.pop("local_steps", None)
            state = copied(state)  # it was mapped, and is kept
        self.set_state(state, trainer.lightning_module)

    def state_of(self, module: nn.Module | None) -> dict[str, Any]:
        """The state of the training that made the module's weights; empty for any other module."""
        return self._state if self._state_of is module else {}

    def set_state(self, state: dict[str, Any], module: nn.Module) -> None:
        """Note the state of the training behind the module's weights, and attach hooks where these are not enough."""
        self._state, self._state_of = state, module
        attach_hooks(module, state)

    def start(
        self, engine: Engine, trainer_state: TrainerState, prepare: Callable[[Engine], None], strategy: str
    ) -> None:
        """Start the engine from the loaded state. Collective: every worker must call this.

        Args:
            engine: of this worker.
            trainer_state: gets its part of the worker's own file or snapshot.
            prepare: called before the engine starts. Collective.
            strategy: its name, for messages.
        """
        state = self.state_of(engine.module)
        if self._loaded is not None:
            own = self._loaded["own"]
        else:
            own = read_own(state, self._loaded_from, engine.collective.worker)
        own = of_member(own, engine.collective)
        same = engine.restore(state, own)
        if self._source is not None and not same:
            # Snapshots have no full model, and these workers' parts are not those that were written.
            states = (as_named_in(engine.module, each) for each in self._source.states())
            engine.resumption.put(engine.layout.full_tensors(states))
        self._source = self._loaded = None
        if self._snapshots is not None:
            self._snapshots.begin()
        prepare(engine)
        modes = trainer_state.position.modes
        # The engine starts with the modes that the run began with: later switches are changes of these.
        modes.begin(engine.layout.module)
        exact = engine.start()  # where one worker lacks its own file, nobody uses its own
        # From here on the module's weights are not those of the checkpoint, to which a `fit` after an error must not go
        # back. LearningRateFinder, which trains first, loads the state again.
        self._state = {}
        modes.apply(as_named_in(engine.module, state.get("modes", {})))
        if own is not None and exact:
            trainer_state.load_state_dict(as_named_in(engine.module, own["host"]))
        if state:
            source = str(self._loaded_from or "the training before")
            report_resume(strategy, source, engine, same=same, exact=exact, files="files" in state)

    def write_snapshot(self, engine: Engine, trainer_state: TrainerState, *, ending: bool) -> None:
        """Write a snapshot if one is due, or if the run is ending. Sends nothing to other workers.

        Collective: every member of a worker must call this, in the same order.

        Call it between two rounds, before the batch that has been fetched is trained.
        """
        if self._snapshots is None or not (ending or self._snapshots.due(engine.clock.round)):
            return
        state = {
            "place": trainer_state.with_modes(engine.resumption.place()),
            "own": gather_members(trainer_state.of_worker(engine), engine.collective),
            "lightning": trainer_state.checkpoint_without_model(),
        }
        if not self._checked:  # once: it reads all of it, and the types stay the same
            own = state["own"]
            check_loadable({**state["lightning"], "optimizers": own["optimizers"], **own["host"]})
            self._checked = True
        self._snapshots.write(state, engine.clock.round)

    def finish(self, engine: Engine, *, interrupted: bool) -> None:
        """Called when the training has ended well: its snapshots go, and its state stays with the module.

        Where a signal ends the program now, the snapshots stay: torchrun may start it again, to do what follows.
        """
        if self._snapshots is not None and not interrupted:
            self._snapshots.end()
        self.set_state(engine.checkpoint_state(), engine.module)


def report_resume(name: str, source: str, engine: Engine, *, same: bool, exact: bool, files: bool) -> None:
    """Tell the user how much of a checkpoint the training resumes from.

    Args:
        name: of the strategy.
        source: the checkpoint.
        engine: that was started from it.
        same: whether workers and settings are those of the checkpoint.
        exact: whether every worker has its own state.
        files: whether the checkpoint names files of the workers.
    """
    workers = engine.collective.workers
    where = f"round {engine.clock.round} after {engine.clock.step} local steps"
    if exact:
        rank_zero_info(f"{name}: resumes exactly where the checkpoint was written, in {where}.")
    elif not same:
        changed = engine.resumption.changed_settings
        values = f" ({'; '.join(changed)})" if changed else ""
        rank_zero_info(
            f"{name}: {source} was written with other workers or settings{values}. The {workers} worker(s) here resume "
            f"from its full model, with a new partition, in {where}; optimizer state is reset."
        )
    elif not files:
        rank_zero_info(
            f"{name}: {source} has only the full model, as after a training, after an evaluation, or on another file "
            f"system. The training resumes from it in {where}."
        )
    else:
        rank_zero_warn(
            f"{name}: some of the workers' own files beside {source} are missing. The training resumes from the full "
            f"model in {where}; optimizer state, random numbers and the position in the data are reset. Keep a "
            "checkpoint's `.workers` folder beside it to resume exactly."
        )
