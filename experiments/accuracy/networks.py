"""Networks of the study: the paper's, and one whose every block can be left out.

The paper's naive partition deals out all blocks, the strided ones too. Leaving out a strided block is no identity, and the
package refuses it. `OpenResNet` therefore shrinks between sections without parameters, by mean pooling and empty channels,
and all its blocks keep their shape: "the strided block" is the first after a shrinking.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.accuracy.settings import Settings
from resist_lightning.models import PreActBlock, PreActResNet

NETWORKS = ("preact", "open_pre", "open_post")
WIDTHS = (64, 128, 256, 512)


class PostActBlock(nn.Module):
    """Conv 3x3, BN, ReLU, conv 3x3, BN, plus the skip, ReLU: torchvision's BasicBlock without projection."""

    residual_branch_end: ClassVar[str] = "bn2"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input."""
        branch = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(x + branch)


class Shrink(nn.Module):
    """Half the height and width, by the mean; the new channels are empty. No parameters."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """(batch, C, H, W) to (batch, C + new_channels, H / 2, W / 2), rounded up."""
        pooled = functional.avg_pool2d(x, 2, ceil_mode=True)
        return functional.pad(pooled, (0, 0, 0, 0, 0, self.new_channels))


class OpenResNet(nn.Module):
    """Stem, four sections of blocks that all keep their shape, pooling, linear head.

    Args:
        sections: blocks in each of the four sections.
        num_classes: outputs of the head.
        width_multiplier: factor on the widths 64, 128, 256, 512.
        in_channels: channels of the images.
        pre_activation: blocks of the paper's network; else `PostActBlock`, after a stem with BN and ReLU.
    """

    def __init__(
        self,
        sections: tuple[int, int, int, int],
        num_classes: int = 10,
        *,
        width_multiplier: float = 1.0,
        in_channels: int = 3,
        pre_activation: bool = True,
    ) -> None:
        super().__init__()
        widths = [max(1, round(width * width_multiplier)) for width in WIDTHS]
        self.stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False))
        if not pre_activation:
            self.stem.extend([nn.BatchNorm2d(widths[0]), nn.ReLU()])
        self.shrink = nn.ModuleList(Shrink(after - before) for before, after in zip(widths, widths[1:], strict=False))
        for number, (blocks, width) in enumerate(zip(sections, widths, strict=True), start=1):
            made = [PreActBlock(width, width) if pre_activation else PostActBlock(width) for _ in range(blocks)]
            self.add_module(f"section{number}", nn.Sequential(*made))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, H, W) to logits (batch, num_classes)."""
        x = self.get_submodule("section1")(self.stem(x))
        for number, shrink in enumerate(self.shrink, start=2):
            x = self.get_submodule(f"section{number}")(shrink(x))
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def partitioned(blocks: str) -> str | list[str] | None:
    """`Config.blocks` for a name: naive, strided_shared, paper or none."""
    choices: dict[str, str | list[str] | None] = {
        "naive": "section[1-4].*",
        "strided_shared": "section[1-4].[!0]*",
        "paper": None,
        "none": [],
    }
    return choices[blocks]


def make_network(name: str, settings: Settings, channels: int, seed: int) -> nn.Module:
    """The network of a case, with the same weights for all methods of one seed."""
    torch.manual_seed(seed)
    options = {"width_multiplier": settings.width, "in_channels": channels}
    if name == "preact":
        return PreActResNet((1, 1, settings.deep, 1), 10, **options)
    return OpenResNet((2, 2, settings.deep, 2), 10, pre_activation=name == "open_pre", **options)
