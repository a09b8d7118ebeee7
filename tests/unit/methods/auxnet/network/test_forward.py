"""Networks that cannot be cut into stages, or whose stages would compute something else: each error says why."""

from __future__ import annotations

import random
from pathlib import Path

import einops
import pytest
import torch
from einops import repeat
from einops.layers.torch import Rearrange
from torch import nn
from torchvision.models import googlenet

from resist_lightning.methods.auxnet.network.chain import find_chain
from tests.helpers.chains import Blocks, in_turn, refusal
from tests.helpers.nets import MlpBlock, on_meta

HERE = Path(__file__).name


def branches(net, x):
    if x.sum() > 0:
        x = -x
    return in_turn(net, x)


def test_a_forward_that_cannot_be_traced_says_where_and_what_to_do():
    message = refusal(nn.ModuleDict({"net": Blocks(branches)}))
    assert "the forward of 'net' (Blocks) cannot be traced, so it cannot be cut into stages" in message
    assert "torch.fx says at " in message
    assert f"{HERE}:" in message
    assert "if x.sum() > 0:" in message
    assert "TraceError: symbolically traced variables cannot be used as inputs to control flow" in message
    assert "The way out: put branches and loops" in message
    assert "the forward of the module itself (Blocks) cannot be traced" in refusal(Blocks(branches))


def test_several_inputs_are_refused():
    class Two(Blocks):
        def forward(self, x, y):
            return in_turn(self, x) + y

    class Any(Blocks):
        def forward(self, *images):
            return in_turn(self, images[0])

    class Nothing(Blocks):
        def forward(self):
            return in_turn(self, self.mean)

    assert "the module itself takes x, y, but stages pass on a single tensor" in refusal(Two())
    assert "the network 'net' takes *images, but stages pass on a single tensor" in refusal(
        nn.ModuleDict({"net": Any()})
    )
    assert "takes nothing" in refusal(Nothing())
    assert "name a part of it that does by network=" in refusal(Two())


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (lambda net, x: (in_turn(net, x), x), "a tuple"),
        (lambda net, x: {"logits": in_turn(net, x)}, "a dict"),
        (lambda net, x: [in_turn(net, x)], "a list"),
        (lambda net, x: None, "None"),
        (lambda net, x: 5.0, "a float"),
    ],
)
def test_what_is_not_one_tensor_is_refused_as_output(returned, named):
    message = refusal(Blocks(returned), "")
    assert f"the module itself returns {named}, but stages pass on a single tensor. Return one tensor" in message


def test_an_output_that_the_network_does_not_compute_is_refused():
    def forward(net, x):
        in_turn(net, x)
        return x

    assert "returns its input, or a parameter" in refusal(Blocks(forward))
    named_tuple = on_meta(lambda: googlenet(init_weights=False))
    assert "returns a GoogLeNetOutputs, but stages pass on a single tensor" in refusal(named_tuple)


def test_without_a_cut_point_it_is_said_what_crosses():
    def skips(net, x):
        h = net.stem(x)
        return net.head(net.c(net.b(net.a(h))) + h)

    message = refusal(nn.ModuleDict({"net": Blocks(skips)}))
    assert "the network 'net' cannot be cut into stages: more than the output of one residual block" in message
    assert "behind 'a', the output of 'stem' (" in message
    assert f"{HERE}:" in message
    assert "h = net.stem(x)" in message
    late = refusal(Blocks(lambda net, x: in_turn(net, x) * x.mean()))
    assert "behind 'b', the network's input 'x'" in late

    def sized(net, x):
        batch = x.size(0)
        return in_turn(net, x).view(batch, -1)

    size = refusal(Blocks(sized))
    assert "behind 'a', 'size' (" in size


def test_without_a_cut_point_it_is_said_which_tensors_are_used_on_both_sides():
    net = Blocks()
    net.c.out.weight = net.a.out.weight
    net.c.inside = net.a.inside
    message = refusal(net)
    assert "behind 'a', a.inside.weight; a.inside.bias; a.out.weight (used on both sides)" in message
    recurrent = refusal(Blocks(lambda net, x: net.head(net.a(net.a(net.a(net.stem(x)))))), "")
    assert "behind 'a', a.inside.weight; a.inside.bias; a.out.weight; and 1 more (used on both sides)" in recurrent


def test_a_single_block_or_layer_has_no_cut_point():
    assert "it has only one residual block" in refusal(nn.Sequential(nn.Linear(3, 6), MlpBlock(), nn.Linear(6, 2)))
    assert "it has only one module" in refusal(nn.Sequential(nn.Linear(3, 6)))
    assert "only one module of it has parameters" in refusal(nn.Sequential(nn.Flatten(), nn.Linear(3, 6), nn.ReLU()))
    assert "its forward calls no module" in refusal(nn.Linear(3, 4))


def test_nothing_to_train_is_refused():
    assert "nothing to cut into stages: the module has no parameters" in refusal(nn.Sequential(nn.ReLU()))
    assert "Name the network in it to cut into stages: there is none." in refusal(
        nn.ParameterDict({"a": nn.Parameter(torch.ones(2))})
    )


def test_several_networks_are_refused_with_their_names():
    pair = nn.ModuleDict({"student": Blocks(), "nets": nn.ModuleList([Blocks(), nn.Identity()])})
    message = refusal(pair)
    assert "the module itself has no forward of its own" in message
    assert "network='student', network='nets.0'" in message
    assert "Identity" not in message


def test_blocks_that_the_forward_does_not_call_are_refused_unless_the_network_is_named():
    def forward(net, x):
        return net.head(net.b(net.a(net.stem(x))))

    message = refusal(Blocks(forward))
    assert "the forward of the module itself does not call the residual blocks c" in message
    assert "by network=" in message
    skipped = Blocks(lambda net, x: net.head(net.b(net.rest(net.a(net.stem(x))))))
    skipped.rest = Rest()
    del skipped.c
    assert "does not call the residual blocks rest.skipped" in refusal(skipped)


class Rest(nn.Module):
    """Has a block that it does not call."""

    def __init__(self):
        super().__init__()
        self.skipped, self.linear = MlpBlock(), nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x)


def test_a_network_that_is_not_there_is_refused():
    pair = nn.ModuleDict({"student": Blocks(), "teacher": Blocks()})
    assert "network='net' is not found in the module; it has student, teacher." in refusal(pair, "net")
    assert "network='' has no forward of its own, so there is nothing to cut" in refusal(pair, "")


def test_a_forward_that_a_graph_would_not_repeat_is_refused():
    def without_gradient(net, x):
        with torch.no_grad():
            x = net.stem(x)
        return net.head(net.c(net.b(net.a(x))))

    def in_half(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            return net.head(net.c(net.b(net.a(net.stem(x)))))

    def keeps(net, x):
        net.features = net.stem(x)
        return net.head(net.c(net.b(net.a(net.features))))

    def counts(net, x):
        net.steps += 1
        return in_turn(net, x)

    for forward, reason in (
        (without_gradient, "computes under no_grad, autocast or the like ("),
        (in_half, "computes under no_grad, autocast or the like ("),
        (keeps, "leaves a value in an attribute ("),
        (counts, "changes the attribute 'steps'"),
        (lambda net, x: in_turn(net, x) * torch.tensor([1.0, 2.0, 3.0, 4.0]), "makes a tensor of constants ("),
        (lambda net, x: in_turn(net, x) * random.random(), "draws a random number"),
        (lambda net, x: in_turn(net, x) * float(torch.rand(())), "draws a random number"),
    ):
        net = Blocks(forward, steps=0)
        message = refusal(net)
        assert "the module itself cannot be cut into stages: its forward " in message
        assert reason in message
        assert (f"{HERE}:" in message) == reason.endswith("(")
        assert net.steps == 0
        assert not hasattr(net, "features")
        assert not hasattr(net, "_tensor_constant0")


class ByEinops(Blocks):
    """Calls functions of einops by their own names and by the package's, and has a layer of einops."""

    def __init__(self):
        super().__init__(rows=Rearrange("b (one d) -> (b one) d", one=1))

    def forward(self, x):
        position = repeat(self.position, "d -> b d", b=x.shape[0])
        x = self.b(self.a(self.rows(self.stem(x)) + position))
        return self.head(einops.rearrange(self.c(x), "b (d two) -> b (two d)", two=2))


def test_functions_and_layers_of_einops_are_traced():
    net, original = ByEinops(), einops.rearrange

    chain = find_chain(net)

    assert einops.rearrange is original
    assert chain.units == ("a", "b", "c")
    x = torch.rand(2, 3)
    assert torch.equal(chain.stage(1, 3)(chain.stage(0, 1)(x)), net(x))


def test_a_hook_that_keeps_a_value_is_refused_where_a_trace_calls_it():
    """Of modules around blocks: the module kept a proxy of torch.fx, and loss terms of it became proxies."""
    owner = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 6), nn.Sequential(MlpBlock(), MlpBlock()))})
    owner.features = {}
    owner["net"][1].register_forward_hook(lambda module, given, made: owner.features.update(made=made))
    assert "its forward leaves a value in an attribute, or a hook does" in refusal(owner)


def test_a_forward_that_was_replaced_on_the_object_is_refused():
    net = Blocks()
    net.forward = lambda x: x
    assert "its forward was replaced on the object" in refusal(net)


def test_a_network_that_is_compiled_as_a_whole_is_refused():
    net = Blocks()
    net.compile()
    message = refusal(net)
    assert "compiled as a whole (torch.compile)" in message
    assert "block.compile()" in message
    wrapped = nn.ModuleDict({"net": torch.compile(Blocks())})
    assert "compiled as a whole" in refusal(wrapped)
    assert "compiled as a whole" in refusal(wrapped, "net")
