"""A network in stages, as all methods that cut it by depth see it, and what crosses the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from resist_lightning.methods.auxnet.network.chain import find_chain


def stages(network: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """The network's own modules, as one module for each stage.

    Args:
        network: the network.
        cuts: behind which modules it is cut.
    """
    chain = find_chain(network)
    bounds = [0, *chain.positions(cuts), len(chain.units)]
    return [chain.stage(first, last) for first, last in pairwise(bounds)]


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
