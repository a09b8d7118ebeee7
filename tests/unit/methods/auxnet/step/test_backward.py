"""Backward passes through a stage: without a gradient for the input, or twice (workers are threads)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import StageConfig, StageSimulator
from resist_lightning.methods.auxnet.step.guesses import StoredGuesses
from resist_lightning.methods.auxnet.step.store import Samples
from tests.helpers.stages import TanhBlock, make_staged, two_layers
from tests.helpers.threads import ThreadCollective, run_threads
from tests.unit.methods.auxnet.step.test_worker import CUTS, Problem, assert_parallel_gradients, make_problem

METHODS = ["penalty", "al-net", "penalty-store", "al-store"]


class Detached(TanhBlock):
    """A block through which no gradient flows to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def detached_problem(workers: int, stage: int, method: Any, **options: Any) -> Problem:
    """A problem with a stage that begins with a detaching block."""
    problem = make_problem(workers, seed=6, beta=4.0, method=method, **options)
    assert problem.config.cuts is not None
    block = int(problem.config.cuts[stage - 1].removeprefix("body.")) + 1
    body = problem.net.get_submodule("body")
    assert isinstance(body, nn.Sequential)
    body[block] = Detached(3).double()
    return problem


# ------------------------------------------------------------------ no gradient for a stage's input


@pytest.mark.parametrize("method", ["penalty-store", "al-store"])
@pytest.mark.parametrize(("workers", "stage"), [(2, 1), (3, 1), (3, 2)])
def test_parallel_stages_of_which_nothing_flows_back_have_the_gradients_of_the_lagrangian(
    workers: int, stage: int, method: Any
) -> None:
    assert_parallel_gradients(detached_problem(workers, stage, method, multiplier_every=1), steps=0)


def serial_batch(collective: ThreadCollective, problem: Problem) -> tuple[dict[str, Tensor], list[Tensor]]:
    staged = make_staged(collective, problem.net, problem.config, problem.x)
    problem.loss(staged.worker(problem.x)).backward()
    staged.worker.end_step()
    guesses = staged.worker.guesses
    made = guesses.make(Samples(problem.x)) if isinstance(guesses, StoredGuesses) else ()
    return staged.stage_gradients, [tensor for tensor in made if tensor is not None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("workers", "stage"), [(2, 1), (3, 1), (3, 2)])
def test_serial_stages_of_which_nothing_flows_back_have_the_plain_gradients(
    workers: int, stage: int, method: Any
) -> None:
    problem = detached_problem(workers, stage, method)
    problem.config = StageConfig(cuts=CUTS[workers], warmup_steps=1, method=method, aux_network=two_layers)
    named = dict(problem.net.named_parameters())
    plain = torch.autograd.grad(problem.loss(problem.net(problem.x)), list(named.values()), allow_unused=True)
    expected = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), plain, strict=True)
    }

    found, _ = run_threads(serial_batch, workers, problem)

    gradients = {name: gradient for worker, _ in found for name, gradient in worker.items()}
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert any(gradient.any() for gradient in gradients.values())
    if problem.config.stored:  # with p = 0, the guess is the truth and the multiplier is 0
        guess, *multiplier = found[stage][1]
        before = problem.stages()[:stage]
        torch.testing.assert_close(guess, nn.Sequential(*before)(problem.x).detach())
        assert not any(tensor.any() for tensor in multiplier)


@pytest.mark.parametrize("method", ["penalty-store", "al-store"])
def test_the_simulator_trains_a_stage_of_which_nothing_flows_back(method: Any) -> None:
    problem = detached_problem(2, 1, method)
    simulator = StageSimulator(
        problem.net, lambda net: torch.optim.SGD(net.parameters(), 0.1), problem.config, 2, problem.x
    )
    losses = [simulator.step(problem.x, problem.loss).item() for _ in range(4)]
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------ a second backward pass


def backward_twice(collective: ThreadCollective, problem: Problem) -> str:
    staged = make_staged(collective, problem.net, problem.config, problem.x)
    output = staged.worker(problem.x)
    problem.loss(output).backward(retain_graph=True)
    with pytest.raises(RuntimeError) as raised:
        output.square().mean().backward()
    return str(raised.value)


@pytest.mark.parametrize("warmup_steps", [0, 1])
@pytest.mark.parametrize("workers", [2, 3])
def test_a_second_backward_pass_through_one_output_is_told_on_all_workers(workers: int, warmup_steps: int) -> None:
    problem = make_problem(workers, seed=1)
    problem.config = replace(problem.config, warmup_steps=warmup_steps, aux_network=two_layers)
    found, _ = run_threads(backward_twice, workers, problem)
    assert all("Add the losses up, and call backward once" in told for told in found)
