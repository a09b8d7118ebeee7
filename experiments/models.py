"""torchvision's residual networks by name, with a stem for small images."""

from __future__ import annotations

import torchvision
from torch import nn


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

    Raises:
        ValueError: pretrained weights that do not fit.
    """
    if pretrained and (num_classes != 1000 or in_channels != 3 or small_images):
        raise ValueError(
            f"pretrained=True needs 1000 classes, 3 channels and small_images=False; here are {num_classes} "
            f"classes, {in_channels} channels and small_images={small_images}. Use pretrained=False"
        )
    net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, num_classes=num_classes)
    width = net.conv1.out_channels
    if small_images:
        net.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif in_channels != net.conv1.in_channels:
        net.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
    return net
