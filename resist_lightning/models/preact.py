"""Pre-activation residual networks of basic blocks, as trained in the paper (Dun et al., UAI 2022).

The paper calls them ResNet101, 152 and 200; they are basic-block networks with 68, 94 and 122 weighted layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

SECTION_WIDTHS = (64, 128, 256, 512)

SECTIONS_OF_DEPTH: dict[int, tuple[int, int, int, int]] = {
    # Small ones, for two CPU cores; here the depth is the number of weighted layers.
    14: (1, 1, 3, 1),
    26: (2, 2, 6, 2),
    38: (1, 1, 15, 1),
    # The paper's names.
    101: (3, 4, 23, 3),
    152: (3, 4, 36, 3),
    200: (3, 4, 50, 3),
}


class PreActBlock(nn.Module):
    """BN, ReLU, conv 3x3, BN, ReLU, conv 3x3, plus the skip.

    Where the shape changes, the skip is a 1x1 convolution of the input *after* the first BN and ReLU.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        track_running_stats: False keeps no running statistics: batch statistics are then used in evaluation too.
    """

    residual_branch_end: ClassVar[str] = "conv2"

    def __init__(self, in_channels: int, channels: int, stride: int = 1, *, track_running_stats: bool = True) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, track_running_stats=track_running_stats)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, track_running_stats=track_running_stats)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        keeps_shape = stride == 1 and in_channels == channels
        self.shortcut = None if keeps_shape else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, H, W) to (batch, channels, H / stride, W / stride), rounded up."""
        activated = functional.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(activated)
        branch: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        return branch + skip


class PreActResNet(nn.Module):
    """Stem, four sections of pre-activation blocks, global average pooling, linear head.

    The stem is the paper's for CIFAR: one 3x3 convolution without BN, ReLU or pooling. There is no BN or ReLU
    before the pooling.

    Args:
        sections: number of blocks in each of the four sections, each at least 1.
        num_classes: outputs of the head.
        width_multiplier: factor on the widths 64, 128, 256, 512; the results are rounded and at least 1.
        in_channels: channels of the images.
        track_running_stats: as in `PreActBlock`.

    Raises:
        ValueError: sections that are not four positive numbers, or a width multiplier that is not positive.
    """

    def __init__(
        self,
        sections: Sequence[int],
        num_classes: int = 10,
        *,
        width_multiplier: float = 1.0,
        in_channels: int = 3,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        if len(sections) != len(SECTION_WIDTHS) or min(sections) < 1:
            raise ValueError(
                f"sections={tuple(sections)}: four numbers of blocks are needed, each at least 1, "
                "for example sections=(2, 2, 6, 2)"
            )
        if width_multiplier <= 0:
            raise ValueError(f"width_multiplier={width_multiplier} must be above 0; 1.0 is the paper's width")
        widths = [max(1, round(width * width_multiplier)) for width in SECTION_WIDTHS]
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        inputs = [widths[0], *widths[:-1]]
        made = [
            _section(inputs[i], widths[i], sections[i], stride=1 if i == 0 else 2, track=track_running_stats)
            for i in range(len(widths))
        ]
        self.section1, self.section2, self.section3, self.section4 = made
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, H, W) to logits (batch, num_classes)."""
        x = self.section4(self.section3(self.section2(self.section1(self.stem(x)))))
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _section(in_channels: int, channels: int, blocks: int, *, stride: int, track: bool) -> nn.Sequential:
    first = PreActBlock(in_channels, channels, stride, track_running_stats=track)
    rest = [PreActBlock(channels, channels, track_running_stats=track) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def preact_resnet(depth: int, **options: Any) -> PreActResNet:
    """The network of the paper with this name (101, 152, 200), or one of the small ones (14, 26, 38).

    Args:
        depth: a key of `SECTIONS_OF_DEPTH`.
        options: keyword arguments of `PreActResNet`.

    Raises:
        ValueError: an unknown depth.
    """
    if depth not in SECTIONS_OF_DEPTH:
        choices = ", ".join(str(known) for known in SECTIONS_OF_DEPTH)
        raise ValueError(
            f"depth={depth} is unknown; choose one of {choices}, "
            "or give the numbers of blocks to PreActResNet(sections=...)"
        )
    return PreActResNet(SECTIONS_OF_DEPTH[depth], **options)
