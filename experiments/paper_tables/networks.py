"""Parameters, multiply-adds and memory of networks and of their sub-networks, on the meta device: nothing is computed.

One multiply-add (MAC) is two of the floating-point operations that PyTorch counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.networks import PAPER_BLOCKS
from resist_lightning import Config
from resist_lightning.methods.residual import Block
from resist_lightning.methods.resist.config import PAPER_MIN_BLOCKS
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.network import select_blocks
from resist_lightning.methods.resist.subnet import Subnet
from resist_lightning.models import preact_resnet

WORKERS = (2, 4, 8)
SLOTS = 1  # tensors of optimizer state per parameter (m): SGD with momentum

# Blocks per worker that the volumes of the paper's Table 1 imply.
TABLE_1_BLOCKS = {2: 11, 4: 6, 8: 4}

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network, and its images."""

    name: str  # as it is shown
    make: Callable[[], nn.Module]  # builds it
    image: int  # height and width of an image
    shrink: int  # the factor by which the third section's feature maps are smaller than the image
    stated: dict[str, float]  # values that its makers state: ``parameters`` and ``gmacs``; empty if none


def networks(size: str) -> list[Network]:
    """The paper's three and torchvision's; in the smoke size one of each."""
    paper = [
        Network(f'"{depth}", {classes} classes', partial(paper_network, depth, classes), 32, 4, {})
        for depth, classes in ((101, 100), (101, 10), (152, 100), (200, 100))
    ]
    if size == "smoke":
        return [paper[0], _torchvision("resnet50")]
    return [*paper, *map(_torchvision, TORCHVISION)]


def paper_network(depth: int, classes: int = 100, *, statistics: bool = False) -> nn.Module:
    """The paper's network, whose batch norm keeps no running statistics unless asked."""
    return preact_resnet(depth, num_classes=classes, track_running_stats=statistics)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The network without memory."""
    with torch.device("meta"):
        return make().eval()


def measure(network: Network) -> dict[str, Any]:
    """Parameters and MACs of a network, and of its sub-networks with the default minimum of blocks and with none."""
    module = on_meta(network.make)
    blocks = select_blocks(module, PAPER_BLOCKS)
    image = network.image
    full = macs(module, image)
    by_hand = sum(map(partial(_block_macs, side=image // network.shrink), blocks))
    found = {
        "network": network.name,
        "image": image,
        "blocks": len(blocks),
        "parameters": count_parameters(module, blocks),
        "macs": {"all": full, "partitioned_share": by_hand / full},
        "stated": network.stated,
    }
    minima: dict[str, Callable[[int], int | None]] = {
        "default": lambda _: min(PAPER_MIN_BLOCKS, len(blocks)),
        "none": lambda _: 0,
    }
    if network.name.startswith('"101"'):
        minima["table 1"] = lambda workers: TABLE_1_BLOCKS[workers]
    cost = _Cost(module, blocks, image)
    found["subnets"] = [
        {"minimum": name, "workers": workers, **_subnets(found, cost, least(workers), workers)}
        for name, least in minima.items()
        for workers in WORKERS
    ]
    return found


def count_parameters(module: nn.Module, blocks: Sequence[Block]) -> dict[str, Any]:
    """All, shared, and the different sizes of a partitionable block (one, in every network here)."""
    sizes = [_parameters(block.module) for block in blocks]
    total = _parameters(module)
    return {"all": total, "shared": total - sum(sizes), "by_block": sorted(set(sizes))}


def macs(module: nn.Module, image: int) -> int:
    """Multiply-adds of one image's forward pass, as PyTorch's counter sees them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, 3, image, image, device="meta"))
    return int(counter.get_total_flops()) // 2


def share_by_formula(partitioned_share: float, held: float, blocks: int) -> float:
    """r = 1 - f (1 - k / N): a sub-network's share of the MACs."""
    return 1 - partitioned_share * (1 - held / blocks)


def memory_bytes(shared: int, block: int, held: float, slots: int = SLOTS) -> float:
    """(2 + m)(Q + k b), in fp32: parameters, gradients and optimizer state; arguments in parameters."""
    return (2 + slots) * 4 * (shared + held * block)


class _Cost:
    """MACs of sub-networks; workers with equally many blocks cost the same, so one of them is counted."""

    def __init__(self, module: nn.Module, blocks: Sequence[Block], image: int) -> None:
        self.module, self.image = module, image
        self._subnet = Subnet(blocks)
        self._known: dict[int, int] = {}

    def of(self, held: tuple[int, ...]) -> int:
        if len(held) not in self._known:  # blocks of one section cost the same, whichever they are
            self._subnet.hold(held)
            self._known[len(held)] = macs(self.module, self.image)
        return self._known[len(held)]

    def partition(self, least: int | None, workers: int) -> tuple[tuple[int, ...], ...]:
        """The first round's partition, by our planner."""
        return (
            BlockLayout(self.module, Config(min_blocks=least, blocks=PAPER_BLOCKS), workers).schedule.partition(0).held
        )


def _subnets(found: dict[str, Any], cost: _Cost, least: int | None, workers: int) -> dict[str, Any]:
    partition = cost.partition(least, workers)
    counts = sorted(map(len, partition), reverse=True)
    parameters = found["parameters"]
    (block,) = found["parameters"]["by_block"]
    memory = memory_bytes(parameters["shared"], block, mean(counts))
    mean_macs = mean(cost.of(held) for held in partition)
    return {
        "held": counts,
        "macs": mean_macs,
        "ratio": mean_macs / found["macs"]["all"],
        "ratio_by_formula": share_by_formula(found["macs"]["partitioned_share"], mean(counts), found["blocks"]),
        "memory_bytes": memory,
        "memory_share": memory / ((2 + SLOTS) * 4 * parameters["all"]),
    }


def _block_macs(block: Block, side: int) -> int:
    """MACs by hand: a weight of a convolution is used once for each place of the feature map."""
    weights = [layer.weight for layer in block.module.modules() if isinstance(layer, nn.Conv2d)]
    return sum(weight.numel() for weight in weights) * side**2


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _torchvision(name: str) -> Network:
    meta = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    stated = {"parameters": meta["num_params"], "gmacs": meta["_ops"]}
    return Network(name, partial(torchvision.models.get_model, name, weights=None), 224, 16, stated)
