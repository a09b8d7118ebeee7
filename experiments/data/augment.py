"""Transforms of a batch of bytes; each image draws from torch's global generator of the process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from experiments.data.arrays import Images


class BatchRandomCrop(nn.Module):
    """Pad with zeros and crop to the old size, at a different place for each image.

    torchvision's ``v2.RandomCrop`` takes one place for a whole batch, and a call per image costs more than a
    local step of a small network.
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, pixels: Tensor) -> Tensor:
        count, channels, height, width = pixels.shape
        padded = nn.functional.pad(pixels, [self.padding] * 4)
        top, left = torch.randint(2 * self.padding + 1, (2, count, 1), device=pixels.device)
        # Indices that broadcast to (images, channels, height, width): one gather for the whole batch.
        rows = (top + torch.arange(height, device=pixels.device))[:, None, :, None]
        columns = (left + torch.arange(width, device=pixels.device))[:, None, None, :]
        image = torch.arange(count, device=pixels.device)[:, None, None, None]
        channel = torch.arange(channels, device=pixels.device)[None, :, None, None]
        return padded[image, channel, rows, columns]


class BatchRandomFlip(nn.Module):
    """Mirror each image left to right with a chance of one half."""

    def forward(self, pixels: Tensor) -> Tensor:
        mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
        return torch.where(mirrored, pixels.flip(-1), pixels)


class BatchTransform:
    """Collate function: crop and flip if asked, bytes to floats in [0, 1], normalise.

    Args:
        mean: per channel, of values in [0, 1].
        std: per channel.
        crop_padding: 0 for no random crop.
        flip: whether to mirror at random.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, crop_padding: int = 0, flip: bool = False
    ) -> None:
        steps: list[nn.Module] = [BatchRandomCrop(crop_padding)] if crop_padding else []
        steps += [BatchRandomFlip()] if flip else []
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        self.transform = v2.Compose(steps)

    def __call__(self, batch: Images) -> tuple[Tensor, Tensor]:
        """(batch, channels, H, W) of floats and (batch,) of labels."""
        return self.transform(batch.pixels), batch.labels
