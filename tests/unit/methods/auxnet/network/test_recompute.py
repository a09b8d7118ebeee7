"""Activation checkpointing in stages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from resist_lightning import StageSelectionError
from resist_lightning.methods.auxnet.network.chain import find_chain
from tests.helpers.stages import TanhBlock


class Net(nn.Module):
    """Four blocks between two layers; ``around`` computes the blocks, ``inner`` reads a parameter of the network."""

    def __init__(self, around: Callable[[Net, Tensor], Tensor], block: Callable[[], nn.Module] = TanhBlock) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.body = nn.ModuleList(block() for _ in range(4))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.around(self, self.stem(x)) * self.scale)

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body[2](x) * self.scale, x + self.scale


class Plain(nn.Module):
    """A layer without a residual, which is traced into."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.drop = nn.Linear(6, 6), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.out(x)))


def each(net: Net, x: Tensor) -> Tensor:
    for block in net.body:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def sections(net: Net, x: Tensor) -> Tensor:
    return checkpoint_sequential(nn.Sequential(*net.body), 2, x, use_reentrant=False)


def two_results(net: Net, x: Tensor) -> Tensor:
    first, second = checkpoint(net.inner, net.body[0](x), use_reentrant=False)
    return net.body[3](net.body[1](first + second))


NETS = {
    "each block": lambda: Net(each),
    "each traced layer": lambda: Net(each, Plain),
    "sections of traced layers": lambda: Net(sections, Plain),
    "a part with two results, which reads a parameter": lambda: Net(two_results),
}


def gradients(net: Net, forward: Callable[[Tensor], Tensor]) -> tuple[list[Tensor | None], list[int]]:
    """The gradients of a batch, and the calls of each block's layer; dropout draws the same each time."""
    calls = [0] * len(net.body)

    def count(number: int) -> Callable[..., None]:
        def note(*_: object) -> None:
            calls[number] += 1

        return note

    handles = [block.out.register_forward_hook(count(number)) for number, block in enumerate(net.body)]
    torch.manual_seed(4)
    forward(torch.ones(5, 3)).square().sum().backward()
    for handle in handles:
        handle.remove()
    found = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    return found, calls


@pytest.mark.parametrize("name", NETS)
def test_stages_compute_again_what_the_network_does(name: str) -> None:
    """They kept all activations, in silence."""
    torch.manual_seed(1)
    net = NETS[name]()
    chain = find_chain(net)
    stages = [chain.stage(0, 1), chain.stage(1, len(chain.units))]

    expected, calls = gradients(net, net)
    found, calls_of_stages = gradients(net, nn.Sequential(*stages))

    assert max(calls) == 2
    assert calls_of_stages == calls
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_checkpointing_that_a_stage_cannot_take_is_refused_with_the_other_kind() -> None:
    def reentrant(net: Net, x: Tensor) -> Tensor:
        for block in net.body:
            x = checkpoint(block, x, use_reentrant=True)
        return x

    with pytest.raises(StageSelectionError, match=r"use_reentrant=True\) .*; use use_reentrant=False"):
        find_chain(Net(reentrant))
