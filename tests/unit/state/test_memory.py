"""Contracts 5 and 10: absent means absent, and the user's objects stay the user's objects."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resist_lightning.methods.residual import Block, recognise
from resist_lightning.methods.resist.network import select_blocks
from resist_lightning.methods.resist.subnet import Subnet, SubnetBlock
from resist_lightning.models import PreActBlock
from resist_lightning.state.absent import present_class
from resist_lightning.state.memory import CPU, move_present
from tests.helpers.memory import storage_bytes
from tests.helpers.nets import Computed, MlpBlock, OwnForward, Recurrent, residual_block, small_preact


def absent(block):
    subnet = SubnetBlock(recognise("block", block))
    subnet.free()
    return subnet


def attributes(tensor):
    return {key: value for key, value in vars(tensor).items() if key not in ("absent_name", "absence")}


def facts(module):
    """The properties of every parameter and buffer that must not change."""
    return {
        name: (id(t), present_class(t), t.shape, t.dtype, t.stride(), t.requires_grad, t.is_leaf, attributes(t))
        for name, t in [*module.named_parameters(), *module.named_buffers()]
    }


def test_freeing_and_allocating_keeps_all_but_the_values():
    block = PreActBlock(4, 4).to(memory_format=torch.channels_last)
    block.bn1.weight.requires_grad_(False)
    block.conv1.weight.partition_dim = 3
    before = facts(block)
    subnet = SubnetBlock(recognise("block", block))
    for _ in range(3):
        subnet.free()
        assert facts(block) == before
        assert not subnet.present
        subnet.allocate()
        assert facts(block) == before
        assert subnet.present
    assert block.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert {tensor.device.type for tensor in subnet.block.tensors().values()} == {"cpu"}


def test_a_subclass_of_parameter_stays_one():
    class Special(nn.Parameter):
        pass

    block = PreActBlock(4, 4)
    block.conv1.weight = Special(block.conv1.weight.data)
    subnet = absent(block)
    subnet.allocate()
    assert type(block.conv1.weight) is Special


@pytest.mark.parametrize("kind", ["preact", "basic", "bottleneck"])
def test_an_absent_block_is_exactly_the_identity_and_a_present_one_computes_again(kind):
    block, x = residual_block(kind)
    values = {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
    y = block(x).detach()
    subnet = absent(block)
    assert torch.equal(block(x), x)
    subnet.allocate()
    block.load_state_dict(values)
    torch.testing.assert_close(block(x), y, rtol=0, atol=0)
    assert "forward" not in block.__dict__


def test_gradients_pass_an_absent_block_untouched():
    block, x = residual_block("basic")
    absent(block)
    x = x.requires_grad_()
    (3 * block(x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3))
    assert all(parameter.grad is None for parameter in block.parameters())


def test_a_forward_of_the_instance_s_own_comes_back():
    block, x = residual_block("preact")
    block.forward = lambda _: "its own"
    subnet = absent(block)
    assert torch.equal(block(x), x)
    subnet.allocate()
    assert block(x) == "its own"


def tensors_alive():
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return [t for t in tensors if not is_lazy(t)]  # lazy ones have no shape


def test_the_bytes_are_really_given_back():
    of_other_tests = {id(tensor): tensor for tensor in tensors_alive()}
    block = MlpBlock(64)
    block(torch.randn(2, 64)).sum().backward()
    assert storage_bytes(block) == 2 * 4 * sum(p.numel() for p in block.parameters())
    kept = [parameter.untyped_storage().nbytes() for parameter in block.parameters()]
    subnet = absent(block)
    assert sum(kept) > 0
    assert storage_bytes(block) == 0
    shapes = {tuple(parameter.shape) for parameter in block.parameters()}
    alive = [t for t in tensors_alive() if id(t) not in of_other_tests and tuple(t.shape) in shapes]
    assert alive
    assert all(tensor.is_meta for tensor in alive)
    subnet.allocate()
    assert storage_bytes(block) == sum(kept)


def test_optimizer_schedulers_and_clipping_stay_valid_over_many_cycles():
    net = small_preact()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    presences = [SubnetBlock(block) for block in select_blocks(net)]
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for cycle in range(4):
        gone, here = presences[cycle % 4], presences[(cycle + 1) % 4]
        gone.free()
        optimizer.zero_grad()
        net(torch.randn(4, 3, 8, 8)).sum().backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        assert torch.isfinite(norm)
        assert all(p.grad is None for p in gone.block.module.parameters())
        assert all(p.grad is not None for p in here.block.module.parameters())
        gone.allocate()
        for parameter in gone.block.module.parameters():
            nn.init.normal_(parameter, std=0.1)
            optimizer.state.pop(parameter, None)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == parameters
    assert [id(p) for p in net.parameters()] == parameters


def test_a_graph_in_a_reference_cycle_is_collected():
    block, x = residual_block("preact")
    cycle = {"output": block(x)}
    cycle["itself"] = cycle
    del cycle
    assert not absent(block).present


def test_a_loss_that_the_loop_still_holds_after_backward_is_no_hindrance():
    block, x = residual_block("preact")
    output = block(x)
    loss = output.sum()
    loss.backward()
    subnet = absent(block)
    assert not subnet.present
    assert loss.grad_fn is not None


def test_a_worker_holds_the_blocks_that_it_is_told_to_and_no_others():
    net = small_preact()
    blocks = select_blocks(net)
    subnet = Subnet(blocks)
    assert subnet.held() == list(blocks)
    for keep in ({0, 2}, {1, 2}, set(), {3}, {0, 1, 2, 3}, range(4)):
        before = subnet.held()
        staying = [block for index, block in enumerate(blocks) if block in before and index in keep]
        assert subnet.not_staying(keep) == [block for block in blocks if block not in staying]
        subnet.hold(keep)
        assert subnet.held() == [blocks[index] for index in sorted(keep)]
        for index, block in enumerate(blocks):
            assert {tensor.is_meta for tensor in block.tensors().values()} == {index not in keep}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "make",
    [
        *(partial(Recurrent, layer=layer) for layer in (nn.LSTM, nn.GRU, nn.RNN)),
        partial(Computed, wrap=nn.utils.weight_norm),
        partial(Computed, wrap=nn.utils.spectral_norm),
        partial(Computed, wrap=partial(nn.utils.prune.l1_unstructured, name="weight", amount=0.5)),
        partial(Computed, wrap=nn.utils.parametrizations.weight_norm),
    ],
)
def test_layers_that_keep_more_than_parameters_go_and_come_back(make):
    block, x = make().eval(), torch.randn(2, 3, 6)
    values = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    subnet = SubnetBlock(Block("block", block, None, keeps_shape=True))
    subnet.free()
    subnet.allocate()
    block.load_state_dict(values)
    expected = block(x).detach()
    for _ in range(2):
        block(x)  # a graph without a backward
        subnet.free()
        plain = [value for module in block.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        assert all(tensor.is_meta for tensor in (*block.parameters(), *block.buffers(), *plain))
        assert torch.equal(block(x), x)
        subnet.allocate()
        block.load_state_dict(values)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_what_is_present_moves_to_the_cpu_and_the_rest_stays_absent():
    net = small_preact()
    SubnetBlock(select_blocks(net)[1]).free()
    move_present(net, CPU)
    assert {name for name, parameter in net.named_parameters() if parameter.is_meta} == {
        name for name, _ in net.named_parameters() if name.startswith("section3.2.")
    }


def test_a_block_with_a_forward_of_its_class_s_own_is_bypassed_too():
    block = OwnForward(4, 4)
    x = torch.randn(1, 4, 3, 3)
    absent(block)
    assert torch.equal(block(x), x)


def test_gradient_hooks_of_a_parameter_survive_an_absence():
    """Contract 10: callbacks stay valid. swap_tensors silently removes the hooks with the memory."""
    block, x = residual_block("preact")
    weight, seen = block.conv1.weight, []
    handles = [
        weight.register_hook(lambda gradient: seen.append("hook")),
        weight.register_hook(lambda gradient: 0 * gradient),
        weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("post")),
    ]

    def backward():
        seen.clear()
        block.zero_grad()
        block(x).sum().backward()
        return seen, bool(block.conv1.weight.grad.any())

    values = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    subnet = SubnetBlock(recognise("block", block))
    for _ in range(3):
        assert backward() == (["hook", "post"], False)
        subnet.free()
        subnet.allocate()
        block.load_state_dict(values)
    assert backward() == (["hook", "post"], False)
    for handle in handles:
        handle.remove()
    assert backward() == ([], True)
