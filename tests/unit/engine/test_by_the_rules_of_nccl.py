"""Whole trainings whose workers communicate by NCCL's rules; over gloo: ``tests/distributed/test_oracle.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resist_lightning import QSR, Config, PostLocal
from resist_lightning.comm.collective import Collective
from tests.helpers.nets import Referring
from tests.helpers.strict_collective import run_strictly
from tests.helpers.strict_groups import run_members_strictly
from tests.helpers.training import Run, SmallRun, assert_equal_states, train_engine, train_simulator

RUNS = {
    "overlap, warm-up and travel": (
        3,
        SmallRun(
            Config(local_steps=2, blocks_per_worker=(4, 2, 1), warmup_rounds=1, momentum="travel"), 7, observe_at=(0, 3)
        ),
    ),
    "outer, int4, frozen": (
        2,
        SmallRun(Config(local_steps=2, min_blocks=3, wire="int4", outer="nesterov"), 5, frozen=("body.2",)),
    ),
    "growing rounds, finish, outer, travel": (
        3,
        SmallRun(
            Config(
                local_steps=PostLocal(1, 2, 3),
                min_blocks=3,
                warmup_rounds=1,
                finish_rounds=2,
                momentum="travel",
                outer="nesterov",
            ),
            10,
            observe_at=(7, 8),
        ),
    ),
    "growth, int8": (
        3,
        SmallRun(Config(local_steps=1, growth=[0.3, 0.6, 1], wire="int8", warmup_rounds=1), 7, observe_at=(3,)),
    ),
    "rounds that follow the rate, blocks that refer to one module": (
        3,
        Run(
            Config(local_steps=QSR(2, 0.09), min_blocks=3, warmup_rounds=1),
            11,
            decay=0.9,
            observe_at=(4,),
            net=Referring,
        ),
    ),
    "syncs beside the training, outer, int8": (
        3,
        SmallRun(Config(local_steps=3, overlap=2, min_blocks=3, wire="int8", outer="nesterov"), 7, observe_at=(1,)),
    ),
    "local SGD": (3, SmallRun(Config(local_steps=2, blocks=[], batch_norm="running"), 5, observe_at=(2,))),
}

MEMBERS = {"outer, int4, frozen": 2, "local SGD": 2}


def train(collective: Collective, run: Run) -> dict[str, Tensor]:
    return train_engine(collective.worker, run, collective=collective)[1]


@pytest.mark.parametrize("name", RUNS)
def test_workers_train_what_the_simulator_trains(name: str) -> None:
    workers, run = RUNS[name]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum in another order may round to another value on the wire
    try:
        # Members of a worker see the same batches here, so they need no mean of gradients: DDP has no threads.
        members = MEMBERS.get(name, 1)
        if members > 1:
            states, network = run_members_strictly(train, workers, members, run)
        else:
            states, network = run_strictly(train, workers, run)
        expected = train_simulator(run, workers).full_model().state_dict()
    finally:
        torch.set_num_threads(before)
    assert_equal_states(states[0], expected)
    for state in states[1:]:
        assert_equal_states(state, states[0], exactly=True)
    assert len(network.log) > workers * run.steps
