"""The base of all data modules: splits and loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.data.arrays import ArrayDataset, Examples, Features, Images, first_per_class, holdout
from experiments.data.augment import BatchTransform

Transform = Callable[[Examples], tuple[Tensor, Tensor]]

HOLDOUT_SEED = 1  # the hold-out of the authors' code: 10 %, seed 1 (spec, section 4)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options of splitting and loading examples.

    Raises:
        ValueError: a value outside its limits.
    """

    batch_size: int = 128  # examples per local step of one worker
    eval_batch_size: int = 256  # examples per step of one worker in validation and test
    holdout: float = 0.1  # share of the training examples that validation gets, in (0, 1)
    # use only the first so many training examples of each class, before the split; None for all
    limit: int | None = None
    limit_test: int | None = None  # the same for the test examples
    augment: bool = True  # random crops and flips in training, of images
    drop_last: bool = False  # drop the last, smaller batch of an epoch; the paper keeps it
    num_workers: int = 0  # loader processes of each worker; 0 is fastest for examples that are in memory

    def __post_init__(self) -> None:
        """Check every value."""
        check_least(
            batch_size=(self.batch_size, 1), eval_batch_size=(self.eval_batch_size, 1), limit=(self.limit, 1),
            limit_test=(self.limit_test, 1), num_workers=(self.num_workers, 0),
        )  # fmt: skip
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} must lie between 0 and 1; 0.1 is the paper's")


def check_least(**sizes: tuple[int | None, int]) -> None:
    """Raise a ValueError for a size that is below its least; None is no size."""
    for name, (value, least) in sizes.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


class ArrayData(L.LightningDataModule, ABC, Generic[Examples]):
    """Examples in memory or in a mapped file, split into training, validation (a hold-out of the training) and test.

    The strategy distributes the training examples over the workers: shards, or a full copy each.

    Args:
        loading: options of splitting and loading.
        training_transform: turns the examples of a batch into inputs and labels.
        evaluation_transform: the same in validation and test.
    """

    def __init__(
        self, loading: Loading, training_transform: Transform[Examples], evaluation_transform: Transform[Examples]
    ) -> None:
        super().__init__()
        self.loading = loading
        self.training_transform = training_transform
        self.evaluation_transform = evaluation_transform
        self.parts: dict[str, Examples] = {}

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes; known without reading an example."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """Entries of an example, as a fully connected network sees it; known without reading one."""

    @abstractmethod
    def read(self, *, train: bool) -> Examples:
        """All training or all test examples, in an order that never changes."""

    def check(self) -> None:
        """Refuse unusable settings, before anything is decoded or downloaded.

        Raises:
            ValueError: a wrong folder; the message says what is missing.
        """

    def setup(self, stage: str) -> None:
        """Read the examples of the stage; Lightning calls it in every worker."""
        if stage in ("fit", "validate") and "train" not in self.parts:
            pool = self.read(train=True)
            # The limit comes first: the hold-out is a share of what is used.
            pool = pool.take(first_per_class(pool.labels, self.loading.limit))
            trained, held = holdout(len(pool.labels), self.loading.holdout, HOLDOUT_SEED)
            self.parts |= {"train": pool.take(trained), "val": pool.take(held)}
        if stage in ("test", "predict") and "test" not in self.parts:
            examples = self.read(train=False)
            self.parts["test"] = examples.take(first_per_class(examples.labels, self.loading.limit_test))

    def train_dataloader(self) -> DataLoader[Examples]:
        return DataLoader(
            self._dataset("train"),
            batch_size=self.loading.batch_size,
            shuffle=True,
            drop_last=self.loading.drop_last,
            collate_fn=self.training_transform,
            num_workers=self.loading.num_workers,
            pin_memory=torch.cuda.is_available(),  # so that copies to a GPU are asynchronous
        )

    def val_dataloader(self) -> DataLoader[Examples]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Examples]:
        return self._evaluation_loader("test")

    predict_dataloader = test_dataloader

    def _evaluation_loader(self, part: str) -> DataLoader[Examples]:
        return DataLoader(
            self._dataset(part),
            batch_size=self.loading.eval_batch_size,
            collate_fn=self.evaluation_transform,
            num_workers=self.loading.num_workers,
            # A loader draws a seed when it starts: from a generator of its own, validating does not advance the global
            # one, and the training is the same as without it.
            generator=torch.Generator().manual_seed(0),
            pin_memory=torch.cuda.is_available(),
        )

    def _dataset(self, part: str) -> ArrayDataset[Examples]:
        if part not in self.parts:
            raise RuntimeError("setup(stage) must be called before a loader of that stage is requested")
        return ArrayDataset(self.parts[part])


class ImageData(ArrayData[Images]):
    """Images as bytes in memory; the other arguments are those of `BatchTransform` in training."""

    image_size: int  # height and width, in pixels

    def __init__(
        self, loading: Loading, *, mean: tuple[float, ...], std: tuple[float, ...], crop_padding: int = 4, flip: bool = True
    ) -> None:  # fmt: skip
        plain = BatchTransform(mean, std)
        augmented = BatchTransform(mean, std, crop_padding=crop_padding, flip=flip)
        super().__init__(loading, augmented if loading.augment else plain, plain)
        self.mean, self.std = mean, std
        self.in_channels = len(mean)

    @property
    def in_features(self) -> int:
        return self.in_channels * self.image_size**2


class FeatureData(ArrayData[Features]):
    """Rows of float32 for fully connected networks: a batch is (batch, features) and (batch,) of labels.

    Args:
        loading: keyword arguments of `Loading`; ``augment`` is false here.

    Raises:
        ValueError: ``augment=True``.
    """

    def __init__(self, loading: dict[str, Any]) -> None:
        chosen = Loading(**{"augment": False, **loading})
        if chosen.augment:
            raise ValueError("augment=True: crops and flips are for images; features have none, set augment=false")
        super().__init__(chosen, inputs_and_labels, inputs_and_labels)


def inputs_and_labels(batch: Features) -> tuple[Tensor, Tensor]:
    """Collate function: (batch, features) of floats and (batch,) of labels."""
    return batch.values, batch.labels
