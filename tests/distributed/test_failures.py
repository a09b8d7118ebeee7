"""Contract 12: a worker that dies ends the job on all workers; nobody hangs."""

from __future__ import annotations

import os
import signal

import pytest

from resist_lightning import Config, Engine
from resist_lightning.comm.exchange import Exchange
from tests.helpers.processes import run_workers_to_the_end
from tests.helpers.training import Run, batch_of, make_model, make_optimizer, train_step

RUN = Run(Config(local_steps=2, min_blocks=3), steps=8)
DOOMED, AT_STEP = 1, 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stumble() -> None:
    raise ValueError("in the user's training step")


def train_until(worker: int, end: str) -> str:
    model = make_model(RUN)
    optimizer = make_optimizer(RUN, model)
    engine = Engine(model, [optimizer], RUN.config)
    engine.start()
    for step in range(RUN.steps):
        if worker == DOOMED and step == AT_STEP:
            {"killed": die, "raises": stumble, "killed between merge and hand-over": die_in_the_sync}[end]()
        train_step(model, optimizer, batch_of(worker, step))
        engine.after_step()
    return "trained to the end"


def die_in_the_sync() -> None:
    Exchange.hand_over = lambda *_: die()  # type: ignore[method-assign]


@pytest.mark.parametrize("end", ["killed", "raises", "killed between merge and hand-over"])
def test_when_a_worker_ends_the_others_raise_and_do_not_hang(end):
    outcomes = run_workers_to_the_end(train_until, 3, end, timeout=60, collective_timeout=20)
    doomed, others = outcomes[DOOMED], [outcomes[0], outcomes[2]]
    assert doomed.end == ("exit code 1" if end == "raises" else "SIGKILL")
    assert isinstance(doomed.error, ValueError) == (end == "raises")
    for outcome in others:
        assert outcome.value is None
        assert isinstance(outcome.error, RuntimeError), outcome
