"""A user's script in which a worker fails: ``python -m tests.helpers.dying HARM WORKER FOLDER [START_METHOD]``.

Every process writes its pid to FOLDER when it begins to train, and the error with which it ends. If HARM is SIGINT or
SIGTERM, it creates a file some heartbeats after the error, to show that nothing has killed it. ``train then HARM`` is a
second training of the script.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import DataLoader

from resist_lightning.faults.failure_detector import BEAT_SECONDS
from tests.helpers.plain import Classifier, batch_of
from tests.helpers.trainers import QUIET, kind_for, make_strategy

SILENCE = timedelta(seconds=4)
TIMEOUT = timedelta(seconds=30)  # above the time to import Lightning on a busy machine
STEPS, AT_STEP = 400, 13


def hang() -> None:
    time.sleep(600)


def stumble() -> None:
    raise KeyError("a mistake")


HARMS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(0),
    "raise": stumble,
    "hang": hang,
    "nothing": lambda: None,
    "SIGINT": lambda: os.killpg(0, signal.SIGINT),
    "SIGTERM": lambda: os.killpg(0, signal.SIGTERM),
}


class Harmed(Classifier):
    """One worker fails in a local step, or (``load:``) while it waits for data."""

    def __init__(self, harm: str, worker: int, folder: str, kind: str = "preact") -> None:
        super().__init__(kind)
        self.harm, self.worker, self.folder = harm, worker, Path(folder)

    def meet_harm(self, place: str, step: int) -> None:
        where, _, harm = self.harm.rpartition(":")
        if (where or "step", step, self.trainer.global_rank) == (place, AT_STEP, self.worker):
            HARMS[harm]()

    def on_fit_start(self) -> None:
        (self.folder / f"pid{self.trainer.global_rank}").write_text(str(os.getpid()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.meet_harm("step", batch_idx)
        time.sleep(0.2)  # so that some heartbeats come before the failure, and a run outlasts its detection
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Batches(self), batch_size=None)  # type: ignore[arg-type]


class Batches(torch.utils.data.IterableDataset[Any]):
    def __init__(self, module: Harmed) -> None:
        self.module = module

    def __iter__(self) -> Iterator[Any]:
        for step in range(STEPS):
            self.module.meet_harm("load", step)
            yield batch_of(self.module.trainer.global_rank, step)


def train(
    harm: str,
    worker: int,
    folder: str,
    start_method: Any = "popen",
    workers: int = 2,
    face: str = "resist",
    overlap: int = 0,
    **options: Any,
) -> None:
    """Fit, and write the error with which it ends, if any."""
    if harm.startswith("SIG"):
        options.update(callbacks=[OnExceptionCheckpoint(folder)], enable_checkpointing=True)
    more = {"overlap": overlap} if overlap else {}
    strategy = make_strategy(face, silence=SILENCE, timeout=TIMEOUT, start_method=start_method, **more)
    trainer = L.Trainer(**{**QUIET, "strategy": strategy, "devices": workers, "max_epochs": 1, **options})
    try:
        trainer.fit(Harmed(harm, worker, folder, kind_for(face)))
    except BaseException as error:
        Path(folder, f"error{trainer.global_rank}").write_text(f"{type(error).__name__}: {error}")
        if harm.startswith("SIG"):
            time.sleep(3 * BEAT_SECONDS)
            Path(folder, f"after{trainer.global_rank}").touch()
        raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, _, harm = sys.argv[1].rpartition("then ")
    if first:  # with another Trainer, in the same processes
        train("nothing", 0, sys.argv[3], *sys.argv[4:], max_steps=3)
    train(harm, int(sys.argv[2]), sys.argv[3], *sys.argv[4:])
