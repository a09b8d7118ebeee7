"""Optimizer state when blocks change hands: addressed by parameter, probed by one step of a twin."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.methods.resist.network import select_blocks
from resist_lightning.methods.resist.subnet import SubnetBlock
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.nets import small_preact
from tests.helpers.optimizers import Own, of_block, stepped


@pytest.mark.parametrize(
    ("make", "shaped", "numbers"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), 0, 0),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 1, 0),
        (lambda p: torch.optim.AdamW(p, 0.1), 2, 1),
        (lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True), 3, 1),
        (lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9), 2, 1),
    ],
)
def test_the_slots_of_every_parameter_in_a_fixed_order(make, shaped, numbers):
    module = small_preact()
    optimizer = make(module.parameters())
    states = OptimizerStates([optimizer])
    stepped(module, optimizer)
    parameters = of_block(module)
    found = states.tensors(parameters)
    assert len(found) == (shaped + numbers) * len(parameters)
    assert sum(tensor.numel() for tensor in found) == shaped * sum(p.numel() for p in parameters) + numbers * len(
        parameters
    )
    real = {id(value) for p in parameters for value in optimizer.state[p].values()}
    assert {id(tensor) for tensor in found} <= real
    assert [t.shape for t in states.tensors(parameters)] == [t.shape for t in found]


def test_reset_forgets_all_and_training_goes_on_as_with_a_new_optimizer():
    torch.manual_seed(0)
    old, new = small_preact(), small_preact()
    new.load_state_dict(old.state_dict())
    worn = torch.optim.AdamW(old.parameters(), lr=0.1)
    states = OptimizerStates([worn])
    torch.manual_seed(1)
    stepped(old, worn)
    new.load_state_dict(old.state_dict())
    states.reset()
    assert not worn.state
    fresh = torch.optim.AdamW(new.parameters(), lr=0.1)
    for module, optimizer in ((old, worn), (new, fresh)):
        torch.manual_seed(2)
        stepped(module, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_drop_forgets_the_block_and_nothing_else_in_every_optimizer():
    module = small_preact()
    block, head = of_block(module), list(module.head.parameters())
    rest = [p for p in module.parameters() if not any(p is q for q in (*block, *head))]
    one = torch.optim.SGD([*block[:2], *rest], 0.1, momentum=0.9)
    two = torch.optim.AdamW([*block[2:], *head], 0.1)
    states = OptimizerStates([one, two])
    stepped(module, one)
    two.step()
    states.drop(block)
    assert {id(p) for p in one.state} == {id(p) for p in rest}
    assert {id(p) for p in two.state} == {id(p) for p in head}


def test_two_optimizers_each_give_their_own_parameters():
    module = small_preact()
    block = of_block(module)
    one = torch.optim.SGD(block[:2], 0.1, momentum=0.9)
    two = torch.optim.AdamW([*block[2:], *module.head.parameters()], 0.1)
    states = OptimizerStates([one, two])
    stepped(module, one)
    two.step()
    found = states.tensors(block)
    assert len(found) == 2 * 1 + 4 * 3
    assert found[0] is one.state[block[0]]["momentum_buffer"]


def test_state_that_is_missing_is_made_of_zeros():
    module = small_preact()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    found = OptimizerStates([optimizer]).tensors(of_block(module))
    assert found
    assert all(not tensor.any() for tensor in found)
    assert all(any(tensor is value for value in optimizer.state[of_block(module)[0]].values()) for tensor in found[:3])


def test_a_copy_of_the_weights_that_is_missing_is_made_of_them():
    """It was made of zeros, so a schedule-free optimizer pulled a block that had not stepped yet towards zero."""
    module = small_preact()
    optimizer = Own(module.parameters())
    states = OptimizerStates([optimizer])
    for parameter in of_block(module):
        states.tensors([parameter])
        assert torch.equal(optimizer.state[parameter]["z"], parameter)
        assert not optimizer.state[parameter]["wide"].any()


def test_frozen_parameters_and_strangers_have_no_state():
    module = small_preact()
    block = of_block(module)
    block[0].requires_grad_(False)
    optimizer = torch.optim.SGD(block[:2], 0.1, momentum=0.9)
    found = OptimizerStates([optimizer]).tensors([*block, *module.head.parameters()])
    assert [tensor.shape for tensor in found] == [block[1].shape]


def test_an_absent_parameter_tells_shapes_and_data_types_and_makes_no_state():
    """A block of 16 bits with a norm of 32 could not be handed over: all vectors were taken to have equal state."""
    module = small_preact()
    block = of_block(module, 1)
    for parameter in block[1:]:
        parameter.data = parameter.data.bfloat16()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    states = OptimizerStates([optimizer])
    for parameter in block:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = [(t.shape, t.dtype) for t in states.tensors(block)]
    assert {dtype for _, dtype in expected} == {torch.float32, torch.bfloat16}
    SubnetBlock(select_blocks(module)[1]).free()
    optimizer.state.clear()
    found = states.tensors(of_block(module, 1))
    assert [(t.shape, t.dtype) for t in found] == expected
    assert all(tensor.is_meta for tensor in found)
    assert not optimizer.state


def test_state_of_another_shape_cannot_travel_but_can_stay():
    states = OptimizerStates([torch.optim.Adafactor(small_preact().parameters())])
    with pytest.raises(ValueError, match=r"'travel' cannot move '(row|col)_var' of Adafactor.*'keep' or 'reset'"):
        states.check_travel()
    states.reset()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "RMSprop", "Adamax"])
def test_state_in_the_shape_of_its_parameter_can_travel(name):
    OptimizerStates([getattr(torch.optim, name)(small_preact().parameters(), lr=0.1)]).check_travel()
