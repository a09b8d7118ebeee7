"""Guesses when the learning rate ends at 0, and after a batch without a backward pass (workers are threads)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from resist_lightning import StageSimulator
from resist_lightning.methods.auxnet.step.store import Samples
from tests.helpers.lagrangian import gradients_of_lagrangian
from tests.helpers.stages import load_guess, make_staged
from tests.helpers.threads import ThreadCollective, run_threads
from tests.unit.methods.auxnet.step.test_worker import Problem, make_problem

GROWTH = 5.0
RATES = (0.1, 0.01, 0.0, 0.0, 0.1)
FACTORS = (1.0, GROWTH, GROWTH, GROWTH, 1.0)
"""Growth of beta at these rates; a rate of 0 tells nothing about the progress of the training."""


def decaying(collective: ThreadCollective, problem: Problem) -> list[tuple[dict[str, Tensor], Tensor | None]]:
    """For each batch, the gradients, and the guess before it."""
    rates: Iterator[float] = iter(RATES)
    staged = make_staged(collective, problem.net, problem.config, problem.x, partial(next, rates))
    load_guess(staged.worker, problem.x, problem.guesses[0] if collective.worker else None, None)
    found = []
    for _ in RATES:
        staged.net.zero_grad()
        guesses = staged.worker.guesses
        guess = guesses.make(Samples(problem.x))[0].clone() if guesses is not None else None
        problem.loss(staged.worker(problem.x)).backward()
        staged.worker.end_step()
        found.append((staged.stage_gradients, guess))
    return found


def test_beta_stays_where_it_was_when_the_rate_ends_at_0() -> None:
    problem = make_problem(2, seed=2, beta=3.0, beta_growth=GROWTH, method="penalty-store")

    (first, second), _ = run_threads(decaying, 2, problem)

    for (gradients, _), (_, guess), factor in zip(first, second, FACTORS, strict=True):
        assert guess is not None
        nothing = [torch.zeros_like(guess)]
        whole = gradients_of_lagrangian(
            *(problem.net, problem.stages(), problem.x, problem.loss, [guess], nothing, 3.0 * factor)
        )
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole.parameters[name], rtol=1e-6, atol=1e-9)


def resumed(collective: ThreadCollective, problem: Problem) -> float:
    """The share of the rate in a worker that is made after the rate has fallen to 0."""
    one = make_staged(collective, problem.net, problem.config, problem.x, partial(next, iter(RATES))).worker
    for _ in range(3):
        problem.loss(one(problem.x)).backward()
        one.end_step()
    other = make_staged(collective, problem.net, problem.config, problem.x, lambda: 0.0).worker
    other.load_state_dict(one.state_dict())
    return other._rate_share.now()


def test_a_run_that_goes_on_at_a_rate_of_0_keeps_its_beta() -> None:
    problem = make_problem(2, seed=2, beta_growth=GROWTH, method="penalty-store")
    assert run_threads(resumed, 2, problem)[0] == [pytest.approx(0.1)] * 2


def test_the_simulator_keeps_beta_when_the_rate_ends_at_0() -> None:
    problem = make_problem(2, seed=2, beta=3.0, beta_growth=GROWTH, method="penalty-store")
    simulator = StageSimulator(
        problem.net, lambda net: torch.optim.SGD(net.parameters(), 0.1), problem.config, 2, problem.x
    )
    simulator.step(problem.x, problem.loss)
    found = []
    for rate in RATES:
        simulator.optimizers[0].param_groups[0]["lr"] = rate
        found.append(simulator._beta(simulator._rate_share(), torch.zeros(1, 1)) / 3.0)
    assert found == pytest.approx(FACTORS)


def weights_after_a_serial_step(collective: ThreadCollective, problem: Problem) -> list[list[Tensor]]:
    """The auxiliary network's weights after a serial step, without and with a batch that was only guessed before it."""
    guesses = make_staged(collective, problem.net, problem.config, problem.x, lambda: 0.1).worker.guesses
    if guesses is None:
        return []
    with torch.no_grad():
        truth = guesses.network(problem.x)[0] + 1
    found = []
    for skipped in (None, problem.x[:1]):
        learning = copy.deepcopy(guesses)
        if skipped is not None:
            learning.make(Samples(skipped))
        learning.begin_at(Samples(problem.x), truth, torch.zeros_like(truth), 1.0)
        found.append([parameter.detach() for parameter in learning.network.parameters()])
    return found


def test_a_serial_step_learns_nothing_from_a_batch_that_had_no_backward_pass() -> None:
    problem = make_problem(2, seed=2, method="penalty", serial_every=2)

    (_, (alone, behind)), _ = run_threads(weights_after_a_serial_step, 2, problem)

    assert all(map(torch.equal, alone, behind))
