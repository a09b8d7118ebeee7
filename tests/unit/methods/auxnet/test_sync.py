"""What a program does between two steps of stages, in threads: it works, or every worker says why not."""

from __future__ import annotations

import pytest
import torch
from torch.optim import Optimizer

from resist_lightning import Engine, StageConfig
from tests.helpers.stages import ONE_AT_A_TIME, Run, batch_of, config_for, loss_of, make_net
from tests.helpers.threads import ThreadCollective, run_threads

RUN = Run(StageConfig(warmup_steps=1), 0)


def start(collective: ThreadCollective) -> tuple[Engine, list[Optimizer]]:
    """This worker's engine, with one optimizer for the layers that the stages have, and one for the head."""
    with ONE_AT_A_TIME:
        net = make_net(RUN)
        *body, weight, bias = net.parameters()
        optimizers: list[Optimizer] = [torch.optim.SGD(some, lr=0.1) for some in (body, [weight, bias])]
        engine = Engine(net, optimizers, config_for(RUN, 2), collective=collective)
        engine.prepare(batch_of(RUN, 0)[0])
    engine.start()
    return engine, optimizers


def take_steps(collective: ThreadCollective, steps: list[list[int]]) -> None:
    engine, optimizers = start(collective)
    try:
        for number, turn in enumerate(steps):
            batch = batch_of(RUN, number)
            loss_of(batch)(engine.module(batch[0])).backward()
            for each in turn:
                optimizers[each].step()
            engine.after_step()
    finally:
        engine.abandon()


def test_optimizers_that_take_turns_are_refused_where_gradients_are_late() -> None:
    """Each took the gradients of the other's turn, in silence."""
    run_threads(take_steps, 2, [[0], [0, 1], [1, 0]])
    with pytest.raises(RuntimeError, match=r"SGD steps again after a step.*Gradients are late"):
        run_threads(take_steps, 2, [[0], [1], [0]])


def evaluate_between(collective: ThreadCollective) -> None:
    engine, _ = start(collective)
    batch = batch_of(RUN, 0)
    loss = loss_of(batch)(engine.module(batch[0]))
    with engine.full_model("checkpoint"):
        pass
    with pytest.raises(RuntimeError, match="the full model was assembled in between, to save or evaluate"):
        loss.backward()
    engine.abandon()


def test_a_full_model_between_the_passes_hangs_nobody() -> None:
    run_threads(evaluate_between, 2)
