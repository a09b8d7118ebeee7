"""A user's training script for torchrun: ``python -m experiments.elastic.script FOLDER STEPS SECONDS_PER_STEP``.

Every process writes when it trained its first and its last batch to FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from experiments.trainers import Module, quiet_trainer
from resist_lightning import ResISTStrategy
from resist_lightning.models import PreActResNet

LOCAL_STEPS = 5
HOST = "RESIST_LIGHTNING_ELASTIC_HOST"


class Diary(L.Callback):
    """Writes down every batch, and takes its time over it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.path = folder / f"diary-{os.getpid()}.jsonl"
        self.seconds = seconds

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        entry = {
            "at": time.time(),
            "host": os.environ[HOST],
            "worker": trainer.global_rank,
            "workers": trainer.world_size,
            "step": trainer.global_step,
            "round": trainer.strategy.engine.clock.round,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        time.sleep(self.seconds)


def main(folder: Path, steps: int, seconds: float) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    strategy = ResISTStrategy(
        local_steps=LOCAL_STEPS, min_blocks=2, snapshots=folder / "snapshots", on_worker_loss="shrink"
    )
    images = torch.randn(8 * 2 * steps, 3, 16, 16)
    labels = torch.randint(0, 4, (8 * 2 * steps,))
    hosts = int(os.environ["GROUP_WORLD_SIZE"])
    diary = Diary(folder, seconds)
    trainer = quiet_trainer(strategy, num_nodes=hosts, max_steps=steps, max_epochs=-1, callbacks=[diary])
    module = Module(PreActResNet((1, 1, 7, 1), 4, width_multiplier=1 / 8))
    trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True))
    torch.save(module.state_dict(), folder / f"final-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
