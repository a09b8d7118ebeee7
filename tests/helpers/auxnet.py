"""Trainings of a network that is cut into stages: every worker sees the same samples."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

from resist_lightning import AuxNetStrategy
from tests.helpers.plain import BATCH_SIZE, CLASSES, Classifier
from tests.helpers.trainers import make_trainer

SAMPLES = 40
"""Five batches."""

CUTS = {2: ["4"], 3: ["4", "7"]}
"""Of ``make_net("chain")``, by the number of workers."""

# Three modes of training in stages: delayed gradients, guessed inputs, or stages that wait for each other.
LATE: dict[str, Any] = {"warmup_steps": 0}
GUESSES: dict[str, Any] = {"method": "penalty", "warmup_steps": 0}
SERIAL: dict[str, Any] = {"method": "penalty", "warmup_steps": 1000}


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Samples that depend on their index alone: noise, a little brighter for each class."""

    def __init__(self, samples: int = SAMPLES, size: int = 8) -> None:
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(500 + index)
        label = torch.tensor(index % CLASSES)
        return torch.randn(3, self.size, self.size, generator=generator) + label / 2, label


def pictures(**options: Any) -> DataLoader[Any]:
    """A shuffled loader of :class:`Pictures`."""
    return DataLoader(Pictures(**options), BATCH_SIZE, shuffle=True)


def make_stages(**options: Any) -> AuxNetStrategy:
    """A strategy with a handshake every three steps, one step of warm-up, and small auxiliary networks."""
    usual = {"check_every_n_steps": 3, "warmup_steps": 1}
    if options.get("method", "delayed") != "delayed":
        usual |= {"aux_width": 4, "aux_learning_rate": 0.02}
    return AuxNetStrategy(**{**usual, **options})


def fit_stages(
    worker: int,
    module: L.LightningModule,
    strategy: dict[str, Any] | None = None,
    loader: Any = None,
    validation: Any = None,
    **options: Any,
) -> L.Trainer:
    """Train on :func:`pictures`, by default for one epoch; returns the Trainer."""
    ckpt_path = options.pop("ckpt_path", None)
    made = make_stages(**(strategy or {}))
    trainer = make_trainer(made, **{"max_epochs": 1, "use_distributed_sampler": True, **options})
    trainer.fit(module, pictures() if loader is None else loader, validation, ckpt_path=ckpt_path)
    return trainer


def in_order(loader: DataLoader[Any], seed: int = 0) -> DataLoader[Any]:
    """A loader of the same samples, in the order that the strategy gives all workers."""
    sampler: Any = DistributedSampler(loader.dataset, 1, 0, seed=seed)  # type: ignore[arg-type]
    return DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)


def fit_plainly(worker: int, module: L.LightningModule, loader: Any = None, **options: Any) -> L.Trainer:
    """The same training in one process, by Lightning alone."""
    validation = options.pop("validation", None)
    trainer = make_trainer("auto", **{"max_epochs": 1, **options})
    trainer.fit(module, in_order(pictures() if loader is None else loader), validation)
    return trainer


class Metered(Classifier):
    """A small network, cut by :data:`CUTS`, that logs in every way that a training_step may."""

    def __init__(self, kind: str = "chain", **options: Any) -> None:
        super().__init__(kind, **options)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        logits = self(images)
        loss = functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("synced", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("sum", logits.sum(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("object", self.accuracy, on_step=True, on_epoch=True)
        return loss


class Notes(L.Callback):
    """Notes the metrics after each batch, and the names of the parameters that have memory then."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.held: list[list[str]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.held.append([name for name, parameter in module.named_parameters() if not parameter.is_meta])


def told(caught: list[warnings.WarningMessage], part: str) -> list[str]:
    """The warnings that contain ``part``."""
    return [str(warning.message) for warning in caught if part in str(warning.message)]
