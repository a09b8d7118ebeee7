"""Stages in sequence compute the network, bit for bit, with its own tensors."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torchvision.models import vgg

from resist_lightning.methods.auxnet.network.chain import find_chain
from resist_lightning.state.memory import replace_memory
from tests.helpers.chains import Blocks, bounds
from tests.helpers.nets import MlpBlock, Undeclared, mlp, narrow_resnet, on_meta, small_preact


class WritesInput(MlpBlock):
    """Works in place on its input, like blocks that begin with nn.ReLU(inplace=True)."""

    def forward(self, x):
        return x.relu_() + self.out(functional.dropout(self.inside(x), training=self.training))


def narrow_vgg() -> nn.Module:
    """torchvision's VGG with few layers and channels."""
    net = on_meta(torchvision.models.vgg11)
    net.features = vgg.make_layers([4, "M", 8, 8, "M"], batch_norm=True)
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3))
    return net


def add_up(net, x):
    x = net.stem(x)
    x = x + net.a(x)
    y = net.b(x)
    y += x
    return net.head(y + net.c(y))


NETWORKS = {
    "torchvision": (lambda: narrow_resnet(layers=(1, 1, 2, 1)), (2, 3, 32, 32)),
    "ours": (small_preact, (3, 3, 8, 8)),
    "vgg": (narrow_vgg, (4, 3, 8, 8)),
    "in place": (lambda: mlp(WritesInput), (5, 3)),
    "unknown": (lambda: mlp(Undeclared), (5, 3)),
    "sums": (
        lambda: Blocks(add_up, **{name: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for name in "abc"}),
        (5, 3),
    ),
    "tensors of its own": (
        lambda: Blocks(lambda net, x: net.head(net.c(net.b(net.a(net.stem(x - net.mean)) + net.position)))),
        (5, 3),
    ),
    "a tensor of its own that is given to a layer": (
        lambda: Blocks(lambda net, x: net.head(net.c(net.b(net.stem(x - net.mean) + net.a(net.position))))),
        (5, 3),
    ),
}
MADE: dict[str, tuple[nn.Module, torch.Tensor]] = {}


def made(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A fresh copy of the network, and an input."""
    if kind not in MADE:
        make, shape = NETWORKS[kind]
        torch.manual_seed(5)
        MADE[kind] = make(), torch.randn(*shape)
    net, x = MADE[kind]
    return copy.deepcopy(net), x.clone()


def run_stages(chain, cuts, x, loss):
    """Forward through the stages, then each stage's own backward, as the workers do in the warm-up."""
    inputs, outputs = [], []
    for first, last in bounds(chain, cuts):
        inputs.append(x.detach().requires_grad_(first > 0))
        outputs.append(chain.stage(first, last)(inputs[-1]))
        x = outputs[-1]
    gradient = None
    for entered, output in reversed(list(zip(inputs, outputs, strict=True))):
        if gradient is None:
            loss(output).backward()
        else:
            output.backward(gradient)
        gradient = entered.grad
    return outputs[-1]


@pytest.mark.parametrize("kind", NETWORKS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_stages_in_a_row_are_the_network_bit_for_bit(kind, data):
    whole, x = made(kind)
    net, _ = made(kind)
    chain = find_chain(nn.ModuleDict({"net": net}))
    cuts = data.draw(st.sets(st.integers(1, len(chain.units) - 1)))

    torch.manual_seed(1)
    expected = whole(x.clone())
    (expected**2).mean().backward()
    torch.manual_seed(1)
    output = run_stages(chain, cuts, x.clone(), lambda y: (y**2).mean())

    assert torch.equal(output, expected)
    for (name, mine), theirs in zip(net.named_parameters(), whole.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name
    for (name, mine), theirs in zip(net.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_stage_has_the_networks_own_tensors_and_the_units_names_are_theirs(kind):
    net, _ = made(kind)
    module = nn.ModuleDict({"net": net})
    chain = find_chain(module)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    unused = 0
    for unit in range(len(chain.units)):
        stage = chain.stage(unit, unit + 1)
        own = {id(tensor) for tensor in [*stage.parameters(), *stage.buffers()]}
        listed = {id(named[name]) for name in chain.names(unit, unit + 1)}
        assert own <= listed
        unused += len(listed - own)
    assert unused == 0


def test_a_stage_never_changes_its_input():
    net, x = made("in place")
    chain = find_chain(net)
    boundary = chain.stage(0, 1)(x).detach()
    before = boundary.clone()
    chain.stage(1, 4)(boundary.requires_grad_()).sum().backward()
    assert torch.equal(boundary, before)
    assert boundary.grad is not None


def test_the_forward_of_the_network_is_its_own():
    net, x = made("ours")
    torch.manual_seed(2)
    before = net(x)
    chain = find_chain(net)
    chain.stage(0, 2)
    net2, _ = made("ours")
    torch.manual_seed(2)
    assert torch.equal(net2(x), before)
    assert "forward" not in vars(net)
    assert type(net) is type(net2)


def test_modes_and_hooks_of_blocks_are_the_networks():
    net, x = made("ours")
    stage = find_chain(net).stage(0, 3)
    seen = []
    net.section3[0].register_forward_hook(lambda block, args, output: seen.append(block.training))
    counter = net.section3[0].bn1.num_batches_tracked
    stage(x)
    net.eval()
    stage(x)
    assert seen == [True, False]
    assert int(counter) == 1


def test_a_stage_follows_tensors_that_get_new_memory_or_are_replaced():
    """Lightning moves a module to its device after it was cut, so buffers become other objects."""
    net, x = made("tensors of its own")
    chain = find_chain(net)
    first, second = chain.stage(0, 1), chain.stage(1, 2)
    replace_memory("position", net.position, torch.full((6,), 3.0))
    net.double()
    net.mean = torch.full((3,), 2.0, dtype=torch.float64)
    x = x.double()
    h = net.a(net.stem(x - net.mean))
    assert torch.equal(first(x), h)
    assert torch.equal(second(h), net.b(h + 3.0))


def test_a_stage_computes_with_dropout_as_in_training_even_if_it_was_cut_in_evaluation():
    def forward(net, x):
        return net.head(net.b(functional.dropout(net.a(net.stem(x)), 0.5, net.training)))

    net = Blocks(forward, c=nn.Identity()).eval()
    chain = find_chain(net)
    net.train()
    h = torch.ones(64, 6)
    torch.manual_seed(0)
    output = chain.stage(1, 2)(h)
    torch.manual_seed(0)
    assert torch.equal(output, net.head(net.b(functional.dropout(h, 0.5, True))))
    assert not torch.equal(output, net.head(net.b(h)))
