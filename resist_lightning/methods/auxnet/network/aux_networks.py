"""Builds auxiliary networks, which guess the input of a stage, and its multiplier, from the image (section 2.3)."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from operator import truediv

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.config import StageConfig


class AuxNetwork(nn.Module):
    """An auxiliary network whose output is divided into guess and multiplier.

    Args:
        body: maps images (batch, *input_shape) to (batch, *boundary_shape), with twice the channels if there are
            multipliers.
        multipliers: whether there are.
        nonnegative: whether the guess goes through a ReLU, as the tensor that it stands for does.
    """

    def __init__(self, body: nn.Module, *, multipliers: bool, nonnegative: bool) -> None:
        super().__init__()
        self.body = body
        self.multipliers = multipliers
        self.nonnegative = nonnegative

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The guess, and the multiplier in units of it."""
        guess: Tensor = self.body(x)
        multiplier = None
        if self.multipliers:
            guess, multiplier = guess.chunk(2, dim=1)
        if self.nonnegative:
            guess = functional.relu(guess)
        return guess, multiplier


class ResizeTo(nn.Module):
    """Averages an image down to a height and width, or repeats its pixels up to them."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) to (batch, channels, *size)."""
        # The usual case; pooling would copy.
        if x.shape[-2:] == self.size:
            return x
        height, width = self.size
        return functional.adaptive_avg_pool2d(x, (height, width))


def convolutions(input_shape: Sequence[int], boundary_shape: Sequence[int], width: int) -> nn.Sequential:
    """The default: a stem, a strided 3x3 convolution for each halving of the size, and a 1x1 projection.

    Its depth follows from the sizes, not from how deep the boundary lies.

    Args:
        input_shape: channels, height and width of the images.
        boundary_shape: the same of the boundary.
        width: channels of the stem; doubled at each halving, up to the boundary's.

    Raises:
        StageSelectionError: if one of the shapes is not that of an image.
    """
    if len(input_shape) != 3 or len(boundary_shape) != 3:
        raise StageSelectionError(
            f"the default auxiliary network makes an image (channels, height, width) of an image, and here it is "
            f"{tuple(boundary_shape)} of {tuple(input_shape)}. Give `aux_network`: a function from these two shapes to "
            "a module."
        )
    wanted = min(map(truediv, input_shape[1:], boundary_shape[1:]))
    # Down to 2 x 2 pixels: of one, a batch norm makes nothing where a batch has one image.
    possible = min(input_shape[1:]) / 2
    halvings = int(math.log2(max(1.0, min(wanted, possible))))
    widest = max(width, boundary_shape[0])
    widths = [min(width * 2**halving, widest) for halving in range(halvings + 1)]
    layers = _layer(input_shape[0], widths[0], stride=1)
    for before, after in itertools.pairwise(widths):
        layers += _layer(before, after, stride=2)
    layers += _layer(widths[-1], widths[-1], stride=1)
    # Halvings come close to the boundary's size only.
    resize = ResizeTo(boundary_shape[1:])
    project = nn.Conv2d(widths[-1], boundary_shape[0], kernel_size=1)
    return nn.Sequential(*layers, resize, project)


def make_aux_network(
    config: StageConfig, input_shape: Sequence[int], boundary_shape: Sequence[int], *, nonnegative: bool, boundary: int
) -> AuxNetwork:
    """The auxiliary network of a boundary, from the settings; random numbers from (seed, boundary) only.

    Args:
        config: the settings.
        input_shape: of an image, without the batch.
        boundary_shape: of the stage's input, without the batch.
        nonnegative: whether that is the output of a ReLU.
        boundary: its number, from 1.

    Raises:
        StageSelectionError: if the user's network gives another shape, or there is no default one for these shapes.
    """
    heads = 2 if config.multipliers else 1
    asked = (heads * boundary_shape[0], *boundary_shape[1:])
    # As in the simulator, whatever was drawn before; the user's generators stay where they are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config.seed, boundary))
        if config.aux_network is None:
            body: nn.Module = convolutions(input_shape, asked, config.aux_width)
        else:
            body = config.aux_network(tuple(input_shape), asked)
            _check_shape(body, tuple(input_shape), asked)
    # A network of the user's ends as the user wants.
    nonnegative = nonnegative and config.aux_network is None
    return AuxNetwork(body, multipliers=config.multipliers, nonnegative=nonnegative)


def _layer(before: int, after: int, *, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


def _check_shape(body: nn.Module, input_shape: tuple[int, ...], asked: tuple[int, ...]) -> None:
    # In eval mode, so that the statistics of batch norms stay as they are.
    training = body.training
    with torch.no_grad():
        made = body.eval()(torch.zeros(2, *input_shape))
    body.train(training)
    if tuple(made.shape) != (2, *asked):
        raise StageSelectionError(
            f"`aux_network` makes {tuple(made.shape[1:])} of an image {input_shape}, and the boundary needs {asked}. "
            "Make it of the second argument's shape."
        )


def _seed(seed: int, boundary: int) -> int:
    digest = hashlib.sha256(f"auxiliary network {seed} {boundary}".encode()).digest()
    # torch takes seeds of 63 bits everywhere.
    return int.from_bytes(digest[:8], "big") % 2**63
