"""Any folder of images, decoded once into one file of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageOps, UnidentifiedImageError

from experiments.data.arrays import Images, holdout
from experiments.data.cache import Listing, kept, list_files
from experiments.data.module import ImageData, Loading

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"})
TEST_SEED = 2
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageFolder(ImageData):
    """Images in ``folder/train/<class>/*`` and ``folder/test/<class>/*``, or in ``folder/<class>/*``.

    In the second form a random share of the images is the test set, the same in every run. Images are turned
    into colour, scaled and centre-cropped to one size, and kept in ``cache_dir``; the cache is made again
    when a file of the folder changes.

    Args:
        folder: the folder.
        cache_dir: where the decoded images are kept.
        image_size: height and width after scaling, in pixels.
        test_fraction: share of the test images where the folder has no train and test.
        mean: per channel, of values in [0, 1].
        std: per channel.
        loading: keyword arguments of `Loading`.

    Raises:
        ValueError: on first use, if the folder is missing, has no images, or train and test have different
            classes.
    """

    def __init__(
        self,
        folder: str,
        *,
        cache_dir: str,
        image_size: int = 32,
        test_fraction: float = 0.2,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **loading: Any,
    ) -> None:
        super().__init__(Loading(**loading), mean=tuple(mean), std=tuple(std), crop_padding=max(1, image_size // 8))
        self.folder = Path(folder)
        self.cache_dir = Path(cache_dir)
        self.image_size = image_size
        self.test_fraction = test_fraction

    @property
    def num_classes(self) -> int:
        return len(next(iter(self.listings.values())).classes)

    def check(self) -> None:
        _ = self.listings

    @cached_property
    def listings(self) -> dict[str, Listing]:
        """``train`` and ``test``, or ``all`` where the folder has neither."""
        if not self.folder.is_dir():
            raise ValueError(
                f"folder={str(self.folder)!r} is not a folder; give one with train/<class>/* and "
                "test/<class>/*, or with <class>/*"
            )
        parts = [name for name in ("train", "test") if (self.folder / name).is_dir()]
        if len(parts) == 1:
            raise ValueError(
                f"{self.folder} has {parts[0]}/ only; add the other of train/ and test/, or give "
                f"{self.folder / parts[0]} itself, which will be split"
            )
        if not parts:
            return {"all": list_images(self.folder)}
        found = {name: list_images(self.folder / name) for name in parts}
        differing = sorted(set(found["train"].classes) ^ set(found["test"].classes))
        if differing:
            raise ValueError(
                f"{self.folder}: train and test have different classes; in one of them only: "
                f"{', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}"
            )
        return found

    def prepare_data(self) -> None:
        """Decode files that are not in the cache; Lightning calls it in one process per host."""
        for listing in self.listings.values():
            self._cached(listing)

    def read(self, *, train: bool) -> Images:
        if "all" not in self.listings:
            return self._cached(self.listings["train" if train else "test"])
        images = self._cached(self.listings["all"])
        trained, tested = holdout(len(images.labels), self.test_fraction, TEST_SEED)
        return images.take(trained if train else tested)

    def _cached(self, listing: Listing) -> Images:
        path = self.cache_dir / f"{listing.folder.name}-{listing.fingerprint(self.image_size)}.pt"

        def make() -> dict[str, Any]:
            rank_zero_info(f"Decoding {len(listing.files)} images of {listing.folder} once, into {path}")
            pixels = decode(listing.files, self.image_size)
            return {"pixels": pixels, "labels": torch.tensor(listing.labels)}

        stored = kept(path, make)
        return Images(stored["pixels"], stored["labels"])


def list_images(folder: Path) -> Listing:
    """The images of ``folder/<class>/*``.

    Raises:
        ValueError: no sub-folders, or one without an image.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no sub-folders; one is needed for each class, with its images in it")
    endings = ", ".join(sorted(SUFFIXES))
    return list_files(folder, classes, SUFFIXES, f"no images in {{}}; files are recognised by their endings: {endings}")


def decode(files: Sequence[Path], image_size: int) -> torch.Tensor:
    """Read image files into one uint8 tensor (files, 3, image_size, image_size).

    Raises:
        ValueError: a file that is not an image.
    """
    pixels = np.empty((len(files), image_size, image_size, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as threads:  # PIL decodes outside of the interpreter's lock
        for index, image in enumerate(threads.map(_decode_one, files, repeat(image_size))):
            pixels[index] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _decode_one(path: Path, image_size: int) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); repair or remove it") from error
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)
