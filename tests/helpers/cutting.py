"""A subnet in its simplest form: a copy of the network with some neurons of each hidden layer, and its counterpart."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from resist_lightning.methods.ist.network.neurons import Neurons


def cut(module: nn.Module, neurons: Neurons, kept: Sequence[Sequence[int]]) -> nn.Module:
    """A copy of ``module`` that has only the neurons ``kept[i]`` of hidden layer i."""
    subnet = copy.deepcopy(module)
    for name, how in neurons.cuts.items():
        owner, _, attribute = name.rpartition(".")
        holder = subnet.get_submodule(owner)
        tensor = getattr(holder, attribute)
        piece = tensor.detach()
        if how.rows is not None:
            piece = piece[list(kept[how.rows])]
        if how.columns is not None:
            piece = piece[:, spread(kept[how.columns], how.repeat)]
        setattr(holder, attribute, nn.Parameter(piece) if isinstance(tensor, nn.Parameter) else piece)
    for size in neurons.sizes:
        holder, number = subnet.get_submodule(size.module), len(kept[size.layer]) * size.repeat
        old = getattr(holder, size.attribute)
        assert old in (whole := neurons.layers[size.layer].width * size.repeat, (whole,)), f"{size} is not {old}"
        setattr(holder, size.attribute, (number,) if isinstance(old, tuple) else number)
    return subnet


def spread(kept: Sequence[int], repeat: int) -> list[int]:
    """Indices of the neurons' entries in a flattened feature map."""
    return [neuron * repeat + position for neuron in kept for position in range(repeat)]


@contextmanager
def masked(module: nn.Module, neurons: Neurons, kept: Sequence[Sequence[int]]) -> Iterator[nn.Module]:
    """Inside, all layers that read neurons read zero for those that are not kept."""
    handles = []
    for name, how in neurons.cuts.items():
        if how.columns is not None:
            layer = module.get_submodule(name.rpartition(".")[0])
            mask = torch.zeros(neurons.layers[how.columns].width * how.repeat, dtype=torch.double)
            mask[spread(kept[how.columns], how.repeat)] = 1
            handles.append(layer.register_forward_pre_hook(partial(_mask, mask)))
    yield module
    for handle in handles:
        handle.remove()


def _mask(mask: Tensor, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    shape = [-1] if isinstance(layer, nn.Linear) else [-1] + [1] * (inputs[0].dim() - 2)
    return inputs[0] * mask.view(shape)
