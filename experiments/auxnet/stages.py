"""A network in stages, as all methods that cut it by depth see it, and what crosses the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from resist_lightning.blocks import find_blocks


def stages(network: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """The network's own modules, as one module for each stage.

    Args:
        network: the network.
        cuts: behind which modules it is cut.
    """
    blocks = [(name, block.module) for block in find_blocks(network) for name in (block.name,)]
    names = [name for name, _ in blocks]
    bounds = [0, *(names.index(name) + 1 for name in cuts), len(blocks)]
    parts: list[list[nn.Module]] = [[module for _, module in blocks[a:b]] for a, b in pairwise(bounds)]
    parts[0].insert(0, network.get_submodule("stem"))
    norm, head = network.get_submodule("norm"), network.get_submodule("head")
    parts[-1] += [norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head]
    return [nn.Sequential(*part) for part in parts]


def parameters_of(network: nn.Module, cuts: Sequence[str]) -> list[int]:
    """Numbers in the parameters of each stage."""
    return [sum(parameter.numel() for parameter in stage.parameters()) for stage in stages(network, cuts)]


def boundary_elements(network: nn.Module, cuts: Sequence[str], input_shape: Sequence[int]) -> list[int]:
    """Numbers of one sample at each cut; the network must be on the meta device."""
    found: dict[str, int] = {}

    def keep(name: str) -> None:
        def hook(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            found[name] = made[0].numel()

        network.get_submodule(name).register_forward_hook(hook)

    for name in cuts:
        keep(name)
    network(torch.empty(2, *input_shape, device="meta"))
    return [found[name] for name in cuts]
