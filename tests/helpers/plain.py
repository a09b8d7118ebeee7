"""A user's ordinary LightningModule and its data. Imports torch and Lightning, nothing of this package.

So a process that has not imported ``resist_lightning`` can load the strategies' checkpoints (contract 8).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 4
BATCH_SIZE = 8


@cache
def preact() -> ModuleType:
    """The module ``resist_lightning.models.preact``; loaded without the package if that is not imported."""
    if "resist_lightning" in sys.modules:
        return importlib.import_module("resist_lightning.models.preact")
    spec = importlib.util.spec_from_file_location("preact_alone", ROOT / "resist_lightning" / "models" / "preact.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_net(kind: str = "preact", seed: int = 7) -> nn.Module:
    """A small network, the same in every process.

    Five blocks, of which four can be partitioned, are in the third section, the only one of a "small" network, or in
    the body of "blocks"; a "chain" has 6, 12 and 9 hidden neurons.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "preact":  # 10,000 parameters
            return preact().PreActResNet((1, 1, 5, 1), CLASSES, width_multiplier=1 / 16)
        if kind == "small":  # 3,000 parameters
            return OneSection()
        if kind == "blocks":  # 2,000 parameters
            net = nn.Sequential()
            net.add_module("stem", nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 8)))
            net.add_module("body", nn.Sequential(*(LinearBlock(8) for _ in range(5))))
            net.add_module("head", nn.Linear(8, CLASSES))
            return net
        if kind == "torchvision":  # 1 million parameters
            from torchvision.models.resnet import Bottleneck, ResNet

            return ResNet(Bottleneck, [1, 1, 5, 1], num_classes=CLASSES, width_per_group=4)
        if kind == "chain":  # 1,500 parameters
            return nn.Sequential(
                *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(6 * 16, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU()),
                *(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
            )
        raise ValueError(f"kind={kind!r} is unknown")


class LinearBlock(nn.Module):
    """A residual block of a batch norm and a linear layer, which declares where its branch ends."""

    residual_branch_end = "out"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(functional.relu(self.norm(x)))


class ConvBlock(nn.Module):
    """A residual block of one convolution, which declares where its branch ends."""

    residual_branch_end = "conv"

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.conv(functional.relu(self.norm(x)))
        return x + branch


class OneSection(nn.Module):
    """Stem, a section of five blocks (four that can be partitioned), pooling, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.section3 = nn.Sequential(*(ConvBlock() for _ in range(5)))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.section3(self.stem(images)).mean((2, 3)))
        return logits


class Classifier(L.LightningModule):
    """A classifier whose metrics two processes can compare; independent of how it is distributed.

    Args:
        kind: of the network.
        seed: of its weights.
        optimizer: ``sgd`` or ``adamw``.
        calls: whether a step calls ``net`` or ``self``.
        dropout: share of the input that is dropped in training.
    """

    def __init__(
        self, kind: str = "preact", seed: int = 7, optimizer: str = "sgd", calls: str = "net", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.calls = calls
        self.net = make_net(kind, seed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(self.dropout(images))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        images, labels = batch
        logits = self(images) if self.calls == "self" else self.net(self.dropout(images))
        return functional.cross_entropy(logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        logits = self(batch[0])
        self.log(f"{stage}/loss", functional.cross_entropy(logits, batch[1]), sync_dist=True, batch_size=BATCH_SIZE)
        accuracy = (logits.argmax(1) == batch[1]).float().mean()
        self.log(f"{stage}/acc", accuracy, sync_dist=True, batch_size=BATCH_SIZE)

    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


class Late(Classifier):
    """A classifier whose network is made in ``configure_model``."""

    def __init__(self, kind: str = "preact") -> None:
        super().__init__(kind)
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = make_net(self.hparams["kind"])


def batch_of(worker: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch that a worker sees at a step: noise, a little brighter for each class."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    labels = torch.randint(0, CLASSES, (BATCH_SIZE,), generator=generator)
    images = torch.randn(BATCH_SIZE, 3, 8, 8, generator=generator) + labels[:, None, None, None] / 2
    return images, labels


class Stream(Dataset[tuple[Tensor, Tensor]]):
    """A worker's batches in sequence, which a new epoch does not restart; made for one pass.

    Args:
        worker: number of the worker.
        epoch: number of batches in an epoch.
        start: number of the first batch.
    """

    def __init__(self, worker: int, epoch: int, start: int = 0) -> None:
        self.worker, self.epoch, self.next = worker, epoch, start

    def __len__(self) -> int:
        return self.epoch

    def __getitem__(self, _: int) -> tuple[Tensor, Tensor]:
        self.next += 1
        return batch_of(self.worker, self.next - 1)


def stream(worker: int, epoch: int, start: int = 0, **options: Any) -> DataLoader[Any]:
    """A loader of a :class:`Stream`."""
    return DataLoader(Stream(worker, epoch, start), **{"batch_size": None, **options})


def held_out(worker: int, batches: int = 2) -> DataLoader[Any]:
    """A worker's part of the data for validation."""
    return DataLoader([batch_of(100 + worker, step) for step in range(batches)], batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def evaluate(module: Classifier, workers: int, batches: int = 2) -> dict[str, float]:
    """The metrics of ``held_out`` over all workers, in plain PyTorch."""
    module.eval()
    loss, right, count = 0.0, 0, workers * batches
    for images, labels in (batch_of(100 + worker, step) for worker in range(workers) for step in range(batches)):
        logits = module(images)
        loss += functional.cross_entropy(logits, labels).item() / count
        right += int((logits.argmax(1) == labels).sum())
    return {"loss": loss, "acc": right / (count * BATCH_SIZE)}
