"""The network that is found in a user's module."""

from __future__ import annotations

import lightning
import pytest
import torchvision
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from resist_lightning.methods.auxnet.network.chain import find_chain
from tests.helpers.chains import Blocks, in_turn
from tests.helpers.nets import MlpBlock, mlp, narrow_resnet, on_meta, small_preact


class Whole(lightning.LightningModule):
    """A module whose own forward has the blocks, after a stem that trains."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 4)
        self.body = nn.Sequential(MlpBlock(), MlpBlock())

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class Calls(lightning.LightningModule):
    """A module that calls its children in turn."""

    def __init__(self, **modules):
        super().__init__()
        self.names = list(modules)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Gauged(nn.Module):
    """A layer with a metric of torchmetrics, and a forward that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.linear, self.accuracy = nn.Linear(3, 3), MulticlassAccuracy(4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


class OnlySteps(lightning.LightningModule):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Whole, ""),
        (lambda: Calls(net=narrow_resnet()), "net"),
        # Metrics are modules that read their attributes for a hash, and are equal to any other.
        (
            lambda: Calls(
                stem=nn.Linear(3, 6), net=mlp(MlpBlock), accuracy=MulticlassAccuracy(4), names=["stem", "net"]
            ),
            "",
        ),
        (lambda: Calls(before=Gauged(), net=mlp(MlpBlock)), ""),
        (lambda: OnlySteps(net=narrow_resnet()), "net"),
        (lambda: OnlySteps(net=small_preact(), loss=nn.CrossEntropyLoss()), "net"),
        (lambda: Calls(backbone=narrow_resnet(), head=nn.Linear(4, 2)), "backbone"),
        (lambda: OnlySteps(backbone=narrow_resnet(), head=nn.Linear(4, 2)), "backbone"),
        (lambda: Calls(net=mlp(MlpBlock)), "net"),
        (lambda: OnlySteps(net=nn.Sequential(nn.Linear(3, 6), MlpBlock(), MlpBlock())), "net"),
        (lambda: Calls(stem=nn.Linear(3, 6), body=nn.Sequential(MlpBlock(), MlpBlock())), ""),
        (lambda: Calls(scale=nn.Tanh(), body=nn.Sequential(MlpBlock(), MlpBlock())), "body"),
        (lambda: OnlySteps(parts=nn.ModuleDict({"net": Blocks()})), "parts.net"),
        (lambda: nn.ModuleDict({"net": nn.Sequential(Blocks(in_turn))}), "net.0"),
        (lambda: OnlySteps(net=nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), "net"),
        (lambda: Calls(net=torchvision.models.vgg11()), "net"),
    ],
)
def test_the_network_is_the_deepest_that_has_all_blocks_and_what_is_trained_before_them(make, name):
    module = on_meta(make)
    assert find_chain(module).name == name


def test_a_network_may_be_named():
    module = nn.ModuleDict({"student": Blocks(), "teacher": Blocks()})
    chain = find_chain(module, "teacher")
    assert chain.network is module["teacher"]
    assert chain.units == ("teacher.a", "teacher.b", "teacher.c")
    assert {name.split(".")[0] for name in chain.names(0, 3)} == {"teacher"}
    assert find_chain(Blocks(), "").units == ("a", "b", "c")


@pytest.mark.parametrize("first", ["teacher", "student"])
def test_a_teacher_is_no_part_of_the_network(first):
    networks = {"student": mlp(MlpBlock), "teacher": mlp(MlpBlock).requires_grad_(False)}
    module = nn.ModuleDict({name: networks[name] for name in sorted(networks, key=lambda name: name != first)})
    assert find_chain(module).name == "student"
