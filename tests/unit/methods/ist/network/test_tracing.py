"""Tracing of a forward: modules that are entered, assumed arguments, and unchanged state."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning import NeuronConfig
from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.network.discovery import find_neurons
from resist_lightning.methods.ist.subnet import Subnet
from tests.helpers.refusals import Net, refusal


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.linear(x)


def test_a_forward_that_cannot_be_traced_says_where_and_what_to_do():
    message = refusal(nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 4), nn.Sequential(Branch()))}))
    assert "the forward of 'net.1.0' (Branch) cannot be traced" in message
    assert "torch.fx says" in message
    assert "TraceError: symbolically traced variables cannot be used as inputs to control flow" in message
    assert f"{Path(__file__).name}:" in message
    assert "if x.sum() > 0:" in message
    assert "put the layers" in message
    assert "the forward of the module itself (Branch) cannot be traced" in refusal(Branch())
    assert "the forward of 'net' (Branch) cannot be traced" in refusal(nn.ModuleDict({"net": Branch()}))


def test_the_way_out_of_the_tracing_error_is_true():
    """A module without a forward is traced child by child, so a branching module may stand beside the network."""
    net = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), "branching": nn.Identity()})
    assert [layer.name for layer in find_neurons(net).layers] == ["net.0"]


def test_a_forward_that_was_put_into_a_module_of_torch_is_looked_into():
    """It was taken for its class's forward, so the neurons of a softmax were dealt out."""
    net = Net(lambda net, x: net.c(net.a(x)))
    net.a.forward = lambda x: functional.linear(x, net.a.weight, net.a.bias).softmax(-1)
    assert "nothing to deal out" in refusal(net)


class Switched(nn.Module):
    """A network that returns its features on request."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, return_features=False):
        features = self.a(x).relu()
        return features if return_features else self.b(features)


def test_a_module_must_be_called_in_training_as_it_was_when_its_neurons_were_followed():
    """With another argument it silently returned the features of a subnet, half as wide."""
    net = Switched()
    layout = NeuronLayout(net, NeuronConfig(), 2)
    subnet = Subnet(layout, 0)
    subnet.hold(0)
    net(torch.ones(2, 6))
    net(torch.ones(2, 6), return_features=False)
    with pytest.raises(ValueError, match=r"called with return_features=True, .* traced with return_features=False"):
        net(torch.ones(2, 6), return_features=True)
    for name in subnet.tensors:
        subnet.widen(name)
    subnet.hold_all()
    assert net(torch.ones(2, 6), return_features=True).shape == (2, 8)


def test_a_child_that_cannot_be_traced_does_not_matter_where_other_layers_are_named():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    net = nn.ModuleDict({"branches": Branches(), "mlp": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))})
    assert [layer.name for layer in find_neurons(net, "mlp.*").layers] == ["mlp.0"]
    for choice in (None, "branches.*"):
        with pytest.raises(LayerSelectionError, match=r"'branches' \(Branches\) cannot be traced"):
            find_neurons(net, choice)


def test_tracing_moves_no_generator():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(self.a(x) * random.random() * float(np.random.rand()))

    net = Draws()
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    find_neurons(net)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state


@torch.fx.wrap
def mul(h: Tensor, factor: float) -> Tensor:
    return h.softmax(1) * factor


def test_a_function_of_the_users_own_is_not_taken_for_torchs_of_the_same_name():
    with pytest.raises(LayerSelectionError, match=r"neurons reach mul\(\), a function of .* not traced"):
        find_neurons(Net(lambda net, x: net.c(mul(net.a(x), 2.0))))


def test_a_compiled_network_inside_a_forward_is_followed_as_it_is_written():
    def names(module: nn.Module) -> list[str]:
        return [layer.name for layer in find_neurons(module).layers]

    module = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    assert names(module) == ["0.0"]
    module[0].compile(backend="eager")
    assert names(module) == ["0.0"]
    assert names(nn.Sequential(torch.compile(module[0], backend="eager"))) == ["0._orig_mod.0"]
