"""Images of a case, and the one order in which all methods see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor

from experiments.accuracy.settings import LARGEST_WORKERS, Settings
from experiments.data import CIFAR10, Digits, ImageFolder
from experiments.data.arrays import Examples, Images
from experiments.data.augment import BatchTransform
from experiments.data.folder import IMAGENET_MEAN, IMAGENET_STD
from experiments.data.module import ImageData, Transform
from experiments.harness.settings import ConfigError


@dataclass
class Stream(Generic[Examples]):
    """The examples of all workers, as one endless shuffled stream.

    Local step t of S workers takes the next S batches of the stream, one per worker, so that after equal samples all
    methods have seen the same ones. Crops and flips depend on seed, step and worker only: a real process draws what
    the simulator draws for it.

    Args:
        images: the training examples.
        transform: augmentation and normalisation of a batch.
        batch_size: examples per worker and step.
        seed: of order and augmentation; 0 is a seed.
    """

    images: Examples
    transform: Transform[Examples]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        """Whole steps per pass, for any number of workers that is compared."""
        step = self.batch_size * LARGEST_WORKERS
        self.pass_length = len(self.images.labels) // step * step
        self._pass = -1
        self._order = torch.empty(0)

    def batch(self, step: int, worker: int, workers: int) -> tuple[Tensor, Tensor]:
        """Batch of ``worker`` in local step ``step``, from 0."""
        start = (step * workers + worker) * self.batch_size
        number, place = divmod(start, self.pass_length)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 10_000 + number)
            self._pass, self._order = number, torch.randperm(len(self.images.labels), generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + step) * LARGEST_WORKERS + worker)
            return self.transform(self.images.take(self._order[place : place + self.batch_size]))


@dataclass
class Prepared:
    """All images of a study.

    Args:
        train: training images, bytes.
        holdout: images kept from training, ready to evaluate.
        test: test images, ready to evaluate.
        augmented: transform of a training batch.
    """

    train: Images
    holdout: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    augmented: BatchTransform

    @property
    def channels(self) -> int:
        return int(self.train.pixels.shape[1])


def prepare(settings: Settings) -> Prepared:
    """Read the images; a folder is decoded once into its cache.

    Raises:
        ConfigError: a folder that cannot be read, or too few images for one step of the most workers.
    """
    try:
        module = _module(settings)
        module.prepare_data()
        module.setup("fit")
        module.setup("test")
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    train, held, tested = (_shrunk(part, settings.shrink) for part in _parts(module))
    least = settings.batch * LARGEST_WORKERS
    if len(train.labels) < least:
        raise ConfigError(
            f"limit={settings.limit} with batch={settings.batch} leaves {len(train.labels)} training images; "
            f"one step of {LARGEST_WORKERS} workers needs {least}: raise limit or lower batch"
        )
    mean, std = _statistics(settings)
    padding = max(1, train.pixels.shape[-1] // 8)
    augmented = BatchTransform(mean, std, crop_padding=padding, flip=settings.data != "digits")
    plain = BatchTransform(mean, std)
    evaluated = [_batches(part, plain, settings.eval_batch) for part in (held, tested)]
    return Prepared(train, *evaluated, augmented)


def _module(settings: Settings) -> ImageData:
    loading: dict[str, Any] = {
        "batch_size": settings.batch,
        "holdout": settings.holdout,
        "limit": settings.limit,
        "limit_test": settings.limit_test,
    }
    if settings.data == "digits":
        return Digits(**loading)
    assert settings.folder is not None
    if settings.data == "cifar10":
        return CIFAR10(settings.folder, **loading)
    return ImageFolder(settings.folder, cache_dir=settings.cache_dir, **loading)


def _parts(module: ImageData) -> list[Images]:
    parts = [module.train_images, module.val_images, module.test_images]
    return [part for part in parts if part is not None]


def _statistics(settings: Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return ((0.305,), (0.376,)) if settings.data == "digits" else (IMAGENET_MEAN, IMAGENET_STD)


def _shrunk(images: Images, factor: int) -> Images:
    """Mean over squares of ``factor`` x ``factor`` pixels."""
    if factor == 1:
        return images.take(torch.arange(len(images.labels)))
    parts = [
        torch.nn.functional.avg_pool2d(part.float(), factor).round().to(torch.uint8)
        for part in images.pixels.split(4096)
    ]
    return Images(torch.cat(parts), images.labels.clone())


def _batches(images: Images, transform: BatchTransform, size: int) -> list[tuple[Tensor, Tensor]]:
    """In a shuffled order, always the same: a folder is sorted by class, and batch statistics of one class mislead."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
    return [transform(images.take(part)) for part in order.split(size)]
