"""What all data modules share: the splits and the loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import lightning as L
import torch
from torch.utils.data import DataLoader

from experiments.data.arrays import ArrayDataset, Images, first_per_class, holdout
from experiments.data.augment import BatchTransform

HOLDOUT_SEED = 1
"""The hold-out of the authors' code: 10 %, seed 1 (spec, section 4)."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How images are split and loaded.

    Args:
        batch_size: images per local step of one worker.
        eval_batch_size: images per step of one worker in validation and test.
        holdout: share of the training images that validation gets, in (0, 1).
        limit: use only the first so many training images of each class, before the split; None for all.
        limit_test: the same for the test images.
        augment: random crops and flips in training.
        drop_last: drop the last, smaller batch of an epoch; the paper keeps it.
        num_workers: loader processes of each worker; 0 is fastest for images that are in memory.
    """

    batch_size: int = 128
    eval_batch_size: int = 256
    holdout: float = 0.1
    limit: int | None = None
    limit_test: int | None = None
    augment: bool = True
    drop_last: bool = False
    num_workers: int = 0


class ImageData(L.LightningDataModule, ABC):
    """Images in memory, split into training, validation (a hold-out of the training images) and test.

    How the training images are dealt to the workers is the strategy's business: shards, or a full copy each.

    Args:
        loading: how images are split and loaded.
        mean: per channel, of values in [0, 1].
        std: per channel.
        crop_padding: padding of the random crop in training, in pixels.
        flip: whether training mirrors images at random.
    """

    def __init__(
        self,
        loading: Loading,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop_padding: int = 4,
        flip: bool = True,
    ) -> None:
        super().__init__()
        self.loading = loading
        self.evaluation_transform = BatchTransform(mean, std)
        augmented = BatchTransform(mean, std, crop_padding=crop_padding, flip=flip)
        self.training_transform = augmented if loading.augment else self.evaluation_transform
        self.in_channels = len(mean)
        self.train_images: Images | None = None
        self.val_images: Images | None = None
        self.test_images: Images | None = None

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes; known without reading an image."""

    @abstractmethod
    def read(self, *, train: bool) -> Images:
        """All training or all test images, in an order that never changes."""

    def setup(self, stage: str) -> None:
        """Read what the stage needs; Lightning calls it in every worker."""
        if stage in ("fit", "validate") and self.train_images is None:
            pool = self.read(train=True)
            pool = pool.take(first_per_class(pool.labels, self.loading.limit))
            trained, held = holdout(len(pool.labels), self.loading.holdout, HOLDOUT_SEED)
            self.train_images, self.val_images = pool.take(trained), pool.take(held)
        if stage in ("test", "predict") and self.test_images is None:
            images = self.read(train=False)
            self.test_images = images.take(first_per_class(images.labels, self.loading.limit_test))

    def train_dataloader(self) -> DataLoader[Images]:
        return DataLoader(
            _dataset(self.train_images),
            batch_size=self.loading.batch_size,
            shuffle=True,
            drop_last=self.loading.drop_last,
            collate_fn=self.training_transform,
            num_workers=self.loading.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Images]:
        return self._evaluation_loader(self.val_images)

    def test_dataloader(self) -> DataLoader[Images]:
        return self._evaluation_loader(self.test_images)

    def predict_dataloader(self) -> DataLoader[Images]:
        return self._evaluation_loader(self.test_images)

    def _evaluation_loader(self, images: Images | None) -> DataLoader[Images]:
        return DataLoader(
            _dataset(images),
            batch_size=self.loading.eval_batch_size,
            collate_fn=self.evaluation_transform,
            num_workers=self.loading.num_workers,
            # A loader draws a seed when it starts: from a generator of its own, validating does not move the
            # global one, and training goes on as if nobody had looked.
            generator=torch.Generator().manual_seed(0),
            pin_memory=torch.cuda.is_available(),
        )


def _dataset(images: Images | None) -> ArrayDataset:
    if images is None:
        raise RuntimeError("setup(stage) must be called before a loader of that stage is asked for")
    return ArrayDataset(images)
