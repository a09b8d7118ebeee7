"""The small training that faults strike: a worker's part, and the files in its folder.

``python -m experiments.faults.training FOLDER`` (alone, or under torchrun) is a user's training script.

FOLDER/settings.json      the settings
FOLDER/pid-0, pid-1 ...   one for each worker
FOLDER/struck.json        the time of the strike
FOLDER/error-1.json       the error of a worker, and its time
FOLDER/checkpoints/       one file for every other local step, at borders of rounds and in their middle
FOLDER/final-0.pt ...     the weights of a worker at the end
FOLDER/tmp/               TMPDIR of the workers
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from experiments.app.quiet import hush
from experiments.faults.faults import Fault, Injector
from resist_lightning import LocalSGDStrategy, ResISTStrategy
from resist_lightning.models import PreActResNet
from resist_lightning.strategies.base import SubnetStrategy

CLASSES = 4
SECTIONS = (1, 1, 5, 1)
BLOCKS = 4  # of the third section, all but the first are partitioned
BATCH = 4
LOCAL_STEPS = 3
ROUNDS = 4
EPOCHS = 3
EPOCH_STEPS = ROUNDS * LOCAL_STEPS // EPOCHS
# Local steps from one checkpoint to the next, and from one evaluation to the next. Rounds end elsewhere, epochs too.
SAVE_EVERY = 2
MIN_BLOCKS = 1


@dataclass(frozen=True)
class Settings:
    """The settings of a training."""

    face: str  # ``resist`` or ``local_sgd``
    workers: int  # number of workers
    timeout: float  # of the strategy, in seconds
    silence: float  # of the strategy, in seconds: time without a heartbeat
    fault: Fault | None = None  # the fault, if there is one
    resume: str | None = None  # a checkpoint to resume from
    device: str = "cpu"  # of all workers: several may share a GPU
    backend: str = "gloo"  # of the process group
    variables: list[dict[str, str]] = field(default_factory=list)  # more of each worker's environment; may be empty

    def write(self, folder: Path) -> None:
        """Write the settings, for processes that a launcher starts."""
        (folder / "settings.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """The settings in the file of :meth:`write`."""
        plain = json.loads((folder / "settings.json").read_text())
        return cls(**{**plain, "fault": plain["fault"] and Fault(**plain["fault"])})


class Noise(Dataset[tuple[Tensor, Tensor]]):
    """Noise, a little brighter for each class; the same whenever it is read."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        label = torch.randint(0, CLASSES, (), generator=generator)
        return torch.randn(3, 8, 8, generator=generator) + label / 2, label


class Small(L.LightningModule):
    """A network of 10,000 parameters, and data that is shuffled and disturbed at random."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.net = PreActResNet(SECTIONS, CLASSES, width_multiplier=1 / 16)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0] + torch.randn_like(batch[0]) / 10), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val/loss", loss, sync_dist=True, batch_size=BATCH)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noise(EPOCH_STEPS * BATCH * self.trainer.world_size), batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noise(BATCH * self.trainer.world_size), batch_size=BATCH)


def make_strategy(settings: Settings) -> SubnetStrategy:
    """The strategy, with short limits."""
    options: dict[str, Any] = {"local_steps": LOCAL_STEPS, "timeout": timedelta(seconds=settings.timeout)}
    kind: Any = LocalSGDStrategy
    if settings.face == "resist":
        # The batches on which batch norm would be re-estimated are those of before the fault.
        kind = ResISTStrategy
        options = {**options, "min_blocks": MIN_BLOCKS, "batch_norm": "running"}
    options["parallel_devices"] = [torch.device(settings.device)] * settings.workers
    options["process_group_backend"] = settings.backend
    return kind(**options, silence=timedelta(seconds=settings.silence), on_save_error=on_save_error(settings.fault))


def on_save_error(fault: Fault | None) -> str:
    """Both settings are tried: a disk that is full in an even round stops the training, in an odd one it goes on."""
    return "warn" if fault is not None and fault.kind == "fill_disk" and fault.round % 2 else "raise"


def train(folder: Path) -> None:
    """The whole run of a worker."""
    settings = Settings.read(folder)
    worker = int(os.environ.get("LOCAL_RANK", "0"))
    (folder / f"pid-{worker}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    hush()
    _seed(worker)  # workers differ, so that resuming must bring back each one's own generators
    module = Small()
    with _errors_noted(folder / f"error-{worker}.json"):
        saving = ModelCheckpoint(
            folder / "checkpoints",
            filename="{step}",
            save_top_k=-1,
            every_n_train_steps=SAVE_EVERY,
            save_on_exception=True,
        )
        fault = settings.fault
        trainer = L.Trainer(
            strategy=make_strategy(settings),
            max_epochs=EPOCHS,
            val_check_interval=SAVE_EVERY,
            callbacks=[saving, *([Injector(fault, folder / "struck.json")] if fault is not None else [])],
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, ckpt_path=settings.resume)
    torch.save(module.state_dict(), folder / f"final-{worker}.pt")


def train_as_forked(worker: int, folder: Path, port: int) -> None:
    """:func:`train` in a forked process, with the variables that torchrun would give it."""
    with (folder / f"output-{worker}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    settings = Settings.read(folder)
    os.environ.update(environment(folder))
    os.environ.update(LOCAL_RANK=str(worker), NODE_RANK="0", WORLD_SIZE=str(settings.workers))
    os.environ.update(settings.variables[worker] if settings.variables else {})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tempfile.tempdir = None  # as TMPDIR now says
    rank_zero_only.rank = worker  # as if Lightning had been imported with these variables
    train(folder)


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of all workers."""
    (folder / "tmp").mkdir(exist_ok=True)
    return {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}


def _seed(worker: int) -> None:
    """Seed all generators, differently in each worker."""
    random.seed(worker)
    np.random.seed(worker)
    torch.manual_seed(worker)


@contextmanager
def _errors_noted(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        noted = {"type": type(error).__name__, "text": str(error), "at": time.monotonic()}
        path.write_text(json.dumps(noted))
        raise


if __name__ == "__main__":
    train(Path(sys.argv[1]))
