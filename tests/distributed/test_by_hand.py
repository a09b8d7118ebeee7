"""Real processes train the values computed by hand on a chain of scalars, with no simulator and no torch."""

from __future__ import annotations

import pytest
import torch

from resist_lightning import Config, Engine
from resist_lightning.schedule.partition import draw_partition, everything
from tests.helpers import by_hand
from tests.helpers.nets import Normed
from tests.helpers.processes import run_workers
from tests.helpers.training import Run, assert_equal_states, train_engine, train_simulator

LINKS = (0.3, -0.2, 0.5, 0.1, -0.4)
RATE, BETA, STEPS, ROUNDS = 0.05, 0.7, 3, 4

Results = list[tuple[float, list[float]]]


def config_for(least: int, momentum: str) -> Config:
    return Config(local_steps=STEPS, min_blocks=least, blocks="body.*", momentum=momentum, test_scale=1.0)


def train_all(worker: int, cases: list[tuple[int, str]]) -> Results:
    return [train(worker, config_for(*case)) for case in cases]


def train(worker: int, config: Config) -> tuple[float, list[float]]:
    net = by_hand.chain(0.8, LINKS)
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=BETA)
    engine = Engine(net, [optimizer], config)
    engine.start()
    for step in range(STEPS * ROUNDS):
        optimizer.zero_grad()
        net(torch.full((1, 1), by_hand.input_of(worker, step), dtype=torch.float64)).sum().backward()
        optimizer.step()
        if step < STEPS * ROUNDS - 1:
            engine.after_step()
    engine.count_step()
    engine.finish()
    return net.stem.weight.item(), [link.weight.weight.item() for link in net.body]


def expect(workers: int, least: int, momentum: str) -> tuple[float, list[float]]:
    rounds = [draw_partition(5, workers, least, 0, round).held for round in range(ROUNDS)]
    return by_hand.train(0.8, LINKS, rounds, STEPS, lr=RATE, beta=BETA, momentum=momentum)


def assert_close(results: list[Results], workers: int, cases: list[tuple[int, str]]) -> None:
    for number, case in enumerate(cases):
        stem, links = expect(workers, *case)
        for worker in range(workers):
            assert results[worker][number][0] == pytest.approx(stem, abs=1e-12), case
            assert results[worker][number][1] == pytest.approx(links, abs=1e-12), case
            assert results[worker][number] == results[0][number]


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_train_what_one_computes_by_hand(workers):
    cases = [(least, momentum) for least in (0, 3) for momentum in ("reset", "keep", "travel")]
    cases += [(5, "reset"), (5, "keep")]
    assert_close(run_workers(train_all, workers, cases), workers, cases)


def train_run(worker: int, run: Run) -> dict[str, torch.Tensor]:
    return train_engine(worker, run)[1]


def test_engine_and_simulator_agree_on_state_where_all_workers_hold_a_block_before_and_after():
    """momentum="travel": merged blocks average their state; blocks that join the all-reduce keep it."""
    run = Run(Config(local_steps=2, min_blocks=4, momentum="travel"), steps=5, net=Normed)
    states = run_workers(train_run, 2, run)
    assert_equal_states(states[0], train_simulator(run, 2).full_model().state_dict())


def test_the_partition_of_a_run_is_the_one_that_was_asked_for():
    assert draw_partition(5, 2, 5, 0, 0) == everything(5, 2)
    assert all(len(held) < 5 for held in draw_partition(5, 3, 3, 0, 0).held)
