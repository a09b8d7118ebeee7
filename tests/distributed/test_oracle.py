"""S real gloo processes train what the reference simulator trains (contracts 3 and 9)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from resist_lightning import Config
from tests.helpers.nets import Normed, SomeBatches
from tests.helpers.processes import run_workers
from tests.helpers.training import (
    Run,
    SmallRun,
    assert_equal_states,
    batch_of,
    clone_state,
    make_model,
    make_optimizer,
    train_engine,
    train_simulator,
    train_step,
)

OUTER: dict[str, Any] = {"outer": "nesterov", "outer_rate": 0.5, "outer_momentum": 0.8}
RUNS = {
    "three workers": (3, Run(Config(local_steps=2, min_blocks=1, seed=5), steps=7)),
    "int6, more workers than blocks and than groups": (
        4,
        Run(Config(local_steps=2, min_blocks=0, wire="int6"), 6, frozen=("body.0",), net=partial(Normed, blocks=2)),
    ),
    "listed counts, one worker without a block": (
        3,
        SmallRun(Config(local_steps=2, blocks_per_worker=(0, 2, 3), warmup_rounds=1, momentum="travel"), steps=7),
    ),
    "all blocks everywhere, keep": (2, SmallRun(Config(local_steps=2, min_blocks=4, momentum="keep"), steps=5)),
    "warm-up in which workers see different parts of blocks": (
        2,
        Run(Config(local_steps=1, min_blocks=1, blocks="body.*", warmup_rounds=6), steps=8, net=SomeBatches),
    ),
    "workers that see different parts of blocks": (
        2,
        Run(Config(local_steps=1, min_blocks=1, blocks="body.*"), steps=6, net=SomeBatches),
    ),
    "travel with AdamW": (2, Run(Config(local_steps=2, min_blocks=1, momentum="travel"), steps=7, optimizer="adamw")),
    "bf16, running statistics, another scale": (
        2,
        SmallRun(Config(local_steps=3, min_blocks=1, batch_norm="running", test_scale=0.3, wire="bf16"), steps=7),
    ),
    "int8": (4, Run(Config(local_steps=2, min_blocks=1, wire="int8"), steps=5)),
    "int6 with overlap, warm-up and travel": (
        3,
        SmallRun(Config(local_steps=2, min_blocks=3, wire="int6", warmup_rounds=1, momentum="travel"), steps=9),
    ),
    "local SGD, int2": (3, SmallRun(Config(local_steps=2, blocks=[], batch_norm="running", wire="int2"), steps=7)),
    "frozen": (3, SmallRun(Config(local_steps=2, min_blocks=3), steps=7, frozen=("body.2", "stem"))),
    "listed counts, outer with overlap, warm-up and travel": (
        3,
        SmallRun(
            Config(local_steps=2, blocks_per_worker=(4, 2, 1), warmup_rounds=1, momentum="travel", **OUTER), steps=9
        ),
    ),
    "warm-up, finish, int2, outer": (
        3,
        SmallRun(Config(local_steps=2, min_blocks=1, warmup_rounds=1, finish_rounds=1, wire="int2", **OUTER), steps=9),
    ),
    "growth, outer of its defaults": (3, SmallRun(Config(local_steps=2, growth=[0.25, 0.6, 1], outer="nesterov"), 11)),
    "int4, outer, frozen": (
        2,
        SmallRun(Config(local_steps=2, min_blocks=3, wire="int4", **OUTER), steps=7, frozen=("body.2",)),
    ),
    "syncs beside the training, int8, outer, overlap, warm-up": (
        3,
        SmallRun(
            Config(local_steps=3, overlap=2, min_blocks=3, wire="int8", momentum="keep", warmup_rounds=1, **OUTER),
            steps=10,
            observe_at=(4,),
        ),
    ),
    "fragments, beside the training": (
        3,
        SmallRun(Config(local_steps=2, overlap=1, fragments=2, min_blocks=2), 9, observe_at=(3, 4)),
    ),
    "DiLoCo": (
        2,
        SmallRun(Config(local_steps=2, blocks=[], batch_norm="running", **OUTER), steps=7, optimizer="adamw"),
    ),
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


State = dict[str, Tensor]


def train(worker: int, runs: dict[str, Run]) -> dict[str, State]:
    return {name: train_engine(worker, run)[1] for name, run in runs.items()}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[State]]:
    """The workers' tensors at the end of each run; runs with the same number of workers share processes."""
    found = {}
    for workers in (2, 3, 4):
        runs = {name: run for name, (number, run) in RUNS.items() if number == workers}
        results = run_workers(train, workers, runs)
        found |= {name: [result[name] for result in results] for name in runs}
    return found


@pytest.mark.parametrize("name", RUNS)
def test_processes_train_what_the_simulator_trains(name: str, trained: dict[str, list[State]]) -> None:
    workers, run = RUNS[name]
    states = trained[name]

    with threads(1):  # as in the processes: a sum in another order may round to another value on the wire
        expected = train_simulator(run, workers).full_model().state_dict()
    assert_equal_states(states[0], expected)
    for state in states[1:]:
        assert_equal_states(state, states[0], exactly=True)


def test_one_worker_is_plain_training_with_momentum_restarts() -> None:
    run = SmallRun(Config(local_steps=3), steps=7)
    _, state = train_engine(0, run)

    model = make_model(run)
    for step in range(run.steps):
        if step % 3 == 0:
            optimizer = make_optimizer(run, model)
        train_step(model, optimizer, batch_of(0, step))
    assert_equal_states(state, clone_state(model), exactly=True)


def test_frozen_parameters_stay_frozen(trained: dict[str, list[State]]) -> None:
    _, run = RUNS["frozen"]
    frozen = {name: p for name, p in make_model(run).named_parameters() if not p.requires_grad}
    assert any("body.2" in name for name in frozen)
    for name, parameter in frozen.items():
        # The full model's blocks are scaled.
        if "body.2.out" not in name:
            torch.testing.assert_close(trained["frozen"][0][name], parameter.detach(), rtol=0, atol=0)
