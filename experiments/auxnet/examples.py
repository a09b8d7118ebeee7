"""The images of a task in the order in which all methods see them, and the network that fits them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from experiments.auxnet.networks import SmallImageResNet
from experiments.auxnet.tasks import ALL, Scale
from experiments.data import Digits, Fake, ImageFolder
from experiments.data.module import ImageData
from experiments.harness.settings import ConfigError
from experiments.ist.examples import Prepared

CLASSES = 10


@lru_cache(maxsize=2)
def prepared(task: str, size: str, folder: str | None, cache_dir: str) -> Prepared:
    """Read a task's images.

    Raises:
        ConfigError: a folder that cannot be read.
    """
    try:
        module = _module(task, size, folder, cache_dir)
        module.prepare_data()
        return Prepared.of(module)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def scale_of(task: str, size: str) -> Scale:
    """How large a task is in a study of this size."""
    return ALL[task].scales[size]


def input_shape(task: str) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    pixels = ALL[task].pixels
    return (1 if ALL[task].images == "digits" else 3), pixels, pixels


def make_network(task: str, size: str, seed: int) -> nn.Module:
    """The task's network before training: of a seed, the same for all methods and workers."""
    scale = scale_of(task, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels = input_shape(task)[0]
        return SmallImageResNet(scale.blocks, scale.width, num_classes=CLASSES, in_channels=channels)


def _module(task: str, size: str, folder: str | None, cache_dir: str) -> ImageData:
    chosen, scale = ALL[task], scale_of(task, size)
    loading: dict[str, Any] = {
        "batch_size": scale.batch,
        "holdout": chosen.holdout,
        "limit": scale.limit,
        "limit_test": scale.limit_test,
    }
    if chosen.images == "digits":
        return Digits(**loading)
    if chosen.images == "random":
        return Fake(train_size=scale.batch * 16, test_size=CLASSES, image_size=chosen.pixels, **loading)
    assert folder is not None
    return ImageFolder(folder, cache_dir=cache_dir, image_size=chosen.pixels, **loading)
