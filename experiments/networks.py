"""Networks of the experiments: residual ones, torchvision's with a stem for small images, and fully connected ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning.models import PreActBlock, PreActResNet, preact_resnet

# The third section of a ResNet without its first block, as in the paper, for torchvision's names and ours.
PAPER_BLOCKS = "*3.[!0]*"
NORMS = ("batch", "layer", "none")
RESNETS = [
    name for name in torchvision.models.list_models(torchvision.models) if name.startswith(("resne", "wide_resnet"))
]


def torchvision_resnet(
    name: str, *, num_classes: int, in_channels: int = 3, small_images: bool = True, pretrained: bool = False
) -> nn.Module:
    """A torchvision ResNet, ResNeXt or Wide ResNet; its residual blocks are torchvision's own, unmodified.

    Args:
        name: as torchvision calls it, for example ``resnet50``.
        num_classes: outputs of the head.
        in_channels: channels of the images.
        small_images: replace the stem, which divides height and width by 4, by one 3x3 convolution (as for
            CIFAR).
        pretrained: start from torchvision's ImageNet weights; needs num_classes=1000, 3 channels and the
            usual stem.
    """
    if name not in RESNETS:
        raise ValueError(f"name={name} must be one of {', '.join(RESNETS)} (resnet18 is the smallest)")
    if pretrained and (num_classes != 1000 or in_channels != 3 or small_images):
        raise ValueError(
            f"pretrained=True needs 1000 classes, 3 channels and small_images=False; here are {num_classes} "
            f"classes, {in_channels} channels and small_images={small_images}. Use pretrained=False"
        )
    net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, num_classes=num_classes)
    width = net.conv1.out_channels
    if small_images:
        net.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()  # with it, 32 x 32 pixels would be 16 x 16 before the first block
    elif in_channels != net.conv1.in_channels:
        net.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
    return net


def mlp(
    *,
    in_features: int,
    num_classes: int,
    depth: int = 2,
    width: int = 4096,
    norm: str = "batch",
    output_norm: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A fully connected network as in IST's paper: linear, norm, ReLU, ..., linear.

    Layers that a norm follows have no bias. (The paper's batch norm uses the statistics of each batch, in the test too:
    that is the strategy's ``batch_norm="batch"``.)

    Args:
        in_features: entries of an example; images are flattened.
        num_classes: outputs.
        depth: linear layers, at least 2; all but the last are hidden.
        width: neurons of each hidden layer.
        norm: after each hidden layer: ``batch`` (the paper's), ``layer`` or ``none``.
        output_norm: a batch norm without parameters on the outputs, as in the paper.
        dropout: share of the hidden neurons that a training step leaves out.
    """
    if depth < 2:
        raise ValueError(f"depth={depth} must be at least 2: linear layers; 2 and 3 are the paper's")
    if width < 1:
        raise ValueError(f"width={width} must be at least 1: neurons of each hidden layer; 4096 is the paper's")
    if norm not in NORMS:
        raise ValueError(f"norm={norm} must be one of {', '.join(NORMS)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1; 0 is the paper's")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (in_features, *[width] * (depth - 2)):
        layers.append(nn.Linear(inputs, width, bias=norm == "none"))  # a norm has a shift of its own
        if norm != "none":
            layers.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(width, num_classes, bias=not output_norm))
    if output_norm:
        layers.append(nn.BatchNorm1d(num_classes, affine=False))
    return nn.Sequential(*layers)


class FastPreActResNet(PreActResNet):
    """The paper's network with a last batch norm, computed in bfloat16 with channels last.

    The norm and a ReLU before the pooling are those of He et al.; with them, high learning rates train well. Weights,
    gradients and logits stay in 32 bit.

    Args:
        zero_branches: the last convolution of each residual branch starts at zero (Goyal et al., arXiv 1706.02677), so
            that every block begins as its skip.
    """

    def __init__(
        self, sections: Sequence[int], num_classes: int = 10, *, zero_branches: bool = False, **options: Any
    ) -> None:
        super().__init__(sections, num_classes, **options)
        self.norm = nn.BatchNorm2d(self.head.in_features)
        blocks = [module for module in self.modules() if zero_branches and isinstance(module, PreActBlock)]
        for block in blocks:
            nn.init.zeros_(block.conv2.weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, H, W) to logits (batch, num_classes)."""
        with torch.autocast(x.device.type, torch.bfloat16):
            x = self.stem(x.contiguous(memory_format=torch.channels_last))
            x = self.section4(self.section3(self.section2(self.section1(x))))
            pooled = functional.adaptive_avg_pool2d(functional.relu(self.norm(x)), 1).flatten(1)
            logits: Tensor = self.head(pooled)
        return logits.float()


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
    """Stem, four sections of blocks that all keep their shape and can be left out, pooling, linear head.

    The naive partition of ResIST's paper deals out all blocks, the strided ones too. Leaving out a strided block is no
    identity, and the package refuses it. This network therefore shrinks between sections without parameters, by mean
    pooling and empty channels: "the strided block" is the first after a shrinking.

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
        widths = [max(1, round(width * width_multiplier)) for width in (64, 128, 256, 512)]
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


class SmallImageResNet(nn.Module):
    """He et al.'s network for CIFAR: stem, three sections of pre-activation blocks, BN, ReLU, pooling, linear head.

    With `blocks` of 18 and a width of 16 it has the depth and the widths of ResNet-110, with 2 and 64 those of WRN-16-4.

    Args:
        blocks: residual blocks of each section, at least 1.
        width: channels of the first section; the second has twice, the third four times as many.
        num_classes: outputs of the head.
        in_channels: channels of the images.
    """

    def __init__(self, blocks: int, width: int = 16, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if blocks < 1 or width < 1:
            raise ValueError(f"blocks={blocks} and width={width}: both must be at least 1; ResNet-110 has 18 and 16")
        widths = [width * 2**number for number in range(3)]
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        inputs = [width, *widths[:-1]]
        self.section1, self.section2, self.section3 = (
            _section(inputs[number], widths[number], blocks, stride=2 if number else 1) for number in range(3)
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
    """Weighted layers of a :class:`SmallImageResNet`: two of each block, the stem and the head."""
    return 6 * blocks + 2


def fully_connected(network: Mapping[str, Any]) -> bool:
    """Whether the options ``network`` of an experiment describe a network for IST."""
    return "width" in network


def described(
    network: Mapping[str, Any], *, num_classes: int, in_channels: int | None = 3, in_features: int | None = None
) -> nn.Module:
    """The network of options: ``depth`` and ``width_multiplier`` for images, ``depth`` and ``width`` for features."""
    if fully_connected(network):
        assert in_features is not None
        return mlp(in_features=in_features, num_classes=num_classes, **network)
    return preact_resnet(num_classes=num_classes, in_channels=in_channels, **network)


def in_words(network: Mapping[str, Any]) -> str:
    """The network of a record, in words."""
    if fully_connected(network):
        return f"fully connected, {network['depth']} layers, hidden {network['width']}"
    return f"PreActResNet {network['depth']}, width x {network['width_multiplier']:g}"
