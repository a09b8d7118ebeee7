"""Blocks of known classes, and a second implementation of their residual branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resist_lightning.methods.residual import Block, recognise
from resist_lightning.models import PreActBlock
from tests.helpers.nets import residual_block

KINDS = ["preact", "basic", "bottleneck", "resnext", "renamed"]


def branch(block: nn.Module, x: Tensor) -> Tensor:
    """The residual branch, implemented a second time."""
    if isinstance(block, PreActBlock):
        return block.conv2(torch.relu(block.bn2(block.conv1(torch.relu(block.bn1(x))))))
    out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    return out if not hasattr(block, "conv3") else block.bn3(block.conv3(torch.relu(out)))


def ended(block: nn.Module, y: Tensor) -> Tensor:
    """The rest of a block after the addition: an activation in torchvision's blocks."""
    return y if isinstance(block, PreActBlock) else torch.relu(y)


def block_of(kind: str) -> tuple[Block, nn.Module, Tensor]:
    """A block of a kind, its module, and an input."""
    module, x = residual_block(kind)
    block = recognise("b", module)
    assert isinstance(block, Block)
    return block, module, x
