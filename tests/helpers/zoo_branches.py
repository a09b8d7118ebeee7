"""Compares blocks of the zoo, scaled by this package, with references written by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from resist_lightning.methods.residual import Block
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.scaling import BranchScaling
from tests.helpers import zoo
from tests.helpers.zoo_references import reference_of

SCALE = 0.3
"""Not a power of two, so that rounding has an effect, too."""


@torch.no_grad()
def branches_differ(name: str, network: nn.Module, blocks: Iterable[Block]) -> float:
    """Compare each block, as evaluated in the full model, with its reference.

    Args:
        name: of the network in the zoo.
        network: the network; its first forward shows the branch ends, and its weights are scaled afterwards.
        blocks: its partitioned blocks.

    Returns:
        The largest deviation of a block's output, relative to the effect of the scale.
    """
    blocks = list(blocks)
    look = FirstForward(blocks)
    network.train()
    zoo.loss_of(name, network, zoo.batch_of(name, 0, 0))
    look.remove()
    network.eval()
    given = _arguments(name, network, blocks)
    expected, unscaled = [], []
    for block, (args, named) in zip(blocks, given, strict=True):
        reference = reference_of(block.module)
        for outputs, scale in ((expected, SCALE), (unscaled, 1.0)):
            arguments, names = copy.deepcopy((args, named))
            outputs.append(reference(block.module, scale, *arguments, **names))
    scaling = BranchScaling(blocks, SCALE)
    scaling.apply()
    deviations = []
    for block, (args, named), scaled, full in zip(blocks, given, expected, unscaled, strict=True):
        actual = tree_leaves(block.module(*args, **named))[0]
        deviations.append(float((actual - scaled).abs().max() / (scaled - full).abs().max()))
    scaling.take_off()
    return max(deviations)


def _arguments(name: str, network: nn.Module, blocks: Iterable[Block]) -> list[tuple[Any, Any]]:
    """The arguments of each block in an evaluation of the network."""
    given: dict[int, tuple[Any, Any]] = {}

    def keep(module: nn.Module, args: Any, named: Any) -> None:
        given[id(module)] = copy.deepcopy((args, named))

    handles = [block.module.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    zoo.loss_of(name, network, zoo.batch_of(name, 0, 1))
    for handle in handles:
        handle.remove()
    return [given[id(block.module)] for block in blocks]
