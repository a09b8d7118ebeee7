"""The error for a block that cannot be handed over names the objects that still use it, and their places."""

from __future__ import annotations

import weakref

import pytest
import torch

from resist_lightning.methods.residual import recognise
from resist_lightning.methods.resist.subnet import SubnetBlock
from tests.helpers.nets import residual_block
from tests.helpers.residual import compiled_blocks_move


class Keeper:
    """A user's object that keeps references."""


def keep_loss(block, keeper):
    keeper.losses = [block(torch.ones(1, 8, 6, 6)).sum()]


def keep_view(block, keeper):
    keeper.flat = block.conv1.weight.view(-1)


def keep_reference(block, keeper):
    keeper.reference = weakref.ref(block.conv1.weight)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (keep_loss, "an autograd graph that a tensor in attribute 'losses' of a Keeper keeps: detach losses"),
        (keep_view, "a view of it, which keeps its memory, is still in use in attribute 'flat' of a Keeper"),
        (keep_reference, "attribute 'reference' of a Keeper has a weak reference to it"),
    ],
)
def test_a_tensor_that_is_still_in_use_says_which_and_what_has_it(keep, said):
    block, _ = residual_block("preact")
    keeper = Keeper()
    keep(block.train(), keeper)
    with pytest.raises(RuntimeError, match=rf"^block\..* cannot be handed over: .*{said}"):
        SubnetBlock(recognise("block", block)).free()


@compiled_blocks_move
def test_a_backend_of_torch_compile_that_keeps_a_tensor_is_named_with_the_way_out():
    for invalidate in (None, True):
        torch._dynamo.reset()
        block, x = residual_block("preact")
        block.compile(backend=lambda graph, _: graph.forward)
        with torch._dynamo.config.patch(invalidate_compile_context_weakrefs=invalidate):
            block(x)
        subnet = SubnetBlock(recognise("block", block))
        if invalidate:
            subnet.free()
            continue
        with pytest.raises(RuntimeError, match="invalidate_compile_context_weakrefs = True"):
            subnet.free()
    torch._dynamo.reset()
