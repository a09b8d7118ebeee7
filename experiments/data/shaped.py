"""A generated task of the shape of Speech Commands, for speed, memory and tests of accuracy without a download."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.data.arrays import Features
from experiments.data.module import FeatureData, check_least

LATENT = 12
HIDDEN = 32
PROTOTYPES_PER_CLASS = 8
SPREAD = 0.25  # deviation of an example from its prototype, in each latent direction, in which prototypes deviate by 1
NOISE = 0.5  # deviation of the noise of a feature; without noise a feature deviates by about 0.7


class World(NamedTuple):
    """The constants of a seed: the prototypes and the network that turns a latent point into features."""

    prototypes: Tensor
    inner: Tensor
    bias: Tensor
    outer: Tensor


class SpeechShaped(FeatureData):
    """Examples scattered about random prototypes, eight of each class, seen through a fixed random network and noise.

    A class is eight places in twelve dimensions, which no hyperplane separates from the others'; a network of one tanh
    layer folds them into the features. So a fully connected network learns the task, the better the wider it is, and a
    linear classifier does not. Held-out accuracy with the default sizes, seeds 0 to 2, by
    experiments/benchmarks/speech_shaped.py (with its conditions): two layers of width 512, 0.87 to 0.95; of width 128,
    0.78 to 0.86; logistic regression, 0.44 to 0.45.

    Every worker makes the same examples for itself: in a second, 168 MB with the default sizes. Test examples do not
    depend on ``train_size``, and no global generator is read or advanced.

    Args:
        train_size: examples for training and validation.
        test_size: examples for the test.
        features: width of a row.
        classes: number of classes.
        seed: another one is another task, with other examples.
        loading: keyword arguments of `Loading`.
    """

    def __init__(
        self,
        *,
        train_size: int = 8192,
        test_size: int = 2048,
        features: int = 4096,
        classes: int = 35,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        # One example for validation and one for training, one for the test; two classes are the least to tell apart.
        check_least(train_size=(train_size, 2), test_size=(test_size, 1), features=(features, 1), classes=(classes, 2))
        check_least(seed=(seed, 0))
        super().__init__(loading)
        self.sizes = {True: train_size, False: test_size}
        self.features = features
        self.classes = classes
        self.seed = seed

    @property
    def num_classes(self) -> int:
        return self.classes

    @property
    def in_features(self) -> int:
        return self.features

    def read(self, *, train: bool) -> Features:
        world = self._world()
        generator = self._generator(1 if train else 2)
        count = self.sizes[train]
        chosen = torch.randint(len(world.prototypes), (count,), generator=generator)
        latent = world.prototypes[chosen] + SPREAD * torch.randn(count, LATENT, generator=generator)
        hidden = torch.tanh(latent @ world.inner + world.bias)
        table = torch.randn(count, self.features, generator=generator).mul_(NOISE).addmm_(hidden, world.outer)
        return Features(table, torch.arange(count), chosen % self.classes)

    def _world(self) -> World:
        generator = self._generator(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return World(
            prototypes=normal(self.classes * PROTOTYPES_PER_CLASS, LATENT),
            inner=normal(LATENT, HIDDEN) / LATENT**0.5,
            bias=normal(HIDDEN),
            outer=normal(HIDDEN, self.features) / HIDDEN**0.5,
        )

    def _generator(self, stream: int) -> torch.Generator:
        """The generator of one of three streams of the seed: the world, the training, the test."""
        return torch.Generator().manual_seed(3 * self.seed + stream)
