"""Writes a strategy's checkpoints: the full model in one file, and beside it each worker's resume state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from resist_lightning.checkpoint.files import check_loadable
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.comm.members import default_collective
from resist_lightning.engine.engine import Engine
from resist_lightning.errors import CheckpointNotWritten
from resist_lightning.strategies.saving import checkpoint_files
from resist_lightning.strategies.saving.checkpoint_callbacks import report_not_written
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY
from resist_lightning.strategies.saving.checkpoint_io import AtomicIO, forgive_thread, write_model
from resist_lightning.strategies.saving.members import gather_members
from resist_lightning.strategies.saving.trainer_state import TrainerState, use_python_numbers
from resist_lightning.strategies.session import FitSession


class Saver:
    """Takes the state for a checkpoint, writes it, and removes it.

    Lightning asks for the state dict first, and then has it written. State that only this package reads is kept here
    between the two calls.

    Args:
        forgiving: whether the training continues when a checkpoint cannot be written.

    Attributes:
        last_written: the newest checkpoint that exists; callbacks name theirs before it is written.
        collected: whether another party (Ray) collects the files of a checkpoint from every worker's own path.
    """

    def __init__(self, *, forgiving: bool) -> None:
        self.last_written = ""
        self.collected = False
        self._forgiving = forgiving
        self._failed = False  # whether the newest checkpoint could not be written
        self._written_as: dict[str, str] = {}  # worker 0's names of checkpoints, by this worker's
        self._session: FitSession | None = None
        self._saved: dict[str, Any] = {}
        self._own: dict[str, Any] | None = None

    def take(
        self,
        module: pl.LightningModule,
        session: FitSession | None,
        resume_state: dict[str, Any],
        plugin: CheckpointIO,
        *,
        interrupted: bool,
    ) -> dict[str, Any]:
        """The full model's state dict; empty where there is none. Collective while the engine runs.

        In training, all processes but the first get it without values, on the meta device: they write no model.

        Args:
            module: the user's.
            session: of the newest ``fit``.
            resume_state: saved with a module that is complete: the state of the training that made its weights.
            plugin: will write it.
            interrupted: whether an error has ended the run.
        """
        self._session = session
        self._own, self._saved = None, resume_state
        if session is None:
            return module.state_dict()
        engine = session.engine
        if engine is None or not engine.running:
            self._saved = session.trainer_state.with_modes(resume_state)
            if engine is not None and engine.incomplete:
                return _without_values(engine, partial=True)
            return module.state_dict()
        if interrupted or session.trainer_state.dumping:
            return {}
        at_once = type(plugin) is AtomicIO
        if engine.observing:
            return self._copy_full_model(engine, session.trainer_state, at_once)
        with engine.layout.showing_companion(), engine.full_model("checkpoint"):
            return self._copy_full_model(engine, session.trainer_state, at_once)

    def _copy_full_model(self, engine: Engine, trainer_state: TrainerState, at_once: bool) -> dict[str, Any]:
        self._saved = trainer_state.with_modes(engine.checkpoint_state())
        self._own = gather_members(trainer_state.of_worker(engine), engine.collective)
        # Only one process writes the file; a full model in the memory of each would fill that of a host of eight.
        if engine.collective.rank > 0:
            return _without_values(engine, partial=not engine.observation.whole)
        own = engine.observation.own.storages()
        copies: dict[str, Any] = {}
        for name, value in engine.module.state_dict().items():
            if isinstance(value, Tensor):
                # When the file is written, the module is this worker's part again, and the other tensors belong to the
                # file alone. A plugin that writes later gets copies of those too, as hooks may change them meanwhile.
                copy = not at_once or value.untyped_storage().data_ptr() in own
                copies[name] = value.detach().to("cpu", copy=copy)
            else:
                copies[name] = value
        return copies

    def save(
        self,
        checkpoint: dict[str, Any],
        filepath: _PATH,
        write: Callable[[], None],
        plugin: CheckpointIO,
        rank: int,
        *,
        interrupted: bool,
    ) -> None:
        """Write the full model, and beside it the state that each worker has taken.

        Collective: every worker must call this, in the same order; all files go where worker 0 says, unless they are
        collected.

        Args:
            checkpoint: Lightning's, of the state dict that was just taken.
            filepath: this worker's name for it.
            write: writes it by ``plugin``; called in one worker.
            plugin: the Trainer's, or :class:`AtomicIO`.
            rank: of this process.
            interrupted: whether an error has ended the run.

        Raises:
            CheckpointNotWritten: on all workers, if it could not be written, unless the saver is forgiving.
        """
        own, saved = self._own, self._saved
        self._own, self._saved = None, {}
        engine = self._session.engine if self._session is not None else None
        if interrupted and engine is not None and engine.running:
            self._report(f"{filepath} is not written: after an error no worker can assemble the full model.")
            return
        collective = SoloCollective() if interrupted else default_collective()
        if rank > 0 and collective.processes == 1:
            return  # the workers have parted, or one has failed before the training: worker 0 alone writes the model
        if "optimizer_states" not in checkpoint:
            own = None  # weights only
        if saved:
            checkpoint[CHECKPOINT_KEY] = saved
        use_python_numbers(checkpoint)
        if own is not None:
            check_loadable({"optimizers": own["optimizers"], **own["host"]})
        path = str(filepath) if self.collected else checkpoint_files.agree_on_path(filepath, collective)
        self._written_as[str(filepath)] = path
        # A worker that writes its own file tells the others that it is busy.
        busy = engine.activity.during("saving") if engine is not None and own is not None else nullcontext()
        try:
            with busy:
                write = partial(write_model, write, checkpoint, path, plugin, self._forgiving)
                checkpoint_files.save_together(checkpoint, own, path, write, collective)
        except CheckpointNotWritten as error:
            if not self._forgiving:
                raise
            self._failed = True
            self._report(f"{error} The training continues.")
            return
        self._failed = False
        if own is not None:
            self.last_written = path

    def _report(self, text: str) -> None:
        report_not_written(text, self._session.checkpoint_callbacks if self._session is not None else None)

    def remove(self, filepath: _PATH, plugin: CheckpointIO, rank: int, members: int) -> None:
        """Remove this process's files of a checkpoint, if the one that replaces it exists."""
        if self._failed:
            rank_zero_warn(f"{filepath} is kept: the checkpoint that should replace it could not be written.")
            return
        if rank == 0:
            plugin.remove_checkpoint(filepath)
        checkpoint_files.remove(self._written_as.pop(str(filepath), filepath), rank, members)

    def find(self, path: _PATH) -> _PATH:
        """The path of the checkpoint that this worker knows as ``path``."""
        return path if checkpoint_files.exists(path) else self._written_as.get(str(path), path)

    def end(self, plugin: CheckpointIO) -> None:
        """Wait for a plugin that writes in a thread, and forgive it; called at the end of a run."""
        if self._forgiving:
            forgive_thread(plugin, wait=True)


def _without_values(engine: Engine, *, partial: bool) -> dict[str, Any]:
    """The state dict of the full model with tensors on the meta device.

    Args:
        engine: of this worker.
        partial: whether it has only a part, so that tensors must not be touched.
    """
    found: dict[str, Any] = {}
    with engine.sync.part_guard.open():
        # A `state_dict` of the user's may take no `keep_vars`.
        state = nn.Module.state_dict(engine.module, keep_vars=True) if partial else engine.module.state_dict()
    for name, value in state.items():
        is_tensor = isinstance(value, Tensor)
        found[name] = torch.empty(value.shape, dtype=value.dtype, device="meta") if is_tensor else value
    return found
