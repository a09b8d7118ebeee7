"""The places where a network can be cut, and the tensors of each unit."""

from __future__ import annotations

import operator
import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.network.chain import check_stages, find_chain
from resist_lightning.methods.auxnet.network.measure import measure
from resist_lightning.models import preact_resnet
from tests.helpers.chains import Blocks, in_turn
from tests.helpers.nets import MlpBlock, Undeclared, mlp, narrow_resnet, on_meta


def resnet_units(*counts: int) -> tuple[str, ...]:
    return tuple(f"layer{section}.{index}" for section, count in enumerate(counts, 1) for index in range(count))


def with_other_stem() -> nn.Module:
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


NETWORKS = {
    "resnet18": (torchvision.models.resnet18, resnet_units(2, 2, 2, 2)),
    "resnet50": (torchvision.models.resnet50, resnet_units(3, 4, 6, 3)),
    "wide_resnet50_2": (torchvision.models.wide_resnet50_2, resnet_units(3, 4, 6, 3)),
    "other stem": (with_other_stem, resnet_units(2, 2, 2, 2)),
    "timm resnet18": (lambda: timm.create_model("resnet18"), resnet_units(2, 2, 2, 2)),
    "timm seresnet50": (lambda: timm.create_model("seresnet50"), resnet_units(3, 4, 6, 3)),
    "ours": (lambda: preact_resnet(26), tuple(u.replace("layer", "section") for u in resnet_units(2, 2, 6, 2))),
    "sequential": (lambda: mlp(MlpBlock), ("body.0", "body.1", "body.2", "body.3")),
    "blocks of an unknown kind": (
        lambda: mlp(Undeclared),
        ("stem", "body.0", "body.1", "body.2", "body.3", "head"),
    ),
    "plain": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)),
        ("2", "4", "5"),
    ),
}


@pytest.mark.parametrize(("make", "units"), NETWORKS.values(), ids=NETWORKS)
def test_a_cut_can_be_behind_each_block_and_stem_and_head_go_with_their_neighbours(make, units):
    chain = find_chain(on_meta(make))
    assert chain.name == ""
    assert chain.units == units


@pytest.mark.filterwarnings("error")
def test_backward_hooks_which_a_trace_does_not_call_are_no_warning():
    net = mlp(MlpBlock)
    net.body.register_full_backward_hook(lambda *_: None)
    assert find_chain(net).units == NETWORKS["sequential"][1]


def test_a_network_without_residual_blocks_is_cut_before_what_has_parameters():
    net = on_meta(torchvision.models.vgg11)
    units = find_chain(net).units
    assert units[:3] == ("features.2", "features.5", "features.7")
    assert units[-4:] == ("avgpool", "classifier.2", "classifier.5", "classifier.6")
    assert len(units) == 8 + 3


@pytest.mark.parametrize("make", [make for make, _ in NETWORKS.values()], ids=NETWORKS)
def test_each_tensor_of_a_network_belongs_to_one_unit(make):
    module = nn.ModuleDict({"other": nn.Linear(2, 2), "net": on_meta(make)})
    chain = find_chain(module, "net")
    assert chain.name == "net"
    number = len(chain.units)
    apart = [name for unit in range(number) for name in chain.names(unit, unit + 1)]
    assert sorted(apart) == sorted(f"net.{name}" for name in module["net"].state_dict())
    assert apart == chain.names(0, number) == chain.names(0, 1) + chain.names(1, number)


def test_stem_and_head_and_downsampling_belong_to_the_units_they_are_computed_in():
    chain = find_chain(on_meta(lambda: narrow_resnet(layers=(1, 1, 1, 1))))
    first, second, last = chain.names(0, 1), chain.names(1, 2), chain.names(3, 4)
    assert {name.split(".")[0] for name in first} == {"conv1", "bn1", "layer1"}
    assert "layer2.0.downsample.0.weight" in second
    assert {name.split(".")[0] for name in last} == {"layer4", "fc"}


def test_what_the_forward_reads_itself_belongs_to_the_unit_that_uses_it():
    def forward(net, x):
        return net.head(net.c(net.b(net.a(net.stem(x - net.mean)) + net.position)))

    chain = find_chain(Blocks(forward))
    assert chain.units == ("a", "b", "c")
    assert "mean" in chain.names(0, 1)
    assert "position" in chain.names(1, 2)


def test_tensors_that_the_forward_does_not_use_belong_to_no_unit():
    """The loss may use them, on every worker."""
    module = Blocks(spare=nn.Linear(2, 2))
    chain = find_chain(module)
    assert set(module.state_dict()) - set(chain.names(0, 3)) == {"position", "mean", "spare.weight", "spare.bias"}


def test_a_tensor_has_its_first_name_in_the_users_module():
    net = Blocks()
    chain = find_chain(nn.ModuleDict({"alias": net.a, "net": net}), "net")
    assert "alias.out.weight" in chain.names(0, 1)
    assert not any(name.startswith("net.a.") for name in chain.names(0, 3))


def test_a_tensor_that_two_units_use_forbids_the_cuts_between_them():
    def forward(net, x):
        return net.head(net.c(net.b(net.a(net.stem(x)) + net.position) + net.position))

    assert find_chain(Blocks(forward)).units == ("a", "c")
    tied = Blocks()
    tied.c.out.weight = tied.b.out.weight
    assert find_chain(tied).units == ("a", "c")
    twice = Blocks(lambda net, x: net.head(net.c(net.b(net.b(net.a(net.stem(x)))))))
    assert find_chain(twice).units == ("a", "b", "c")


def test_a_value_that_skips_a_block_forbids_the_cut_behind_it():
    def forward(net, x):
        x = net.stem(x)
        return net.head(net.c(net.b(net.a(x) + x)))

    assert find_chain(Blocks(forward)).units == ("b", "c")


@pytest.mark.parametrize("sums", [operator.add, operator.iadd, torch.add, lambda x, y: x.add_(y)])
def test_without_residual_blocks_a_cut_may_be_behind_a_sum(sums):
    """A loop of ``x = x + layer(x)``: it had no cut inside, so that one stage had nearly everything."""

    def forward(net, x):
        x = net.stem(x)
        for layer in (net.a, net.b):
            x = sums(x, layer(x))
        return net.head(x + 1)

    layers = {name: nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for name in "ab"}
    chain = find_chain(Blocks(forward, **layers, c=nn.Identity()))
    assert chain.units == ("stem", "a.1", "b.1", "head")
    assert chain.positions(["a", "b"]) == (2, 3)


class Layers(Blocks):
    """Two layers that return tuples, without residual blocks."""

    def __init__(self, forward, layer=nn.LSTM, second=6, **options):
        a, b = layer(6, second, **options), layer(6, second, **options)
        super().__init__(forward, a=a, b=b, c=nn.Identity())


def one_after_the_other(net, x):
    x, (_, _) = net.a(net.stem(x))
    return net.head(net.b(x)[0])


def by_the_last_state(net, x):
    _, state = net.b(net.a(net.stem(x))[0])
    return net.head(state.squeeze(0))


def hands_on_its_state(net, x):
    x, state = net.a(net.stem(x))
    return net.head(net.b(x, state)[0][:, -1])


def time_first(net, x):
    return net.head(net.b(net.a(net.stem(x).transpose(0, 1))[0])[0].mean(0))


def attends(net, x):
    x = net.stem(x)
    x, _ = net.a(x, x, x)
    return net.head(net.b(x, x, x)[0])


RECURRENT = {
    "the sequence goes on": (lambda: Layers(one_after_the_other, batch_first=True), ("stem", "a", "b", "head")),
    "a state goes on": (lambda: Layers(by_the_last_state, nn.GRU, batch_first=True), ("stem", "a", "head")),
    "both go on": (lambda: Layers(hands_on_its_state, batch_first=True), ("stem", "b", "head")),
    "the time is first": (lambda: Layers(time_first, nn.RNN), ("stem", "head")),
    "attention": (
        lambda: Layers(attends, nn.MultiheadAttention, 2, batch_first=True),
        ("stem", "a", "b", "head"),
    ),
}


@pytest.mark.parametrize(("make", "units"), RECURRENT.values(), ids=RECURRENT)
def test_a_tuple_crosses_no_cut_but_its_first_item_may(make, units):
    """A network with an LSTM was refused wherever it was cut: a unit ended with the layer, and returned a tuple."""
    net, x = make(), torch.randn(2, 5, 3)
    chain = find_chain(net)
    assert chain.units == units
    assert measure(chain, x, repeats=1).shapes[-1] == net(x).shape[1:]
    y = x
    for number in range(len(units)):
        y = chain.stage(number, number + 1)(y)
    assert torch.equal(y, net(x))


def test_a_block_that_returns_a_tuple_is_cut_behind_its_first_item():
    class Block(MlpBlock):
        def forward(self, x):
            return super().forward(x), x.shape

    def forward(net, x):
        x = net.stem(x)
        for block in (net.a, net.b, net.c):
            x, _ = block(x)
        return net.head(x)

    net = Blocks(forward)
    net.a, net.b, net.c = Block(), Block(), Block()
    chain, x = find_chain(net), torch.randn(2, 3)
    assert chain.units == ("a", "b", "c")
    assert torch.equal(chain.stage(0, 1)(x), net.a(net.stem(x))[0])


def test_a_block_inside_a_block_is_not_cut():
    net = mlp(MlpBlock)
    net.body[1].inside = nn.Sequential(MlpBlock(), nn.Linear(6, 12))
    assert find_chain(net).units == ("body.0", "body.1", "body.2", "body.3")


def test_a_module_that_is_called_often_names_no_unit_if_another_can():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    assert find_chain(net).units == ("0", "2", "4")


def test_optional_arguments_keep_their_defaults():
    class Masked(Blocks):
        def forward(self, x, mask=None, features=False, kind="mean", scale=0.5, *, sizes=(1, 2)):
            if mask is not None or features or kind != "mean":
                raise AssertionError
            return self.head(self.c(self.b(self.a(self.stem(x * scale)))))

    net = Masked()
    chain = find_chain(net)
    assert chain.units == ("a", "b", "c")
    x = torch.ones(2, 3)
    assert torch.equal(chain.stage(2, 3)(chain.stage(0, 2)(x)), net(x))


def test_submodules_without_blocks_may_branch():
    class Branch(nn.Linear):
        def forward(self, x):
            x = x + float(torch.rand(()))
            return super().forward(x) if x.sum() > 0 else x

    assert find_chain(Blocks(stem=Branch(3, 6))).units == ("a", "b", "c")
    assert find_chain(nn.Sequential(nn.Linear(3, 4), Branch(4, 4), nn.Linear(4, 2))).units == ("0", "1", "2")


def test_blocks_may_be_compiled():
    net = Blocks()
    net.a.compile(backend="eager")
    net.b = torch.compile(net.b, backend="eager")
    chain = find_chain(net)
    assert chain.units == ("a", "b", "c")
    assert "b._orig_mod.out.weight" in chain.names(1, 2)


def test_what_cannot_be_written_into_a_graph_is_left_inside_the_submodule_that_does_it():
    """Tracing was repeated endlessly for a layer that was called with a set."""

    class Layer(nn.Linear):
        def forward(self, x, options):
            return super().forward(x) if "skip" not in options and x.sum() > 0 else x

    class Calling(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer(4, 4)

        def forward(self, x):
            return self.layer(x, {"a", "b"})

    assert find_chain(nn.Sequential(nn.Linear(3, 4), Calling(), nn.Linear(4, 2))).units == ("0", "1", "2")


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_followed_as_in_training_and_nothing_changes(training):
    seen = []

    def forward(net, x):
        seen.append((net.training, net.a.training))
        return in_turn(net, x)

    module = nn.ModuleDict({"net": Blocks(forward)}).train(training)
    attributes = [dict(vars(child)) for child in module.modules()]
    random_state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    find_chain(module)
    assert seen
    assert set(seen) == {(True, True)}
    assert [dict(vars(child)) for child in module.modules()] == attributes
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == random_state


@pytest.mark.parametrize(
    ("cuts", "positions"),
    [
        (["layer1"], (1,)),
        (["layer3"], (5,)),
        (["layer1.0", "layer3.0", "layer3.2"], (1, 3, 5)),
        (["net.layer1", "layer3.1"], (1, 4)),
        ([], ()),
    ],
)
def test_cuts_are_named_by_what_they_are_behind(cuts, positions):
    chain = find_chain(nn.ModuleDict({"net": on_meta(narrow_resnet)}))
    assert chain.positions(cuts) == positions


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["layer9"], r"cannot be cut behind 'layer9'\. It can be cut behind net\.layer1\.0, .*net\.layer3\.0-2\."),
        (["layer"], r"cannot be cut behind 'layer'\."),
        (["net"], r"behind 'net' the network ends\. It can be cut behind net\.layer1\.0"),
        (["layer4"], r"behind 'layer4' the network ends"),
        (["layer1", "fc"], r"cannot be cut behind 'fc'"),
        (["layer2", "layer1"], r"\['layer2', 'layer1'\]: 'layer1' does not come behind 'layer2'.*in the order"),
        (["layer2", "net.layer2.0"], r"'net\.layer2\.0' does not come behind 'layer2'"),
    ],
)
def test_cuts_that_cannot_be_say_where_they_can(cuts, message):
    chain = find_chain(nn.ModuleDict({"net": on_meta(narrow_resnet)}))
    with pytest.raises(StageSelectionError, match=message):
        chain.positions(cuts)


def test_more_workers_than_units_are_refused_with_the_largest_number():
    chain = find_chain(nn.ModuleDict({"net": Blocks()}))
    check_stages(chain, 3)
    message = (
        r"4 workers need 3 cut point\(s\), and the network 'net' has 2\. It can be cut behind net\.a, net\.b\. "
        r"Use at most 3 workers"
    )
    with pytest.raises(StageSelectionError, match=message):
        check_stages(chain, 4)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 1), (-1, 2), (0, 4)])
def test_units_outside_the_network_are_refused(first, last):
    chain = find_chain(Blocks())
    for ask in (chain.stage, chain.names):
        with pytest.raises(ValueError, match=r"not a run of the network's 3 units"):
            ask(first, last)
