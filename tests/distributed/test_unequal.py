"""Shares and overlaps that follow from measured times, by real processes and real seconds."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from resist_lightning import Config, Engine
from tests.helpers.nets import Normed
from tests.helpers.processes import run_workers
from tests.helpers.training import (
    Run,
    assert_equal_states,
    batch_of,
    clone_state,
    make_model,
    make_optimizer,
    slow_down,
    train_engine,
    train_simulator,
    train_step,
)

OUTER = {"outer": "nesterov", "outer_rate": 0.9, "outer_momentum": 0.5}  # a velocity must find its block's next owner
RUN = Run(Config(local_steps=1, min_blocks=1, blocks_per_worker="auto", **OUTER), steps=9, net=Normed)
SECONDS_PER_BLOCK = (0.004, 0.04)
"""Worker 1 is so slow that a busy machine does not matter."""


def train(worker: int) -> dict[str, Any]:
    """Train at this worker's speed, to the end of round 8; then begin a second run from there."""
    model = make_model(RUN)
    optimizer = make_optimizer(RUN, model)
    engine = Engine(model, [optimizer], RUN.config)
    engine.start()
    sizes = []
    for step in range(RUN.steps):
        held = len(engine.partition.held[worker])
        sizes.append(held)
        train_step(model, optimizer, batch_of(worker, step))
        time.sleep(SECONDS_PER_BLOCK[worker] * (1 + held))
        engine.after_step()
    engine.finish()
    state, weights = engine.checkpoint_state(), clone_state(model)
    second = Engine(model, [optimizer], RUN.config)
    second.restore({**state, "table": json.loads(json.dumps(state["table"]))})
    second.start()
    second.abandon()
    return {
        "sizes": sizes,
        "weights": weights,
        "table": engine.layout.schedule.state_dict(),
        "resumed": [second.layout.schedule == engine.layout.schedule, second.partition == engine.partition],
    }


def test_a_slow_worker_gets_fewer_blocks_and_all_derive_the_same_rounds() -> None:
    fast, slow = run_workers(train, 2)

    assert fast["sizes"] == [2, 2, 4, 2, 4, 2, 3, 3, 3]
    assert slow["sizes"] == [2, 2, 4, 2, 4, 2, 1, 1, 1]
    assert fast["table"] == slow["table"]
    assert [round for round, _ in fast["table"]["seconds"]] == [1, 2, 3, 4]
    assert_equal_states(slow["weights"], fast["weights"], exactly=True)
    equal = replace(RUN, config=replace(RUN.config, blocks_per_worker="equal"))
    assert_equal_states(fast["weights"], train_simulator(equal, 2, fast["table"]).full_model().state_dict())
    assert fast["resumed"] == slow["resumed"] == [True, True]


OVERLAP = Run(Config(local_steps=4, overlap="auto", min_blocks=1, momentum="keep"), steps=18, net=Normed)


def train_over_a_slow_link(worker: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    engine, state = train_engine(
        worker, OVERLAP, lambda engine, step: slow_down(engine.collective, 0.05) if step == 0 else None
    )
    return engine.layout.state_dict(), state


def test_workers_choose_one_overlap_and_train_what_the_simulator_trains_with_it() -> None:
    (table, state), (other_table, other_state) = run_workers(train_over_a_slow_link, 2)

    assert other_table == table
    first, overlap = table["overlap"]["chosen"]
    assert (first, overlap) in ((3, 1), (3, 2), (3, 3))
    assert_equal_states(other_state, state, exactly=True)
    waiting = replace(OVERLAP, config=replace(OVERLAP.config, overlap=0))
    assert_equal_states(state, train_simulator(waiting, 2, table).full_model().state_dict())
