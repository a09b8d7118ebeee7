"""Folded into weights, the test-time scale equals a factor on the branch, and it is undone exactly (contract 8)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation

from resist_lightning.methods.residual import Block, BranchEnd, Seen
from resist_lightning.methods.resist.folding import fold, folded, unfold
from resist_lightning.methods.resist.scaling import BranchScaling
from tests.helpers.scaled import KINDS, block_of, branch, ended
from tests.helpers.training import assert_equal_states, clone_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_folding_multiplies_the_residual_branch(kind, scale):
    block, module, x = block_of(kind)
    with torch.no_grad():
        original = branch(module, x)
        torch.testing.assert_close(module(x), ended(module, x + original))  # the second implementation is right
        fold(folded([block]), scale)
        torch.testing.assert_close(module(x), ended(module, x + scale * original), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(module(x), ended(module, x + original))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 0.3, 5 / 22])
def test_unfolding_restores_bit_for_bit(kind, scale):
    block, module, _ = block_of(kind)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    originals = fold(folded([block]), scale)
    scaled = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], scaled[name])}
    unfold(folded([block]), scale, originals)
    assert changed == (
        {"conv2.weight"} if kind == "preact" else {f"{block.branch_end}.{n}" for n in ("weight", "bias")}
    )
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_unfolding_tiny_and_huge_numbers_restores_them_too():
    block, module, _ = block_of("basic")
    numbers = torch.tensor([0.0, -0.0, 1e-45, 3e-45, 1e-38, 3.4e38, 1.0, -7.0])
    with torch.no_grad():
        module.bn2.weight.copy_(numbers)
    originals = fold(folded([block]), 1 / 3)
    unfold(folded([block]), 1 / 3, originals)
    assert module.bn2.weight.tolist() == numbers.tolist()


def test_a_power_of_two_needs_no_copies():
    block, _, _ = block_of("preact")
    assert fold(folded([block]), 0.5) == {}
    unfold(folded([block]), 0.5, {})
    assert set(fold(folded([block]), 0.3)) == {"b.conv2.weight"}


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.se = nn.Conv2d(4, 4, 1), SqueezeExcitation(4, 2)

    def forward(self, x):
        return x + self.se(self.conv(x))


GATED = (BranchEnd(("conv.weight", "conv.bias"), "se", ("se.fc1.weight",)),)


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 0.3])
def test_a_gate_that_gets_the_scaled_branch_computes_as_before(scale):
    module, x = Gated(), torch.randn(2, 4, 5, 5)
    scaling = BranchScaling([Block("b", module, None, True, Seen(GATED))], scale)
    before, expected = clone_state(module), x + scale * module.se(module.conv(x))

    originals = scaling.apply()
    torch.testing.assert_close(module(x), expected)

    state = {**scaling.state_dict(), "originals": originals}
    assert state["folded"] == ["b.conv.weight", "b.conv.bias"]
    assert state["divided"] == ["b.se.fc1.weight"]
    resumed = Gated()
    resumed.load_state_dict(module.state_dict())
    BranchScaling([Block("b", resumed, None, True)], scale).undo(state, only=None)
    assert_equal_states(clone_state(resumed), before, exactly=True)
