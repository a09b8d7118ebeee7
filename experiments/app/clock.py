"""A callback that measures a run in the training process, and writes a file: a spawned process's memory is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

CLOCK_FILE = "clock.json"


class Clock(Callback):
    """Writes ``clock.json`` to the trainer's root folder: steps, epochs, and seconds of training and of
    validation.

    Validation includes the checkpoint that is saved at its end.
    """

    def __init__(self) -> None:
        self._started = self._validation_started = 0.0
        self._validation_seconds = 0.0
        self._training_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()
        self._validation_seconds = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_seconds += time.perf_counter() - self._validation_started

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Validation, and the checkpoint that it saves, are inside of the training's hooks.
        self._training_seconds = time.perf_counter() - self._started - self._validation_seconds

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measured = {
            "processes": trainer.world_size,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "training_seconds": self._training_seconds,
            "validation_seconds": self._validation_seconds,
        }
        path = Path(trainer.default_root_dir) / CLOCK_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, indent=1) + "\n")
