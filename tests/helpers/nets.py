"""Small networks for tests, of blocks that the package knows and of others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resist_lightning.models import PreActBlock, PreActResNet
from tests.helpers.plain import LinearBlock


def small_preact(**options: object) -> PreActResNet:
    """About 10,000 parameters; four partitionable blocks, section3.1 to section3.4."""
    return PreActResNet((1, 1, 5, 1), 4, width_multiplier=1 / 16, **options)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory."""
    with torch.device("meta"):
        return make()


class OwnForward(BasicBlock):
    """torchvision's block with another forward, so the end of its branch is unknown."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 0.5 * torch.tanh(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))))


class Renamed(Bottleneck):
    """torchvision's block, forward included, under another name."""


class NarrowBottleneck(Bottleneck):
    """A small block of torchvision's ResNeXt."""

    def __init__(self, inplanes: int, planes: int, *args: object, **kwargs: object) -> None:
        super().__init__(inplanes, planes, *args, **{**kwargs, "groups": 2, "base_width": 32})


class MlpBlock(nn.Module):
    """A residual block that declares where its branch ends."""

    residual_branch_end = "out"

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inside = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(functional.gelu(self.inside(x)))


class Undeclared(nn.Module):
    """A residual block of an unknown class."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inside = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.inside(x))


class Recurrent(nn.Module):
    """A residual block with a recurrent layer, which keeps lists of its weights."""

    def __init__(self, width: int = 6, layer: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.layer = layer(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.layer(x)[0])


class Computed(nn.Module):
    """A residual block whose weight is computed in each forward, by ``wrap``."""

    def __init__(self, width: int = 6, wrap: Callable[[nn.Module], nn.Module] = nn.utils.weight_norm) -> None:
        super().__init__()
        self.linear = wrap(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.linear(x))


def mlp(block: Callable[[int], nn.Module], blocks: int = 4, width: int = 6) -> nn.Sequential:
    """Linear, ``body`` of residual blocks, linear."""
    net = nn.Sequential()
    net.add_module("stem", nn.Linear(3, width))
    net.add_module("body", nn.Sequential(*(block(width) for _ in range(blocks))))
    net.add_module("head", nn.Linear(width, 4))
    return net


def narrow_resnet(block: type[nn.Module] = BasicBlock, layers: tuple[int, ...] = (1, 1, 3, 1)) -> ResNet:
    """torchvision's ResNet with few blocks; its widths are fixed."""
    return ResNet(block, list(layers), num_classes=4)


def randomise_norms(module: nn.Module) -> None:
    """Set weights, biases and statistics of batch norm to values other than 0 and 1."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -1.0, 1.0)
            nn.init.uniform_(child.running_mean, -1.0, 1.0)
            nn.init.uniform_(child.running_var, 0.5, 1.5)


def residual_block(kind: str) -> tuple[nn.Module, Tensor]:
    """A block of a kind that folds, in evaluation mode, and an input that a final ReLU does not change."""
    made: dict[str, Callable[[], nn.Module]] = {
        "preact": lambda: PreActBlock(8, 8),
        "basic": lambda: BasicBlock(8, 8),
        "bottleneck": lambda: Bottleneck(32, 8),
        "resnext": lambda: NarrowBottleneck(32, 8),
        "renamed": lambda: Renamed(32, 8),
    }
    torch.manual_seed(3)
    block = made[kind]().eval()
    randomise_norms(block)
    channels = 8 if kind in ("preact", "basic") else 32
    return block, torch.rand(2, channels, 6, 6)


class Normed(nn.Module):
    """A network for images with 1,700 parameters; it trains in a third of the time of `small_preact`.

    All blocks but body.0 are partitioned by default.
    """

    def __init__(self, blocks: int = 4, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, width), nn.Linear(width, classes)
        self.body = nn.Sequential(*(LinearBlock(width) for _ in range(1 + blocks)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images[:, :, 0, 0])))


class Referring(Normed):
    """All blocks refer to one norm, into which each of them writes statistics, and to one frozen factor."""

    def __init__(self) -> None:
        super().__init__()
        norm, factor = nn.BatchNorm1d(16, affine=False), nn.Parameter(torch.full((16,), 0.5), requires_grad=False)
        self.body = nn.Sequential(*(Refers(norm, factor) for _ in range(5)))


class Refers(nn.Module):
    def __init__(self, norm: nn.Module, factor: nn.Parameter) -> None:
        super().__init__()
        self.linear, self.norm, self.factor = nn.Linear(16, 16), norm, factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x) * self.factor)


class SomeBatches(nn.Module):
    """A network of blocks of two branches; the second one runs only in batches whose first image is bright."""

    def __init__(self, classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, width), nn.Linear(width, classes)
        self.body = nn.ModuleList(SomeBatchesBlock(width) for _ in range(4))

    def forward(self, images: Tensor) -> Tensor:
        bright = bool(images[0].mean() > 0)
        x = self.stem(images.mean((2, 3)))
        for block in self.body:
            x = block(x, bright)
        return self.head(x)


class SomeBatchesBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, bright: bool) -> Tensor:
        x = x + self.first(x.tanh())
        return x + self.second(x.tanh()) if bright else x
