"""The default auxiliary networks: for images, sequences and vectors.

    image     (channels, height, width)   convolutions; to a sequence, patches and a transformer block; to a vector, a
                                          perceptron
    token ids (tokens,)                   an embedding and a transformer block
    sequence  (tokens, width)             a linear layer and a transformer block
    vector    (features,)                 a perceptron

Their depth does not grow with that of the boundary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import truediv

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from resist_lightning.errors import StageSelectionError

_WAY_OUT = "Give `aux_network`: a function from these two shapes to a module."
_PIXELS = 32  # height and width to which a large image is reduced before it becomes a vector


@dataclass(frozen=True)
class NetworkInput:
    """The input of a network.

    Args:
        shape: shape without the batch.
        dtype: data type of the tensor.
        vocabulary: number of token ids; None for other inputs, and where no embedding was seen.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    vocabulary: int | None = None


def default_body(given: NetworkInput, boundary: Sequence[int], width: int, heads: int) -> nn.Module:
    """The default auxiliary network for an input and a boundary.

    Args:
        given: the network's input.
        boundary: shape of the boundary, without the batch.
        width: number of channels; for a sequence a quarter of them.
        heads: number of outputs of the boundary's shape, side by side in the first dimension behind the batch.

    Raises:
        StageSelectionError: if there is none for these shapes.
    """
    shape, dimensions = given.shape, len(boundary)
    asked = (heads * boundary[0], *boundary[1:])
    if not given.dtype.is_floating_point:
        if len(shape) == 1 and dimensions <= 2 and given.vocabulary is not None:
            return _of_ids(shape[0], given.vocabulary, boundary, width, heads)
    elif len(shape) == 1:
        return perceptron(shape[0], asked, width)
    elif len(shape) == 2 and dimensions <= 2:
        return _of_sequence(shape, boundary, width, heads)
    elif len(shape) == 3 and dimensions == 1:
        return _image_to_vector(shape, asked, width)
    elif len(shape) == 3 and dimensions == 2:
        return _image_to_sequence(shape, boundary, width, heads)
    elif len(shape) == 3 and dimensions == 3:
        return _image_to_image(shape, boundary, width, heads)
    raise StageSelectionError(_why_none(given, boundary))


def _why_none(given: NetworkInput, boundary: Sequence[int]) -> str:
    what = f"there is no default auxiliary network that makes {tuple(boundary)} of {given.shape} ({given.dtype})"
    if given.dtype.is_floating_point:
        known = "there are some for images (channels, height, width), sequences (tokens, width) and vectors"
    elif given.vocabulary is None:
        known = "for integers, the size of the vocabulary must be known, and no embedding of the network receives them"
    else:
        known = "for token ids (tokens,), there is one to sequences (tokens, width) and to vectors"
    return f"{what}: {known}. {_WAY_OUT}"


# ------------------------------------------------------------------ images


def convolutions(image: Sequence[int], boundary: Sequence[int], width: int) -> nn.Sequential:
    """A stem, a strided 3x3 convolution for each halving of the size, and a 1x1 projection.

    Args:
        image: channels, height and width of the images.
        boundary: channels, height and width of the boundary.
        width: channels of the stem; doubled at each halving, up to the boundary's.
    """
    wanted = min(map(truediv, image[1:], boundary[1:]))
    # Down to 2 x 2 pixels: with one pixel and one image per batch, a batch norm has nothing to normalise.
    possible = min(image[1:]) / 2
    halvings = int(math.log2(max(1.0, min(wanted, possible))))
    widest = max(width, boundary[0])
    widths = [min(width * 2**halving, widest) for halving in range(halvings + 1)]
    layers = _layer(image[0], widths[0], stride=1)
    for before, after in itertools.pairwise(widths):
        layers += _layer(before, after, stride=2)
    layers += _layer(widths[-1], widths[-1], stride=1)
    # Halvings come close to the boundary's size only.
    resize = ResizeTo(boundary[1:])
    project = nn.Conv2d(widths[-1], boundary[0], kernel_size=1)
    return nn.Sequential(*layers, resize, project)


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


class ChannelsLast(nn.Module):
    """Moves the channels of each of several images behind height and width, as in Swin."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(batch, images * channels, H, W) to (batch, images * H, W, channels)."""
        each: Tensor = x.unflatten(1, (self.images, -1))
        return each.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _layer(before: int, after: int, *, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


def _image_to_image(image: Sequence[int], boundary: Sequence[int], width: int, heads: int) -> nn.Module:
    # The channels' dimension is the one without which the other two have the image's proportions; if tied, the first.
    if _distortion(image, boundary[1:]) <= _distortion(image, boundary[:2]):
        return convolutions(image, (heads * boundary[0], *boundary[1:]), width)
    height, breadth, channels = boundary
    return nn.Sequential(*convolutions(image, (heads * channels, height, breadth), width), ChannelsLast(heads))


def _distortion(image: Sequence[int], size: Sequence[int]) -> float:
    """Deviation of a height and width from the proportions of an image; 0 if these are the same."""
    return abs(math.log(image[1] * size[1] / (image[2] * size[0])))


def _image_to_vector(image: Sequence[int], asked: Sequence[int], width: int) -> nn.Module:
    # A vector so early is a perceptron's output for the pixels, or, for a large image, for fewer.
    size = [min(_PIXELS, side) for side in image[1:]]
    features = image[0] * math.prod(size)
    return nn.Sequential(ResizeTo(size), nn.Flatten(), *perceptron(features, asked, width))


# ------------------------------------------------------------------ sequences


class Tokens(nn.Module):
    """Puts learned tokens in front of a sequence, and adds learned positions.

    Args:
        extra: number of tokens in front, such as a class token; may be 0.
        tokens: number of tokens in the sequence.
        width: width of a token.
    """

    def __init__(self, extra: int, tokens: int, width: int) -> None:
        super().__init__()
        self.extra = extra
        self.positions = nn.Parameter(0.02 * torch.randn(extra + tokens, width))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to (batch, extra + tokens, width)."""
        # Positions that are added to zeros are tokens of their own.
        padded = functional.pad(x, (0, 0, self.extra, 0)) if self.extra else x
        return padded + self.positions


class ToBoundary(nn.Module):
    """Projects tokens to the shape of a boundary, after averaging them to fewer if the boundary has fewer.

    Args:
        width: width of a token.
        boundary: (tokens, width) or (width,).
        heads: number of outputs of this shape, side by side in the first dimension behind the batch.
    """

    def __init__(self, width: int, boundary: Sequence[int], heads: int) -> None:
        super().__init__()
        self.boundary, self.heads = tuple(boundary), heads
        self.project = nn.Linear(width, heads * boundary[-1])

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to (batch, heads * boundary[0], *boundary[1:])."""
        tokens = _tokens(self.boundary)
        if x.shape[1] != tokens:
            x = functional.adaptive_avg_pool1d(x.transpose(1, 2), tokens).transpose(1, 2)
        each: Tensor = self.project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return each.reshape(len(x), self.heads * self.boundary[0], *self.boundary[1:])


class PatchesToTokens(nn.Module):
    """Embeds an image's patches, a grid of them, as tokens."""

    def __init__(self, image: Sequence[int], grid: tuple[int, int], width: int) -> None:
        super().__init__()
        height, breadth = (max(1, side // patches) for side, patches in zip(image[1:], grid, strict=True))
        self.embed = nn.Conv2d(image[0], width, (height, breadth), stride=(height, breadth))
        # An image that is no multiple of the grid has patches left over; they are averaged.
        self.resize = ResizeTo(grid)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) to (batch, patches, width)."""
        patches: Tensor = self.resize(self.embed(x))
        return patches.flatten(2).transpose(1, 2)


def _image_to_sequence(image: Sequence[int], boundary: Sequence[int], width: int, heads: int) -> nn.Module:
    hidden = _hidden(width, boundary)
    grid = _grid(image, boundary[0])
    return _transformer(PatchesToTokens(image, grid, hidden), math.prod(grid), hidden, boundary, heads)


def _of_ids(tokens: int, vocabulary: int, boundary: Sequence[int], width: int, heads: int) -> nn.Module:
    hidden = _hidden(width, boundary)
    return _transformer(nn.Embedding(vocabulary, hidden), tokens, hidden, boundary, heads)


def _of_sequence(shape: Sequence[int], boundary: Sequence[int], width: int, heads: int) -> nn.Module:
    hidden = _hidden(width, boundary)
    return _transformer(nn.Linear(shape[1], hidden), shape[0], hidden, boundary, heads)


def _transformer(embed: nn.Module, tokens: int, width: int, boundary: Sequence[int], heads: int) -> nn.Module:
    """A transformer block between an embedding, which makes (batch, tokens, width), and the boundary."""
    # More tokens than in the input: a network puts its learned tokens in front.
    extra = max(0, _tokens(boundary) - tokens)
    block = nn.TransformerEncoderLayer(
        width, math.gcd(width, 4), 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.Sequential(
        embed, Tokens(extra, tokens, width), block, nn.LayerNorm(width), ToBoundary(width, boundary, heads)
    )


def _tokens(boundary: Sequence[int]) -> int:
    return boundary[0] if len(boundary) == 2 else 1


def _hidden(width: int, boundary: Sequence[int]) -> int:
    """A width that suffices for the boundary, up to four times the one that was set: two halvings of an image."""
    return min(4 * width, max(width, boundary[-1]))


def _grid(image: Sequence[int], tokens: int) -> tuple[int, int]:
    """Rows and columns of patches in the proportions of the image, together no more than ``tokens``."""
    rows = max(1, math.isqrt(tokens * image[1] // image[2]))
    columns = max(1, math.isqrt(tokens * image[2] // image[1]))
    # A very flat image is one row.
    return min(rows, tokens), min(columns, tokens // min(rows, tokens))


# ------------------------------------------------------------------ vectors


def perceptron(features: int, asked: Sequence[int], width: int) -> nn.Sequential:
    """A perceptron with two hidden layers, four times as wide as the width that was set."""
    hidden = 4 * width
    layers: list[nn.Module] = []
    for before in (features, hidden):
        layers += [nn.Linear(before, hidden), nn.LayerNorm(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, math.prod(asked)), nn.Unflatten(1, tuple(asked)))
