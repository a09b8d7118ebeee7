"""An absent block returns its input, for any way to call it and any use of its output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional

from resist_lightning import Config, Engine
from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.residual import block_at
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.simulator import Simulator
from resist_lightning.methods.resist.subnet import Subnet, SubnetBlock
from tests.helpers.residual import TOKENS, WIDTH, DiT, Gate, Mixer, Odd, Scaled
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state

CONFIG = Config(local_steps=2, blocks="blocks.*", min_blocks=1)


@pytest.mark.parametrize(
    "call", [lambda b, x, m: b(x, m), lambda b, x, m: b(mask=m, x=x), lambda b, x, m: b(x, mask=m)]
)
def test_an_absent_block_gives_back_its_input_however_it_is_called(call):
    block = block_at("layer.0", Odd(""))
    FirstForward([block])
    subnet = SubnetBlock(block)
    subnet.free()
    x = torch.randn(2, TOKENS, WIDTH)
    assert torch.equal(call(block.module, x, torch.ones(1)), x)
    subnet.bypass.settle()
    assert call(block.module, x, torch.ones(1)) is x
    with pytest.raises(
        BlockSelectionError, match=r"'layer\.0' is called with torch\.int64 as its first argument \(x\)"
    ):
        call(block.module, torch.ones(2, dtype=torch.long), None)


class Passes(Odd):
    """Returns its mask too, as T5 does its position bias."""

    def __init__(self) -> None:
        super().__init__("")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return super().forward(x), mask


@pytest.mark.parametrize("compiled", [False, True])
def test_an_absent_block_passes_an_argument_on_by_whatever_way_it_came_at_first(compiled: bool) -> None:
    """One that came by position at first, and then by name, was lost: the next layer got None for its mask."""
    module = torch.compile(Passes(), backend="eager") if compiled else Passes()
    block = block_at("layer.0", module)
    FirstForward([block])
    subnet = SubnetBlock(block)
    subnet.free()
    x, mask = torch.randn(2, TOKENS, WIDTH), torch.ones(1)
    for output, passed in (module(x, mask), module(x, mask=mask), module(mask=mask, x=x)):
        assert torch.equal(output, x)
        assert passed is mask
    assert module(x)[1] is None


def test_what_the_network_writes_into_is_a_copy_and_what_one_step_has_told_is_kept() -> None:
    blocks = [block_at(f"blocks.{index}", Odd("")) for index in range(3)]
    subnet = Subnet(blocks)
    subnet.hold([])
    x = torch.randn(2, TOKENS, WIDTH)
    before = x.clone()
    for _ in range(2):  # the second call of a step comes before the network writes
        written, read = blocks[0].module(x), blocks[1].module(x)
        written.view(-1).mul_(0.5)
    subnet.end_step()
    assert subnet.written() == {"blocks.0": True, "blocks.1": False}
    assert torch.equal(read, x)
    resumed_blocks = [block_at(f"blocks.{index}", Odd("")) for index in range(3)]
    resumed = Subnet(resumed_blocks)
    resumed.hold([])
    resumed.load_written(subnet.written())
    resumed_blocks[0].module(x).zero_()
    assert torch.equal(x, before)
    assert resumed_blocks[1].module(x) is x


class Calls(nn.Module):
    """Blocks that are called by position or by keyword, some with a condition."""

    def __init__(self, kind: type[nn.Module], how: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks, self.how = nn.ModuleList(kind() for _ in range(4)), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        condition = (x.mean(1),) if isinstance(self.blocks[0], DiT) else ()
        for block in self.blocks:
            if self.how == "forward":
                x = block.forward(x, *condition)
            elif self.how == "keyword":
                x = block(**({"condition": condition[0]} if condition else {}), x=x)
            else:
                x = block(x, *condition)
        return self.head(x).mean(1)


def batch(worker: int, step: int) -> Tensor:
    return torch.randn(4, TOKENS, 3, generator=torch.Generator().manual_seed(10 * worker + step))


def train(collective: Any, template: nn.Module, config: Config = CONFIG) -> dict[str, Tensor]:
    net = copy.deepcopy(template)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine = Engine(net, [optimizer], config, collective=collective)
    engine.start()
    for step in range(5):
        optimizer.zero_grad()
        net(batch(collective.worker, step)).square().mean().backward()
        optimizer.step()
        engine.after_step()
    engine.finish()
    return clone_state(net)


@pytest.mark.parametrize("kind", [Mixer, DiT, Scaled])
def test_blocks_called_by_keyword_train_like_those_called_by_position_and_like_the_simulator(kind):
    net = Calls(kind, "keyword")
    by_position = copy.deepcopy(net)
    by_position.how = "position"
    (keyword, other), _ = run_threads(train, 2, net)
    (position, _), _ = run_threads(train, 2, by_position)
    assert_equal_states(keyword, other, exactly=True)
    assert_equal_states(keyword, position, exactly=True)
    simulator = Simulator(net, lambda m: torch.optim.SGD(m.parameters(), 0.1), CONFIG, 2)
    for step in range(5):
        for index, worker in enumerate(simulator.workers):
            worker.optimizers[0].zero_grad()
            worker.module(batch(index, step)).square().mean().backward()
            worker.optimizers[0].step()
        simulator.after_step()
    for name, tensor in simulator.full_model().state_dict().items():
        assert torch.allclose(keyword[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("held", [1, 4])
def test_blocks_inside_of_a_checkpoint_wrapper_train_as_the_blocks_themselves_do(held: int) -> None:
    """Blocks that all workers held were not averaged, in silence; else the scale ended the run with a KeyError."""
    net, config = Calls(Mixer, "position"), replace(CONFIG, min_blocks=held)
    wrapped = copy.deepcopy(net)
    for index, block in enumerate(wrapped.blocks):
        wrapped.blocks[index] = checkpoint_wrapper(block)
    (expected, _), _ = run_threads(train, 2, net, config)
    (state, other), _ = run_threads(train, 2, wrapped, config)
    assert_equal_states(state, other, exactly=True)
    unwrapped = {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in state.items()}
    assert_equal_states(unwrapped, expected, exactly=True)


class Writes(nn.Module):
    """Scales each block's output, in place or not, and needs the first block's input at the end."""

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks, self.scale = nn.ModuleList(Odd("") for _ in range(4)), scale

    def forward(self, x: Tensor) -> Tensor:
        long = x = self.stem(x)
        for block in self.blocks:
            x = self.scale(block(x))
        return self.head(x + long)


def halve(x: Tensor) -> Tensor:
    return x * 0.5


def halve_in_place(x: Tensor) -> Tensor:
    return x.mul_(0.5)


def test_a_network_that_writes_into_what_a_block_returns_trains_as_one_that_does_not() -> None:
    """It silently overwrote the absent block's input."""
    net = Writes(halve)
    in_place = copy.deepcopy(net)
    in_place.scale = halve_in_place
    (expected, _), _ = run_threads(train, 2, net)
    (state, other), _ = run_threads(train, 2, in_place)
    assert_equal_states(state, other, exactly=True)
    assert_equal_states(state, expected)


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool1d(x + self.inside(x), 2)


@pytest.mark.parametrize(
    ("kind", "how"),
    [(Pools, "position"), (lambda: Odd("returns a tuple"), "position"), (Gate, "position"), (Mixer, "forward")],
)
def test_every_worker_refuses_in_its_first_step_before_a_wrong_number_is_out(kind, how):
    """Blocks that are called as block.forward(x) trained, and the full model was not scaled, in silence."""
    refused: list[str] = []
    net = Calls(kind, how)

    def work(collective: Any) -> None:
        with pytest.raises(BlockSelectionError, match=r"'blocks\.\d'") as caught:
            train(collective, net)
        refused.append(str(caught.value))

    run_threads(work, 2)
    assert len(refused) == 2


def test_one_worker_trains_any_block():
    (state,), _ = run_threads(train, 1, Calls(Gate, "position"))
    assert state
