"""Residual networks for small images: three sections, as He et al. and Zagoruyko and Komodakis have them on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from resist_lightning.models.preact import PreActBlock

SECTIONS = 3


class SmallImageResNet(nn.Module):
    """Stem, three sections of pre-activation blocks, batch norm, ReLU, global average pooling, linear head.

    With `blocks` of 18 and a width of 16 it has the depth and the widths of ResNet-110, with 2 and 64 those of WRN-16-4.

    Args:
        blocks: residual blocks of each section, at least 1.
        width: channels of the first section; the second has twice, the third four times as many.
        num_classes: outputs of the head.
        in_channels: channels of the images.

    Raises:
        ValueError: a number outside its limits.
    """

    def __init__(self, blocks: int, width: int = 16, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if blocks < 1 or width < 1:
            raise ValueError(f"blocks={blocks} and width={width}: both must be at least 1; ResNet-110 has 18 and 16")
        widths = [width * 2**number for number in range(SECTIONS)]
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        inputs = [width, *widths[:-1]]
        self.section1, self.section2, self.section3 = (
            _section(inputs[number], widths[number], blocks, stride=2 if number else 1) for number in range(SECTIONS)
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, H, W) to logits (batch, num_classes)."""
        x = self.section3(self.section2(self.section1(self.stem(x))))
        pooled = functional.adaptive_avg_pool2d(functional.relu(self.norm(x)), 1).flatten(1)
        logits: Tensor = self.head(pooled)
        return logits


def _section(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    rest = [PreActBlock(channels, channels) for _ in range(blocks - 1)]
    return nn.Sequential(PreActBlock(in_channels, channels, stride), *rest)


def layers(blocks: int) -> int:
    """Weighted layers: two of each block, the stem and the head."""
    return 2 * SECTIONS * blocks + 2
