"""Measurements of a network, which they do not change."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, one_hot

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.network.aux_defaults import NetworkInput
from resist_lightning.methods.auxnet.network.chain import find_chain
from resist_lightning.methods.auxnet.network.measure import measure
from tests.helpers.chains import Blocks
from tests.helpers.nets import MlpBlock, narrow_resnet, small_preact


def test_shapes_and_signs_of_what_comes_out_of_each_unit():
    measured = measure(find_chain(narrow_resnet(layers=(1, 1, 1, 1))), torch.randn(2, 3, 64, 64), repeats=1)
    assert measured.given.shape == (3, 64, 64)
    assert measured.shapes == ((64, 16, 16), (128, 8, 8), (256, 4, 4), (4,))
    assert measured.nonnegative == (True, True, True, False)
    assert measured.dtype == torch.float32
    ours = measure(find_chain(small_preact().double()), torch.randn(2, 3, 8, 8, dtype=torch.float64), repeats=1)
    assert not any(ours.nonnegative)
    assert ours.dtype == torch.float64
    assert ours.shapes[-1] == (4,)


class Slow(torch.autograd.Function):
    """Advances a clock of its own, so that a busy machine has no effect."""

    clock = 0.0

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        Slow.clock += seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Slow.clock += 2 * ctx.seconds
        return gradient, None


class SlowBlock(MlpBlock):
    def __init__(self, *seconds):
        super().__init__()
        self.seconds = list(seconds)

    def forward(self, x):
        return Slow.apply(super().forward(x), self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0])


def test_seconds_are_of_each_unit_alone_and_the_median_behind_a_warm_up(monkeypatch):
    monkeypatch.setattr("resist_lightning.methods.auxnet.network.measure.now", lambda device: Slow.clock)
    net = Blocks()
    net.a, net.b, net.c = SlowBlock(0.2, 0.02, 0.2, 0.02), SlowBlock(0.05), SlowBlock(0.0)
    with torch.no_grad():
        measured = measure(find_chain(net), torch.randn(4, 3), repeats=3)
    assert measured.forward_seconds == pytest.approx((0.02, 0.05, 0.0))
    assert measured.backward_seconds == pytest.approx((0.04, 0.1, 0.0))


class Draws(MlpBlock):
    def forward(self, x):
        drawn = torch.rand(()) + random.random() + np.random.rand()
        self.modes.append(self.training)
        self.count = self.count + 1
        return super().forward(x) * float(drawn)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_network_is_afterwards_as_it_was(training, gradients):
    net = Blocks(norm=nn.BatchNorm1d(6))
    net.computes = lambda net, x: net.head(net.c(net.b(net.norm(net.a(net.stem(x - net.mean))))))
    net.b = Draws()
    net.b.modes = []
    net.b.register_buffer("count", torch.zeros(()), persistent=False)
    net.train(training)
    if gradients:
        net.a.out.weight.grad = torch.full_like(net.a.out.weight, 7.0)
    tensors = {id(tensor): (tensor, tensor.clone()) for tensor in [*net.parameters(), *net.buffers()]}
    x = torch.randn(8, 3)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    with torch.no_grad():
        measure(find_chain(net), x, repeats=2)

    assert net.b.modes == [True] * 3
    assert {id(tensor) for tensor in [*net.parameters(), *net.buffers()]} == set(tensors)
    assert all(torch.equal(tensor, before) for tensor, before in tensors.values())
    assert all(module.training == training for module in net.modules())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    assert all(p.grad is None for p in net.parameters() if p is not net.a.out.weight)
    assert not gradients or torch.equal(net.a.out.weight.grad, torch.full_like(net.a.out.weight, 7.0))
    assert not x.requires_grad


def test_a_stage_with_nothing_to_train_has_a_backward_only_behind_another():
    net = Blocks()
    for part in (net.stem, net.a, net.b):
        part.requires_grad_(False)
    assert all(seconds >= 0 for seconds in measure(find_chain(net), torch.randn(4, 3)).backward_seconds)


class Pair(MlpBlock):
    def forward(self, x):
        return x, x


class Turned(MlpBlock):
    def forward(self, x):
        return super().forward(x).t()


class Whole(MlpBlock):
    def forward(self, x):
        return x.long()


class Half(MlpBlock):
    def forward(self, x):
        return x.half()


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (Pair, r"ends with 'net\.b' returns a tuple, not a tensor"),
        (Turned, r"ends with 'net\.b' returns a tensor of shape \(6, 5\), whose first dimension is not the batch of 5"),
        (Whole, r"ends with 'net\.b' returns a tensor of torch\.int64, not of floats"),
        (Half, r"ends with 'net\.b' returns a tensor of torch\.float16, but the unit before it one of torch\.float32"),
    ],
)
def test_what_cannot_cross_a_boundary_is_refused(block, problem):
    module = nn.ModuleDict({"net": Blocks(b=block())})
    with pytest.raises(StageSelectionError, match=problem):
        measure(find_chain(module), torch.randn(5, 3))


def test_at_least_one_run_is_measured():
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        measure(find_chain(Blocks()), torch.randn(5, 3), repeats=0)


class Reshaped(nn.Module):
    """Embeds token ids as one flat row, and other numbers by a larger table."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.words, self.places, self.layer = nn.Embedding(9, 4), nn.Embedding(20, 4), nn.Linear(4, 4)
        self.functional = functional

    def forward(self, ids: Tensor) -> Tensor:
        row = ids.reshape(-1)
        embedded = embedding(row, self.words.weight) if self.functional else self.words(row)
        return self.layer(embedded.reshape(*ids.shape, -1) + self.places(ids * 0 + 3))


@pytest.mark.parametrize("functional", [False, True])
def test_how_many_token_ids_there_are_follows_from_the_embedding_that_is_given_them(functional: bool) -> None:
    net = nn.Sequential(Reshaped(functional), nn.Linear(4, 2))
    measured = measure(find_chain(net), torch.arange(6).reshape(2, 3), repeats=1)

    assert measured.given == NetworkInput((3,), torch.int64, vocabulary=9)
    assert measured.shapes[-1] == (3, 2)


def test_of_integers_that_nothing_embeds_it_is_not_known() -> None:
    class Counts(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return one_hot(ids, 9).float().sum(1)

    net = nn.Sequential(Counts(), nn.Linear(9, 4), nn.Linear(4, 2))
    measured = measure(find_chain(net), torch.arange(6).reshape(2, 3), repeats=1)

    assert measured.given == NetworkInput((3,), torch.int64, vocabulary=None)
