"""Test-time scaling: a factor on the branch, by hooks or in weights (test_folding.py), in the full model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine
from resist_lightning.comm.collective import Collective
from resist_lightning.methods.residual import Block, recognise
from resist_lightning.methods.resist.folding import fold, foldable, folded
from resist_lightning.methods.resist.partition import Schedule
from resist_lightning.methods.resist.scaling import ScaleHooks, _WhenSeen, coverage, remove_scale_hooks
from resist_lightning.models import PreActBlock
from tests.helpers.nets import MlpBlock, OwnForward, Undeclared, mlp, randomise_norms, residual_block
from tests.helpers.scaled import KINDS, block_of, branch, ended
from tests.helpers.threads import run_threads


@pytest.mark.parametrize("kind", [Undeclared, OwnForward])
def test_a_block_of_unknown_kind_is_scaled_as_a_difference(kind):
    module = (Undeclared(4) if kind is Undeclared else OwnForward(4, 4)).eval()
    randomise_norms(module)
    x = torch.rand(2, 4) if kind is Undeclared else torch.rand(2, 4, 3, 3)
    block = recognise("b", module) or Block("b", module, None, True)
    y = module(x)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert not foldable(block)
    assert fold(folded([block]), 0.3) == {}
    hooks = ScaleHooks([block], 0.3)
    torch.testing.assert_close(module(x), x + 0.3 * (y - x))
    hooks.remove()
    torch.testing.assert_close(module(x), y, rtol=0, atol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_scale_as_folding_does_in_training_mode_too(kind):
    """For warm-up: scaled while it trains, without a change of weights."""
    block, module, x = block_of(kind)
    module.train()
    with torch.no_grad():
        expected = ended(module, x + 0.3 * branch(module, x))
        hooks = ScaleHooks([block], 0.3)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        hooks.remove()
        torch.testing.assert_close(module(x), ended(module, x + branch(module, x)))


def test_hooks_scale_the_gradient_of_the_branch():
    module = MlpBlock(4)
    block = recognise("b", module)
    x = torch.randn(3, 4)
    module(x).sum().backward()
    plain = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    ScaleHooks([block], 0.25)
    module(x).sum().backward()
    for parameter, gradient in zip(module.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, 0.25 * gradient)


def test_a_scale_of_one_hooks_nothing():
    block, module, _ = block_of("preact")
    ScaleHooks([block], 1.0)
    assert not module._forward_hooks
    assert not module.conv2._forward_hooks


def test_a_last_layer_without_weights_is_hooked():
    module = PreActBlock(4, 4).eval()
    module.residual_branch_end = "gate"
    module.conv2 = nn.Sequential(module.conv2, nn.Tanh())
    module.gate = module.conv2[1]
    block = recognise("b", module)
    assert not foldable(block)
    x = torch.randn(1, 4, 5, 5)
    y = module(x)
    ScaleHooks([block], 0.5)
    torch.testing.assert_close(module(x), x + 0.5 * (y - x))


@pytest.mark.parametrize(
    ("blocks", "workers", "min_blocks", "expected"),
    [(22, 4, 5, 1 / 4), (22, 8, 5, 5 / 22), (22, 2, 5, 1 / 2), (6, 3, 6, 1.0), (2, 4, 0, 1 / 4), (0, 3, 0, 1.0)],
)
def test_the_scale_is_the_chance_that_a_block_is_held(blocks, workers, min_blocks, expected):
    for warmup in (0, 3):
        schedule = Schedule(blocks, workers, min_blocks, seed=0, warmup_rounds=warmup)
        assert coverage(schedule) == pytest.approx(expected)


def test_with_unequal_counts_it_is_the_mean_over_the_workers():
    schedule = Schedule(6, 3, 0, seed=0, counts=((0, (4, 2, 1)),))
    assert coverage(schedule) == pytest.approx(7 / 18)
    chances = [sum(block in schedule.partition(r).held[w] for r in range(300) for w in range(3)) for block in range(6)]
    assert [chance / 900 for chance in chances] == pytest.approx([7 / 18] * 6, abs=0.05)


def test_a_parametrised_last_layer_is_scaled_one_way_or_the_other():
    """weight_norm, spectral_norm: ``layer.weight`` is computed anew at every access."""
    module, x = residual_block("preact")
    nn.utils.parametrizations.weight_norm(module.conv2)
    block = recognise("b", module)
    y = module(x)
    fold(folded([block]), 0.5)
    ScaleHooks([block] if not foldable(block) else [], 0.5)
    torch.testing.assert_close(module(x), x + 0.5 * (y - x))


def test_a_last_layer_that_is_not_linear_in_its_weight_is_scaled_one_way_or_the_other():
    module = PreActBlock(4, 4).eval()
    module.conv2 = nn.Sequential(module.conv2, nn.PReLU())
    module.residual_branch_end = "conv2.1"
    block = recognise("b", module)
    x = torch.randn(1, 4, 5, 5)
    y = module(x)
    fold(folded([block]), 0.5)
    ScaleHooks([block] if not foldable(block) else [], 0.5)
    torch.testing.assert_close(module(x), x + 0.5 * (y - x))


class Attending(nn.Module):
    """A block with an input beside the one to which it adds."""

    def __init__(self, width=6):
        super().__init__()
        self.inside = nn.Linear(width, width)

    def forward(self, hidden, mask=None, *, gain=1.0):
        out = torch.sin(self.inside(hidden)) * gain
        return hidden + (out if mask is None else out * mask)


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x, mask: block(x, mask, gain=2.0),
        lambda block, x, mask: block(hidden=x, mask=mask, gain=2.0),
        lambda block, x, mask: block(mask=mask, gain=2.0, hidden=x),
    ],
)
def test_a_hooked_block_may_be_called_by_keyword_and_with_more_inputs(call):
    module, x, mask = Attending(), torch.randn(3, 6), torch.rand(3, 6)
    y = call(module, x, mask)
    hooks = ScaleHooks([Block("b", module, None, True)], 0.3)
    torch.testing.assert_close(call(module, x, mask), x + 0.3 * (y - x))
    hooks.remove()
    torch.testing.assert_close(call(module, x, mask), y, rtol=0, atol=0)


class Gated(Undeclared):
    """A block whose branch ends in a submodule without weights."""

    residual_branch_end = "gate"

    def __init__(self, width=6):
        super().__init__(width)
        self.gate = nn.Tanh()

    def forward(self, x):
        return x + self.gate(self.inside(x))


@pytest.mark.parametrize("kind", [Undeclared, Gated])
@pytest.mark.parametrize(
    "made",
    [
        lambda net, x: torch.export.export(net, (x,)).module(),
        torch.jit.trace,
        lambda net, x: torch.compile(net, backend="eager", fullgraph=True),
        lambda net, x: pickle.loads(pickle.dumps(net)),
        lambda net, x: copy.deepcopy(net),
    ],
    ids=["export", "trace", "compile", "pickle", "deepcopy"],
)
def test_hooks_go_where_the_module_goes_and_come_off_there(kind, made):
    net, x = mlp(kind, blocks=2).eval(), torch.randn(4, 3)
    plain = net(x)
    for name in ("0", "1"):
        ScaleHooks([recognise(name, net.body[int(name)]) or Block(name, net.body[int(name)], None, True)], 0.3)
    scaled = net(x)
    assert not torch.allclose(scaled, plain)
    gone = made(net, x)
    torch.testing.assert_close(gone(x), scaled)
    if type(gone) is type(net):
        remove_scale_hooks(gone)
        torch.testing.assert_close(gone(x), plain)
        torch.testing.assert_close(net(x), scaled)


def test_a_copy_made_before_the_first_forward_hooks_neither_itself_nor_the_original():
    block = Block("b", Undeclared(6), None, True)
    hooks = ScaleHooks([block], 0.5, wait=True)
    other = copy.deepcopy(block.module)
    pickle.loads(pickle.dumps(other))(torch.randn(2, 6))
    x = torch.randn(2, 6)
    block.module(x)
    for _ in range(3):
        other(x)
    assert len(block.module._forward_hooks) == 1
    assert not other._forward_hooks
    hooks.remove()
    assert not block.module._forward_hooks
    assert not block.module._forward_pre_hooks


def scaled_blocks(collective: Collective) -> tuple[list[str], list[str]]:
    """Names of the blocks that are scaled when a run has grown, and of the held ones."""
    model = mlp(Undeclared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = Config(local_steps=1, blocks="body.*", growth=[0.5, 0.75])
    engine = Engine(model, [optimizer], config, collective=collective, total_steps=4)
    engine.start()
    for _ in range(2):
        engine.after_step()
    blocks = engine.layout.blocks
    # A block that has not run is scaled after its first forward.
    scaled = [block.name for block in blocks if any(map(_waits, block.module._forward_pre_hooks.values()))]
    held = [blocks[index].name for index in engine.partition.held[collective.worker]]
    engine.abandon()
    return scaled, held


def _waits(hook: object) -> bool:
    return isinstance(hook, _WhenSeen)


def test_only_blocks_that_are_there_are_scaled() -> None:
    """For others the gradient would pass through x + s (x - x), and be rounded."""
    for scaled, held in run_threads(scaled_blocks, 2)[0]:
        assert scaled == held
        assert len(held) == 3
