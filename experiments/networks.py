"""Networks of the experiments: torchvision's residual ones with a stem for small images, and fully connected ones."""

from __future__ import annotations

import torchvision
from torch import nn

NORMS = ("batch", "layer", "none")


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
    """A fully connected network as IST's paper has it: linear, norm, ReLU, ..., linear.

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

    Raises:
        ValueError: a number or name outside its limits.
    """
    if depth < 2 or width < 1 or norm not in NORMS:
        raise ValueError(
            f"depth={depth} must be at least 2, width={width} at least 1, and norm={norm!r} one of {', '.join(NORMS)}"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (in_features, *[width] * (depth - 2)):
        layers.append(nn.Linear(inputs, width, bias=norm == "none"))
        if norm != "none":
            layers.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(width, num_classes, bias=not output_norm))
    if output_norm:
        layers.append(nn.BatchNorm1d(num_classes, affine=False))
    return nn.Sequential(*layers)
