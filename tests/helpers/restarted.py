"""A user's program for a torchrun that restarts its workers.

Worker 1 is killed after a local step, once. Every process that comes to the end writes its results to a folder.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch

from resist_lightning import ResISTStrategy
from tests.helpers.plain import stream
from tests.helpers.small import Small
from tests.helpers.trainers import QUIET

STEPS = 10


class Harm(L.Callback):
    """Kills worker 1 after a step, once per folder."""

    def __init__(self, folder: Path, after: int) -> None:
        self.folder, self.after = folder, after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        done = self.folder / "harmed"
        if trainer.global_rank == 1 and trainer.global_step == self.after and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Seen(L.Callback):
    """Notes the steps of this process."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def main(folder: Path, harm_after: int) -> None:
    torch.set_num_threads(1)
    workers = int(os.environ["WORLD_SIZE"])
    strategy = ResISTStrategy(local_steps=3, min_blocks=1, snapshots=folder / "snapshots")
    seen = Seen()
    options = {**QUIET, "callbacks": [Harm(folder, harm_after), seen], "max_epochs": 1}
    trainer = L.Trainer(strategy=strategy, devices=workers, **options)
    module = Small()
    trainer.fit(module, stream(trainer.global_rank, STEPS))
    result = {"state": module.state_dict(), "steps": seen.steps}
    torch.save(result, folder / f"result-{trainer.global_rank}.pt")
