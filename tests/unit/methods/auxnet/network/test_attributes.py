"""Attributes that tracing makes constants of a stage: a change of one that the forward reads is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.network.chain import find_chain
from tests.helpers.chains import Blocks, in_turn


def scaled(number):
    """A forward that reads a number from the network."""
    return lambda net, x: in_turn(net, x) * number(net)


class Doubled(Blocks):
    """Has a number that follows from another one."""

    @property
    def twice(self):
        return 2 * self.alpha


# By kind: the network, the change, and the name, the old and the new value that the error tells.
CHANGES = {
    "a number": (
        lambda: Blocks(scaled(lambda net: net.alpha), alpha=0.0),
        lambda net: setattr(net, "alpha", 0.5),
        "net.alpha, which was 0.0 .* is 0.5 now",
    ),
    "a switch": (
        lambda: Blocks(lambda net, x: in_turn(net, x if net.plain else -x), plain=True),
        lambda net: setattr(net, "plain", False),
        "net.plain, which was True .* is False now",
    ),
    "what was left out": (
        lambda: Blocks(lambda net, x: in_turn(net, x if net.noise is None else x + net.noise), noise=None),
        lambda net: setattr(net, "noise", torch.ones(3)),
        "net.noise, which was None .* is no number now",
    ),
    "an item of a list": (
        lambda: Blocks(scaled(lambda net: net.gates[1]), gates=[1.0, 2.0]),
        lambda net: net.gates.__setitem__(1, 3.0),
        "net.gates.1, which was 2.0 .* is 3.0 now",
    ),
    "an entry of a dictionary": (
        lambda: Blocks(scaled(lambda net: net.settings["drop"]), settings={"drop": 0.1}),
        lambda net: net.settings.update(drop=0.2),
        "net.settings.drop, which was 0.1 .* is 0.2 now",
    ),
    "a setting": (
        lambda: Blocks(scaled(lambda net: net.settings.drop), settings=SimpleNamespace(drop=0.1)),
        lambda net: setattr(net.settings, "drop", 0.2),
        "net.settings.drop, which was 0.1 .* is 0.2 now",
    ),
    "a property": (
        lambda: Doubled(scaled(lambda net: net.twice), alpha=1.0),
        lambda net: setattr(net, "alpha", 3.0),
        "net.(alpha|twice), which was",
    ),
    "a number of a layer that the network reads": (
        lambda: Blocks(lambda net, x: in_turn(net, functional.dropout(x, net.drop.p)), drop=nn.Dropout(0.1)),
        lambda net: setattr(net.drop, "p", 0.3),
        "net.drop.p, which was 0.1 .* is 0.3 now",
    ),
    "the mode of a submodule": (
        lambda: Blocks(lambda net, x: in_turn(net, functional.dropout(x, 0.5, net.part.training)), part=nn.Identity()),
        lambda net: net.part.eval(),
        "net.part.training, which was True .* is False now",
    ),
}


@pytest.mark.parametrize(("make", "change", "told"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_what_the_forward_reads_is_told(make, change, told):
    """Stages trained to the end with the value from the start, and evaluation used the new one, in silence."""
    net = make()
    attributes = find_chain(nn.ModuleDict({"net": net})).attributes
    attributes.check()
    change(net)
    with pytest.raises(StageSelectionError, match=told) as error:
        attributes.check()
    assert "have it read by a residual block or a module of torch.nn" in str(error.value)


def test_of_the_module_itself_names_have_no_prefix():
    net = Blocks(scaled(lambda net: net.alpha), alpha=0.0)
    attributes = find_chain(net).attributes
    net.alpha = 1.0
    with pytest.raises(StageSelectionError, match=r"reads alpha, which was 0\.0"):
        attributes.check()


def test_what_no_trace_has_frozen_may_change():
    def forward(net, x):
        return in_turn(net, net.drop(x) * net.mean)

    net = Blocks(forward, drop=nn.Dropout(0.1), steps=0, settings={"drop": 0.1})
    net.a.alpha = 0.0
    attributes = find_chain(net).attributes
    net.steps, net.settings["drop"], net.a.alpha, net.drop.p, net.head.eps = 5, 0.5, 1.0, 0.7, 3
    net.mean.fill_(2.0)
    net.stem.eval()
    net.b.train(False)
    attributes.check()
    net.eval()
    attributes.check()


def test_a_chain_that_is_found_in_evaluation_is_that_of_training():
    net = Blocks(lambda net, x: in_turn(net, functional.dropout(x, 0.5, net.training))).eval()
    attributes = find_chain(net).attributes
    net.train()
    attributes.check()
    net.eval()
    with pytest.raises(StageSelectionError, match="reads training, which was True"):
        attributes.check()


@pytest.mark.parametrize("traced", [True, False])
def test_reading_an_attribute_is_as_before_when_a_trace_has_ended(traced):
    def forward(net, x):
        return in_turn(net, x if traced else x * int(x.sum()))

    if traced:
        find_chain(Blocks(forward))
    else:
        with pytest.raises(StageSelectionError, match="cannot be traced"):
            find_chain(Blocks(forward))
    assert nn.Module.__getattribute__ is object.__getattribute__
