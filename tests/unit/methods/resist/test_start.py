"""The start of ResIST: each worker gets its first part of worker 0's module, and no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine
from resist_lightning.comm.packing import packed_bytes
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.state.unmade import without_memory
from tests.helpers.nets import on_meta, small_preact
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, batch_of, clone_state, train_step

CONFIG = Config(local_steps=2, min_blocks=1)
WORKERS = 3


def first_net() -> nn.Module:
    torch.manual_seed(7)
    return small_preact()


def other_net() -> nn.Module:
    torch.manual_seed(8)
    return small_preact()


def form() -> nn.Module:
    with without_memory():
        return small_preact()


def started(collective, nets, optimizer_class):
    """Bytes sent at the start, the tensors held then, and the full model after the training."""
    net = nets[collective.worker]
    optimizer = optimizer_class(net.parameters(), lr=0.01)
    engine = Engine(net, [optimizer], CONFIG, collective=collective)
    parameters = list(net.parameters())
    engine.start()
    sent = collective.sent_bytes["start"]
    present = {name for name, tensor in named_tensors(net).items() if not tensor.is_meta}
    for step in range(3):
        train_step(net, optimizer, batch_of(collective.worker, step))
        engine.after_step()
    engine.finish()
    assert all(one is other for one, other in zip(parameters, net.parameters(), strict=True))
    return sent, present, clone_state(net), engine.layout


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("build", [other_net, form, lambda: on_meta(small_preact)], ids=["whole", "form", "meta"])
def test_every_worker_gets_what_its_first_partition_gives_it(build: Callable[[], nn.Module], optimizer: type) -> None:
    equal = [first_net() for _ in range(WORKERS)]
    expected, _ = run_threads(started, WORKERS, equal, optimizer)
    results, _ = run_threads(started, WORKERS, [first_net(), *(build() for _ in range(1, WORKERS))], optimizer)

    layout = results[0][3]
    blocks = [packed_bytes(block.tensors().values()) for block in layout.blocks]
    shared = packed_bytes(layout.shared.values())
    held = layout.partition(0).held
    arrived = [shared + sum(blocks[block] for block in held[worker]) for worker in range(1, WORKERS)]
    assert [sent for sent, *_ in results] == [sum(arrived), 0, 0]
    for worker, (_, present, state, _) in enumerate(results):
        own = {name for block in held[worker] for name in layout.blocks[block].tensors()}
        assert present == layout.shared.keys() | own
        assert_equal_states(state, expected[worker][2], exactly=True)


def test_where_nobody_makes_values_worker_0_does() -> None:
    torch.manual_seed(7)
    nets = [on_meta(small_preact) for _ in range(WORKERS)]
    results, _ = run_threads(started, WORKERS, nets, torch.optim.SGD)
    states = [state for _, _, state, _ in results]
    for state in states[1:]:
        assert_equal_states(state, states[0], exactly=True)
    assert all(tensor.isfinite().all() for tensor in states[0].values())
