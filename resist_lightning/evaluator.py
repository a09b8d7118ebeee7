"""Evaluates the checkpoints of a training in a separate process, while all workers train.

::

    workers      | round | round | save | round | round | save | round ...
    evaluator                            | validate            | validate

They share nothing but the folder of the checkpoints, so neither waits for the other, and either may be restarted.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from resist_lightning.checkpoint.files import read_file
from resist_lightning.checkpoint.followed_folder import END_MARKER, SUFFIX, FollowedFolder, Version
from resist_lightning.checks.hashing import mark
from resist_lightning.errors import CheckpointError
from resist_lightning.strategies.saving.checkpoint_files import local_path
from resist_lightning.strategies.saving.checkpoint_io import AtomicIO, load_checkpoint

_TRIES = 2  # of a file that does not change: it may be one that is being copied
_NO_CHECKPOINT = (
    f"The training must have ModelCheckpoint(dirpath=FOLDER) with this folder, whose files end in {SUFFIX}; check its "
    "every_n_epochs and every_n_train_steps, and that `monitor` is a metric that exists without validation, such as "
    "'step'."
)


@dataclass(frozen=True)
class Evaluation:
    """The result of validating one checkpoint.

    Args:
        checkpoint: name of the file.
        step: the global step of the training at which it was saved.
        epoch: the epoch.
        metrics: the metrics that the module has logged.
        best: whether it was the best so far.
        weights: a hash of the state dict.
        by: the metric that decides which is best, with ``min`` or ``max``; None without one.
    """

    checkpoint: str
    step: int
    epoch: int
    metrics: dict[str, float]
    best: bool
    weights: str
    by: list[str] | None


class CheckpointEvaluator:
    """Validates every checkpoint that a training writes to a folder, as it comes, in a separate process.

    Each model is validated once by ``trainer.validate``, in the order in which it was written, and logged at the global
    step of the training at which it was saved. Results are in ``evaluations.jsonl``; a call that is repeated resumes
    there. Files still being written are waited for; those removed before their turn are left out, so
    ``ModelCheckpoint(save_top_k=3, monitor="step", mode="max")`` also limits how far the evaluator may fall behind.

    Args:
        trainer: of one process, with loggers of its own; usually without a strategy.
        monitor: a metric; the checkpoint in which it is best is kept as ``best.ckpt``, without the workers' own files.
        mode: ``min`` or ``max``: whether low or high is good.
        out: folder for results; by default ``evaluations`` in the training's folder.
        silence: seconds without a new checkpoint after which it ends with a warning. It ends by itself where the
            training has the callback ``EndMarker``.
        poll_seconds: between two looks at the folder.

    Raises:
        ValueError: if arguments are invalid.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        out: str | Path | None = None,
        silence: float = 3600.0,
        poll_seconds: float = 5.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} must be 'min' or 'max'.")
        if not silence > 0 or not poll_seconds > 0:
            raise ValueError(f"silence={silence} and poll_seconds={poll_seconds} must be above 0 seconds.")
        if trainer.world_size > 1:
            raise ValueError(
                f"the trainer has {trainer.world_size} processes, but an evaluator must be one. Use "
                "Trainer(devices=1), without a strategy."
            )
        self._trainer = trainer
        self._by = None if monitor is None else [monitor, mode]
        self._out = out
        self._silence, self._poll_seconds = silence, poll_seconds

    def follow(
        self,
        model: pl.LightningModule,
        folder: str | Path,
        dataloaders: Any = None,
        *,
        datamodule: pl.LightningDataModule | None = None,
    ) -> list[Evaluation]:
        """Evaluate until the training has ended, or is silent.

        Args:
            model: the module that is trained.
            folder: the training's ``ModelCheckpoint.dirpath``, a local folder.
            dataloaders: as for ``trainer.validate``.
            datamodule: as for ``trainer.validate``.

        Returns:
            All evaluations, those of earlier calls too.

        Raises:
            ValueError: if ``folder`` is impossible, ``monitor`` is not logged, results are there by another one, or
                another evaluator writes results to the same folder now.
            CheckpointError: if it ends without one checkpoint that could be loaded.
        """
        local = local_path(folder)
        if local is None:
            raise ValueError(f"folder={folder} must be a local folder: an evaluator cannot follow another file system.")
        followed = FollowedFolder(local, local / "evaluations" if self._out is None else Path(self._out))
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        with followed.alone():
            following = _Following(self._trainer, model, data, followed, self._by)
            return following.run(self._silence, self._poll_seconds)


class _Following:
    """One call of :meth:`CheckpointEvaluator.follow`."""

    def __init__(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        data: Mapping[str, Any],
        folder: FollowedFolder,
        by: list[str] | None,
    ) -> None:
        self._trainer, self._model, self._data = trainer, model, data
        self._folder, self._by = folder, by
        self._tries: Counter[Version] = Counter()
        self._refused = ""
        self._found = [Evaluation(**row) for row in folder.read_rows()]
        for other in self._found:
            if other.by != by:
                raise ValueError(
                    f"the existing evaluations chose the best checkpoint by {_in_words(other.by)}, but this call asks "
                    f"for {_in_words(by)}. Set out=FOLDER to a new folder, or ask for the same."
                )

    def run(self, silence: float, poll_seconds: float) -> list[Evaluation]:
        """Evaluate until the training has ended, or is silent."""
        rank_zero_info(
            f"Following {self._folder.path.resolve()}: {len(self._found)} models have been evaluated already."
        )
        last = time.monotonic()
        while True:
            ended = self._folder.ended  # before the look, so that it sees all files written before the marker
            files = self._folder.unseen()
            looked = [self._look_at(file) for file in files]
            if any(looked):
                last = time.monotonic()
                continue
            if ended and not files:
                break
            if time.monotonic() - last > silence:
                rank_zero_warn(
                    f"No new checkpoint in {self._folder.path} for {silence:g} s (silence), and no {END_MARKER}: the "
                    "evaluator ends. If the training is still running, start the evaluator again; it resumes where it "
                    "stopped."
                )
                break
            time.sleep(poll_seconds)
        if not self._found:
            raise CheckpointError(self._refused or f"no checkpoint appeared in {self._folder.path}. {_NO_CHECKPOINT}")
        return self._found

    def _look_at(self, file: Version) -> bool:
        """Evaluate a file that is new; returns whether it is a checkpoint."""
        held = self._folder.hold(file)
        if held is None:
            return False
        try:
            checkpoint = load_checkpoint(lambda: read_file(held, mapped=True), held, AtomicIO())
            fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
            place = int(checkpoint["global_step"]), int(checkpoint["epoch"])
            weights = hash_weights(checkpoint["state_dict"])
            del checkpoint  # its values are in the file
            self._folder.done(file)
            if all(other.weights != weights for other in self._found):
                # For `global_step` and `current_epoch` of the module.
                self._trainer.fit_loop.load_state_dict(fit_loop)
                # The loggers' step: one less in a checkpoint that was saved in `on_train_batch_end`.
                self._trainer.fit_loop.epoch_loop._batches_that_stepped = place[0]
                self._evaluate(file, held, place, weights)
        except CheckpointError as error:
            self._refuse(file, str(error).replace(str(held), str(file.path)))
            return False
        finally:
            self._folder.release()
        return True

    def _evaluate(self, file: Version, held: Path, place: tuple[int, int], weights: str) -> None:
        trainer = self._trainer
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # of training's callbacks
            trainer.validate(self._model, ckpt_path=str(held), verbose=False, **self._data)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        best = self._by is not None and self._is_best(metrics)
        found = Evaluation(file.path.name, *place, metrics, best, weights, self._by)
        if best:
            self._folder.keep_best()
        self._found.append(found)
        self._folder.write_rows(vars(each) for each in self._found)
        values = ", ".join(f"{name}={value:.6g}" for name, value in metrics.items())
        rank_zero_info(f"{found.checkpoint} (step {found.step}): {values}{' (best)' if best else ''}")

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        assert self._by is not None
        monitor, mode = self._by
        if monitor not in metrics:
            raise ValueError(
                f"monitor={monitor!r} is not logged in validation, which logs {[*metrics]}. Choose one of these."
            )
        sign = 1 if mode == "max" else -1
        before = [sign * other.metrics[monitor] for other in self._found if other.best]
        value = sign * metrics[monitor]
        return not math.isnan(value) and all(value > other for other in before)

    def _refuse(self, file: Version, text: str) -> None:
        """Retry a file that may still be written; warn of one that stays as it is, and leave it out."""
        self._tries[file] += 1
        if self._tries[file] == _TRIES:
            self._folder.done(file)
            self._refused = text
            rank_zero_warn(f"{text} The evaluator skips it unless it changes.")


def hash_weights(state: Mapping[str, Any]) -> str:
    """A hash of the names and values in a state dict."""
    parts = []
    for name, value in state.items():
        is_tensor = isinstance(value, Tensor)
        parts.append((name, *((tuple(value.shape), *mark(value)) if is_tensor else (repr(value),))))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _in_words(by: list[str] | None) -> str:
    return "no metric" if by is None else f"{by[1]} {by[0]}"
