"""Modules that are built without memory: their form, and the initialisation of their values."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.state.unmade import (
    allocate,
    initialise,
    is_unmade,
    load_optimizer_state,
    present_device,
    without_memory,
)
from tests.helpers.nets import small_preact

CPU = torch.device("cpu")


class Tied(nn.Module):
    """Has weights under two names, a buffer, and rates that it reads from a tensor while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        both = nn.Parameter(torch.randn(3))
        self.one, self.other = nn.Module(), nn.Module()
        self.one.scale = self.other.scale = both
        self.register_buffer("table", torch.arange(4.0))
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        nn.init.trunc_normal_(self.head.weight, std=0.02)


@pytest.mark.parametrize("build", [small_preact, Tied, lambda: nn.LSTM(3, 4, num_layers=2)])
def test_a_module_without_memory_has_the_form_of_a_whole_one(build):
    whole = build()
    with without_memory():
        form = build()
    assert nn.Module.register_parameter.__name__ == "register_parameter"  # as before
    for (name, tensor), (wanted, like) in zip(named_tensors(form).items(), named_tensors(whole).items(), strict=True):
        described = (name, tensor.shape, tensor.stride(), tensor.dtype, type(tensor))
        assert described == (wanted, like.shape, like.stride(), like.dtype, type(like))
    assert all(parameter.is_meta for parameter in form.parameters())
    assert not any(buffer.is_meta for buffer in form.buffers())
    assert is_unmade(form)
    assert not is_unmade(whole)


def test_tied_weights_stay_one_object_and_values_can_be_read_while_a_module_is_built():
    with without_memory():
        net = Tied()
    assert net.head.weight is net.embedding.weight
    assert net.one.scale is net.other.scale
    assert net.rates == [0, 0.5, 1]
    weight = net.head.weight
    allocate(named_tensors(net), CPU)
    assert net.head.weight is weight
    assert weight.detach().numpy().shape == (5, 4)
    assert not is_unmade(net)


def test_a_parameter_that_is_in_use_keeps_its_memory():
    net = nn.Module()
    parameter = nn.Parameter(torch.ones(2))
    reference = weakref.ref(parameter)  # torch swaps no tensor that has a weak reference
    with without_memory():
        net.register_parameter("weight", parameter)
    assert reference() is parameter
    assert parameter.tolist() == [1, 1]


def test_worker_0_makes_the_values_as_the_parts_themselves_do():
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    with torch.device("meta"):
        made = net()
    torch.manual_seed(3)
    initialise(made, CPU)
    # Nothing was drawn for the training: other workers make no values, and must draw the same afterwards.
    for (name, tensor), expected in zip(named_tensors(made).items(), named_tensors(net()).values(), strict=True):
        assert torch.equal(tensor, expected), name
    assert present_device(made) == CPU


def test_a_part_that_cannot_make_its_values_is_named():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(2))

    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2, 2), Scale())
    with pytest.raises(ValueError, match=r"^1 \(Scale\) was built on the meta device, and has no `reset_parameters`"):
        initialise(net, CPU)
    present = nn.Sequential(Scale())
    initialise(present, CPU)
    assert present[0].factor.tolist() == [1, 1]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}])
def test_loaded_steps_are_counted_where_the_optimizer_counts_them(options):
    net = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(2)).sum().backward()
    optimizer.step()
    with without_memory():
        form = nn.Linear(2, 3)
    other = torch.optim.AdamW(form.parameters(), lr=0.1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.update(options)  # which these optimizers would refuse on this device
    load_optimizer_state(other, saved, torch.device("meta"))  # in the place of a GPU
    state = other.state[form.weight]
    assert state["exp_avg"].is_meta
    assert state["step"].is_meta == bool(options)
    assert state["step"].dtype == torch.float32
